"""Synthetic run directories for the report: plausible numbers, and hostile text where it can be."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from untwine.config import make_recipe
from untwine.episodes import write_groups
from untwine.records import Episode, Group, Label, Step, TaskRef

HOSTILE = "</script><img src=x onerror=alert(1)><b>&\u2028"
TASKS = ("boil", "find-plant", "grow-fruit", "light-bulb", "mix-paint")
KINDS = ("repeat", "no_effect", "invalid", "undo")
COMMANDS = ("look around", "open door to kitchen", "take metal pot", "focus on pot", "wait")


def make_groups(
    iteration: int = 0, groups: int = 4, size: int = 4, text: str = "", seed: int = 0
) -> list[Group]:
    """Groups with labels, advantages, invalid steps and long observations; `text` is mixed in."""
    rng = random.Random(f"{seed}-{iteration}")
    made = []
    for g in range(groups):
        ref = TaskRef("rooms", TASKS[g % len(TASKS)] + text, g)
        episodes = tuple(_episode(rng, ref, f"{iteration}-{g}-{e}", text) for e in range(size))
        made.append(Group(ref, episodes))
    return made


def _episode(rng: random.Random, ref: TaskRef, name: str, text: str) -> Episode:
    steps: list[Step] = []
    seen, count = f"You are in the hall. {text}", rng.randint(3, 9)
    success = rng.random() < 0.4
    for index in range(count):
        draw = rng.random()
        flawed, invalid = draw < 0.35, draw < 0.1
        feedback = f"Step {index}: the pot is on the stove. {text}" * (1 if draw < 0.7 else 12)
        kind = rng.choice(KINDS) if flawed else "progress"
        label = Label("rule" if flawed else "group", "flawed" if flawed else "good", kind, 0.8)
        steps.append(
            Step(
                index=index,
                state_key=f"s{index}",
                observation=seen,
                prompt_ids=(1, 2, 3),
                action_ids=(4, 5),
                logprobs=(-rng.random(), -rng.random()),
                text=f"{rng.choice(COMMANDS)} {text}",
                thought=f"I should heat the water. {text}" if draw > 0.5 else None,
                command=None if invalid else f"{rng.choice(COMMANDS)} {text}".strip(),
                invalid=f"no known action matches {text}" if invalid else None,
                next_state_key=f"s{index + 1}",
                feedback=feedback,
                score=10.0 * index,
                outcome=index / count,
                reward=0.1 if draw > 0.6 else 0.0,
                done=index == count - 1,
                labels=(label,) if draw < 0.8 else (),
                advantage=rng.gauss(-0.5 if flawed else 0.3, 0.4) if draw < 0.95 else None,
            )
        )
        seen = feedback
    return Episode(
        id=name,
        ref=ref,
        goal=f"Your task is to boil water. {text}",
        steps=tuple(steps),
        outcome=1.0 if success else 0.3,
        score=100.0 if success else 30.0,
        success=success,
        ended="success" if success else "limit",
    )


def _wave(rng: random.Random, k: int, n: int, first: float, last: float, noise: float) -> float:
    progress = 1 - math.exp(-3 * k / max(1, n))
    return first + (last - first) * progress + rng.gauss(0, noise)


def rl_row(rng: random.Random, k: int, n: int, text: str = "") -> dict[str, Any]:
    flawed = _wave(rng, k, n, 0.45, 0.2, 0.02)
    return {
        "stage": "rl",
        "step": k,
        "outcome_mean": _wave(rng, k, n, 0.2, 0.62, 0.03),
        "success_rate": _wave(rng, k, n, 0.1, 0.5, 0.04),
        "episode_length": _wave(rng, k, n, 18, 11, 0.5),
        "flawed_rate": flawed,
        "invalid_rate": _wave(rng, k, n, 0.2, 0.04, 0.01),
        "flawed_kinds": {
            f"{kind}{text}": flawed * part
            for kind, part in zip(KINDS, (0.4, 0.3, 0.2, 0.1), strict=True)
        },
        "advantage_good": _wave(rng, k, n, 0.05, 0.16, 0.02),
        "advantage_flawed": _wave(rng, k, n, -0.05, -0.22, 0.02),
        "policy_loss": rng.gauss(-0.01, 0.01),
        "kl": _wave(rng, k, n, 0, 0.06, 0.003),
        "entropy": _wave(rng, k, n, 1.3, 0.7, 0.03),
        "clip_fraction": abs(rng.gauss(0.04, 0.01)),
        "grad_norm": abs(rng.gauss(0.8, 0.2)),
        "ratio_max": 1 + abs(rng.gauss(0.5, 0.2)),
        "groups_kept": rng.randint(5, 8),
        "gcd_loss": _wave(rng, k, n, 0.69, 0.25, 0.02),
        "verdict_accuracy": _wave(rng, k, n, 0.55, 0.88, 0.02),
        "gcd_tokens": 8000 + rng.randint(0, 200),
        "policy_tokens": 42000 - 150 * k + rng.randint(0, 900),
        "gcd_weight": 0.5,
        "episodes_lost": 0,
        "env_steps": 900 - k,
        "seconds_rollout": abs(rng.gauss(20, 1)),
        "seconds_update": abs(rng.gauss(9, 0.5)),
        "seconds_gcd": abs(rng.gauss(3, 0.2)),
        "outcome_by_task": {f"{task}{text}": rng.random() for task in TASKS},
    }


def evaluation_row(
    rng: random.Random, step: int, name: str, phase: str, rate: float, text: str = ""
) -> dict[str, Any]:
    tasks = {
        f"{task}{text}": {
            "episodes": 4 + 6 * i,
            "outcome_mean": min(1, rate + 0.1),
            "success_rate": min(1.0, max(0.0, round(rate + rng.gauss(0, 0.2), 2))),
        }
        for i, task in enumerate(TASKS)
    }
    return {
        "stage": "evaluate",
        "step": step,
        "set": name,
        "phase": phase,
        "episodes": 64,
        "outcome_mean": rate + 0.1,
        "success_rate": rate,
        "outcome_interval": [rate, min(1, rate + 0.2)],
        "success_interval": [max(0, rate - 0.1), min(1, rate + 0.1)],
        "by_task": tasks,
    }


def write_run(
    path: Path, name: str = "boil water", text: str = "", iterations: int = 60,
    seed: int = 0, lift: float = 0.0, **recipe: Any,
) -> Path:  # fmt: skip
    (path / "episodes").mkdir(parents=True)
    rng = random.Random(seed)
    tree = {"name": "r", "seed": seed, "rl": {"iterations": iterations}, **recipe}
    (path / "recipe.yaml").write_text(make_recipe(tree).to_yaml() + f"# {text}\n")
    info = {
        "name": name + text, "untwine": "0.1.0", "torch": "2.13.0", "python": "3.11.9",
        "platform": "Linux-6.1-x86_64", "started": "2025-01-05T10:11:12Z", "seed": seed,
        "command": f"untwine train recipes/smoke.yaml {text}".strip(),
        "model_parameters": 2_120_000, "status": "finished",
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(info))
    rows: list[dict[str, Any]] = [
        {"stage": "cold_start", "step": k, "loss": 2 * math.exp(-k / 40) + 0.3,
         "verdict_accuracy": 0.5 + k / 400, "seconds": 0.4}
        for k in range(0, 120, 2)
    ]  # fmt: skip
    rows += [rl_row(rng, k, iterations, text) for k in range(iterations)]
    for step in range(0, iterations + 1, max(1, iterations // 4)):
        for name_of_set, rate in (("L0", 0.4), ("L1", 0.28)):
            phase = "rl" if step else "cold_start"
            value = 0.12 + (rate + lift - 0.12) * step / iterations
            rows.append(evaluation_row(rng, step, name_of_set + text, phase, value, text))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for iteration in range(0, iterations, 10):
        file = path / "episodes" / f"iter-{iteration:06d}.jsonl.gz"
        write_groups(file, make_groups(iteration, text=text, seed=seed))
    return path
