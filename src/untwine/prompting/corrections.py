"""Instructions against kinds of flawed actions: data of the package (corrections.yaml), which a
recipe may change. When they are shown is decided in training/correction.py."""

from __future__ import annotations

import functools
from importlib import resources

import yaml

from untwine.config import CorrectionConfig
from untwine.errors import ConfigError, nearest


def instructions(config: CorrectionConfig) -> dict[str, str]:
    """Kind -> sentence for every known kind, in the order in which prompts show them.

    ConfigError when the recipe names an unknown kind, or leaves a sentence empty.
    """
    known = _packaged()
    for key, kinds in (("kinds", config.kinds), ("sentences", list(config.sentences))):
        for kind in kinds:
            if kind not in known:
                names = ", ".join(known)
                raise ConfigError(
                    f"correction.{key}: unknown kind {kind!r}; known are {names}."
                    f"{nearest(kind, known)}"
                )
    own = {kind: " ".join(sentence.split()) for kind, sentence in config.sentences.items()}
    for kind, sentence in own.items():
        if not sentence:
            raise ConfigError(
                f"correction.sentences.{kind} is empty; write a sentence, or leave the kind out "
                "of correction.kinds"
            )
    return {**known, **own}


@functools.cache
def _packaged() -> dict[str, str]:
    text = resources.files("untwine.prompting").joinpath("corrections.yaml").read_text("utf-8")
    return {str(kind): str(sentence) for kind, sentence in yaml.safe_load(text).items()}
