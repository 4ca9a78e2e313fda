"""What makes two evaluations comparable, and which agent was evaluated."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from untwine.config import EnvConfig, Recipe
from untwine.config.keys import leaves
from untwine.evaluate.content import outside_content
from untwine.records import TaskRef

DECODINGS = ("sampled", "greedy")
_AGENT: dict[str, set[str]] = {
    "prompt": set(),
    "policy": {"threads", "device", "dtype", "gradient_checkpointing"},
    "sampling": {"waves"},
}
"""Sections that make the agent, with the keys in them that only say how the work is done."""


def decoding_name(greedy: bool, temperature: float | None) -> str:
    """How the actions of an evaluation are drawn. Sampled ones are drawn at the temperature of the
    policy unless the evaluation has one of its own."""
    own = "" if greedy or temperature is None else f" at {temperature:g}"
    return DECODINGS[greedy] + own


def set_identity(
    env: EnvConfig, set_name: str, refs: Sequence[TaskRef], *, decoding: str, seed: int
) -> dict[str, Any]:
    """The identity of an evaluation set, as it is written beside the results.

    digest       SHA-256 over everything below but the seed, and over every instance in order
    instances, repetitions
                 how many different ones, and how often the one that is played most
    seed         of the sampling; not in the digest, since runs are sampled independently

    decoding     `sampled`, `greedy`, or `sampled at 0.4` where the evaluation has a temperature of
                 its own
    content      only where games come from a folder: checksum of those that are played; the option
                 that says where the folder lies is then no part of `options`

    What belongs to the agent (prompt, its temperature, constraints) is no part of it: these may be
    what is compared.
    """
    content = outside_content(env, refs)
    place = content.place if content else ()
    settings = {
        "set": set_name,
        "environment": env.name,
        "options": {key: value for key, value in env.options.items() if key not in place},
        "max_steps": env.max_steps,
        "decoding": decoding,
        "episodes": len(refs),
        **({"content": content.checksum} if content else {}),
    }
    text = json.dumps([settings, [str(ref) for ref in refs]], sort_keys=True)
    played = Counter(refs)
    return {
        "digest": hashlib.sha256(text.encode()).hexdigest(),
        **settings,
        "instances": len(played),
        "repetitions": max(played.values(), default=0),
        "seed": seed,
    }


def agent_changes(own: Recipe, played: Recipe, decoding: str) -> dict[str, Any]:
    """Keys that make the agent, with their values in `played`, where these differ from those of
    the run; what `decoding` says already is left out. Empty when the agent is that of the run."""
    before, after = (
        dict(leaves({s: getattr(recipe, s).model_dump(mode="json") for s in _AGENT}))
        for recipe in (own, played)
    )
    neutral = {f"{section}.{key}" for section, keys in _AGENT.items() for key in keys}
    if decoding != DECODINGS[0]:
        neutral.add("sampling.temperature")
    return {
        key: after.get(key)
        for key in sorted(before | after)
        if key not in neutral and before.get(key) != after.get(key)
    }


def model_digest(folder: Path) -> str | None:
    """SHA-256 over the weights of a saved model; None when the folder holds none. Two folders with
    equal digests hold the same policy."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
