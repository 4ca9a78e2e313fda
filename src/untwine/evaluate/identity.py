"""What makes two evaluations comparable, and which policy was evaluated."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from untwine.config import EnvConfig
from untwine.records import TaskRef

DECODINGS = ("sampled", "greedy")


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

    What belongs to the agent (prompt, its temperature, constraints) is no part of it: these may be
    what is compared.
    """
    settings = {
        "set": set_name,
        "environment": env.name,
        "options": env.options,
        "max_steps": env.max_steps,
        "decoding": decoding,
        "episodes": len(refs),
    }
    content = json.dumps([settings, [str(ref) for ref in refs]], sort_keys=True)
    played = Counter(refs)
    return {
        "digest": hashlib.sha256(content.encode()).hexdigest(),
        **settings,
        "instances": len(played),
        "repetitions": max(played.values(), default=0),
        "seed": seed,
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
