"""What the diagnose commands would leave in a synthetic run, in their formats, with hostile text.

The numbers are made up, but consistent: the Gram is a true Gram, self and coupled terms follow from
it, and steps and samples are those of the run's last episode file.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from untwine.diagnose.truth_file import Truth, TruthRow, checksum, truth_path, write_truth
from untwine.episodes import read_groups
from untwine.records import Episode, Step

PROMPT = "You cook.\nTask: boil water\nStep {}: the pot is on the {}. {}\n"


def last_file(run: Path) -> tuple[int, Path]:
    file = max((run / "episodes").glob("iter-*.jsonl.gz"))
    return int(file.name[5:11]), file


def write_microscope(run: Path, text: str = "", samples: int = 24, seed: int = 0) -> Path:
    """All six measurements of the last recorded iteration."""
    write_truth_of(run, text, seed)
    write_json(run, "labels", label_quality(text))
    write_json(run, "calibration", calibration(text))
    write_coupling(run, text, samples, seed)
    write_json(run, "judging", judging(text))
    write_separation(run, text, samples, seed)
    return run


def write_json(run: Path, name: str, numbers: dict[str, Any]) -> None:
    (run / "diagnose").mkdir(exist_ok=True)
    whole = {"format": f"untwine-{name}-1", **numbers}
    (run / "diagnose" / f"{name}.json").write_text(json.dumps(whole))


def steps_of(file: Path) -> list[tuple[int, Episode, Step]]:
    return [
        (g, episode, step)
        for g, group in enumerate(read_groups(file))
        for episode in group.episodes
        for step in episode.steps
    ]


def write_truth_of(run: Path, text: str = "", seed: int = 0) -> None:
    """Every third step is judged: flawed, neutral, good in turn."""
    rng = random.Random(seed)
    iteration, file = last_file(run)
    rows = []
    for i, (g, episode, step) in enumerate(steps_of(file)[::3]):
        label, middle = (("flawed", -0.4), ("neutral", 0.0), ("good", 0.3))[i % 3]
        advantage = middle + rng.uniform(-0.05, 0.05)
        rows.append(
            TruthRow(
                group=g, episode=episode.id, step=step.index, ref=str(episode.ref),
                state_key=step.state_key, action=(step.command or step.text).lower(),
                kind=f"repeat{text}", position="early", weight=1.0, shared=1, q=rng.random(),
                value=0.5, action_value=0.5 + advantage, advantage=advantage,
                low=advantage - 0.1, high=advantage + 0.1, n=64, label=label,  # type: ignore[arg-type]
                clear=label != "neutral", confidence=0.99,
            )
        )  # fmt: skip
    counts = {name: sum(r.label == name for r in rows) for name in ("flawed", "neutral", "good")}
    header = {
        "iteration": iteration, "episodes_sha256": checksum(file), "steps": len(rows),
        "labels": {k: {"steps": n, "share": n / len(rows)} for k, n in counts.items()},
        "flawed_by_chance": 0.025 * len(rows), "unclear": counts["neutral"], "steps_left_out": 0,
        "mismatches": [{"episode": text, "step": 1, "what": "text"}], "policy_gap": 0.0,
        "branches_played": 4000, "env_steps": 40_000,
    }  # fmt: skip
    write_truth(truth_path(run, iteration), Truth(header, tuple(rows)))


def label_quality(text: str = "") -> dict[str, Any]:
    def share(value: float | None, steps: int = 0) -> dict[str, Any]:
        interval = None if value is None else [value - 0.125, value + 0.125]
        return {"value": value, "interval": interval, "steps": steps}

    def source(coverage: float, accuracy: float | None, n: int) -> dict[str, Any]:
        verdict = {"precision": share(accuracy, n), "precision_decided": share(None)}
        return {
            "coverage": share(coverage, 30), "accuracy": share(accuracy, n),
            "flawed": {**verdict, "recall": share(0.375, 10)},
            "good": {**verdict, "recall": share(None)},
            "worth": {
                "flawed_mean": {"value": -0.25, "interval": [-0.5, 0.0]},
                "good_mean": None, "difference": None,
            },
            "counts": {t: {"good": 1, "flawed": 1, "none": 1} for t in ("good", "flawed")},
        }  # fmt: skip

    sources = {"rule": source(0.5, 0.75, 12), f"mine{text}": source(0.25, None, 0)}
    return {
        "iterations": [0], "steps": 30, "asked": ["rule", f"mine{text}"], "sources": sources,
        "cost": {},
    }  # fmt: skip


def measures(flawed: float, good: float) -> dict[str, Any]:
    def mean(value: float) -> dict[str, Any]:
        return {"value": value, "interval": [value - 0.1, value + 0.1]}

    means = {
        "flawed_mean": mean(flawed), "good_mean": mean(good), "difference": mean(good - flawed),
    }  # fmt: skip
    return {
        "steps": 30, "flawed": 10, "good": 10, **means, "by_episode": means,
        "mean_estimate": mean((flawed + good) / 2), "mean_advantage": mean(-0.03),
        "miscalibration": {"value": 0.25, "interval": [0.1, 0.4]}, "sign_agreement": 0.75,
        "rank_correlation": 0.42, "variance": 0.9,
    }  # fmt: skip


def calibration(text: str = "", flawed: float = -0.35) -> dict[str, Any]:
    part = {f"repeat{text}": measures(-0.6, 0.2), "other": measures(-0.1, 0.3)}
    lemma = {"measured": -0.3, "policy_q": -0.31, "policy_q_in_deviations": -0.9}
    return {
        "source": "truth", "note": f"made up {text}", "iterations": [0], "steps": 30, "flawed": 10,
        "good": 10, "flawed_by_chance": 0.7,
        "methods": {
            "grpo": {
                "options": {}, "without_estimate": 0, "all": measures(flawed, 0.25),
                "by_kind": part, "by_position": {"early": measures(-0.2, 0.2)}, "lemma": lemma,
            },
            f"other{text}": {"options": {}, "not_applicable": f"not for this run {text}"},
        },
    }  # fmt: skip


def distinct_steps(run: Path, samples: int) -> tuple[int, list[tuple[Episode, Step]]]:
    iteration, file = last_file(run)
    found = [(e, s) for _, e, s in steps_of(file) if s.advantage is not None]
    return iteration, found[:samples]


def sample_record(episode: Episode, step: Step, i: int, weight: float, text: str) -> dict[str, Any]:
    verdict = ("good", "flawed", None)[i % 3]
    return {
        "task": str(episode.ref), "episode": episode.id, "step": step.index,
        "state_key": step.state_key, "command": step.command, "text": step.text,
        "verdict": verdict, "kind": f"repeat{text}" if verdict == "flawed" else None,
        "weight": weight, "count": 1,
    }  # fmt: skip


def write_coupling(run: Path, text: str = "", samples: int = 24, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    iteration, chosen = distinct_steps(run, samples)
    n = len(chosen)
    gradients_ND = rng.normal(size=(n, 12)) + 0.8 * rng.normal(size=12)
    gram_NN = gradients_ND @ gradients_ND.T
    weights = rng.normal(size=n)
    push_NN = 1e-4 * gram_NN * weights
    own, delta = np.diagonal(push_NN), push_NN.sum(1)
    records = [sample_record(e, s, i, float(weights[i]), text) for i, (e, s) in enumerate(chosen)]
    sample_list = [
        {**r, "logprob": -1.0, "own": float(own[i]), "coupled": float(delta[i] - own[i]),
         "delta": float(delta[i])}
        for i, r in enumerate(records)
    ]  # fmt: skip

    def shown(i: int) -> dict[str, Any]:
        prompt = PROMPT.format(i, "stove" if i % 2 else "table", text)
        return {"sample": i, **records[i], "probability": 0.2, "prompt": prompt}

    rate = {"flawed": 8, "reinforced": 5, "share": 0.625, "null": 0.4, "interval": [0.2, 0.5],
            "p_value": 0.01}  # fmt: skip
    rates = {"all": rate, f"repeat{text}": rate}
    numbers = {
        "iteration": iteration, "policy": f"checkpoints/rl {text}", "metric": "sgd", "steps": 90,
        "distinct": n, "samples": n, "drift": {"mean": 1e-6, "largest": 1e-5},
        "head_correlation": 0.4, "largest_change": 0.01,
        "reinforced": {"labelled flawed": rates, "advantage below 0": rates},
        "credits": {
            "as trained": {"good": 0.125, "flawed": 0.0625, "difference": 0.0625},
            f"veto{text}": {"good": 0.25, "flawed": -0.125, "difference": 0.375},
        },
        "lifts": {
            kind: {
                "targets": 5, "own": -0.002, "delta": -0.0005 + 0.0001 * k,
                "sources": [
                    {"relation": "same command", "credit": "rewarded", "verdict": "good",
                     "mean": 0.001 + 0.0001 * k},
                    {"relation": "other", "credit": "punished", "verdict": None, "mean": 0.0005},
                ],
            }
            for k, kind in enumerate(("all", f"repeat{text}"))
        },
        "honesty": {
            "correlation": 0.999, "slope": 1.01, "rate": 1e-4, "predicted": delta.tolist(),
            "measured": (1.01 * delta).tolist(),
        },
        "mean_push": {"batches": 3, "signal_share": 0.1, "rates": rates, "push": delta.tolist()},
        "cosines": [
            {"kind": kind, "relation": relation, "pairs": 12, "mean": 0.1,
             "counts": [1, 2, 6, 2, 1]}
            for kind in ("good-good", "good-flawed", "flawed-flawed")
            for relation in ("same state", "other")
        ],
        "offenders": [
            {**shown(i), "delta": 0.01, "own": -0.002, "coupled": 0.012,
             "pushers": [{**shown(j), "push": 0.004, "cosine": 0.5} for j in (0, 2)]}
            for i in (1, 4)
        ],
        "sample_list": sample_list,
    }  # fmt: skip
    write_json(run, "coupling", numbers)
    save_file({"K_NN": gram_NN}, run / "diagnose" / "coupling.safetensors")


def judging(text: str = "") -> dict[str, Any]:
    def change(good: float, flawed: float) -> dict[str, float]:
        return {"good": good, "flawed": flawed, "difference": good - flawed}

    return {
        "iteration": 20, "source": "model", "objective": f"generative/ce{text}", "distinct": 40,
        "samples": 24, "good": 6, "flawed": 10, "questions": 12, "right_verdicts": 0.75,
        "norm_ratio": 4.5, "cosine": -0.02, "policy": change(0.25, -0.25),
        "verdict": change(0.125, -0.0625),
        "permuted": [change(0.0, 0.03125), change(0.0625, 0.0), change(-0.0625, 0.03125)],
    }  # fmt: skip


def write_separation(run: Path, text: str = "", samples: int = 24, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    iteration, chosen = distinct_steps(run, samples)
    n, layers = len(chosen), 3
    names = ("task", "episode", "step", "command", "verdict", "kind")
    records = [sample_record(e, s, i, 0.0, text) for i, (e, s) in enumerate(chosen)]
    numbers = {
        "iteration": iteration, "policy": "model", "distinct": n, "samples": n, "flawed": n // 3,
        "tasks": 4, "pool": "mean", "metric": "cosine",
        "layers": [
            {"layer": k, "accuracy": 0.6 + 0.05 * k, "balanced": 0.5 + 0.1 * k, "majority": 0.66,
             "silhouette": 0.1 * k, "silhouette_shuffled": 0.0, "margin": 1.0 + k,
             "margin_shuffled": 0.5, "variance_shown": [0.4, 0.2]}
            for k in range(layers)
        ],
        "sample_list": [{k: r[k] for k in names} for r in records],
    }  # fmt: skip
    write_json(run, "separation", numbers)
    maps_SN2 = rng.normal(size=(layers, n, 2)).astype(np.float32)
    save_file({"maps_SN2": maps_SN2}, run / "diagnose" / "separation.safetensors")
