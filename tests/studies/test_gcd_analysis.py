"""The analysis of the study on made-up sweeps whose answers are known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.compare.finished_runs import row, write_run

FOLDER = Path(__file__).parents[2] / "studies" / "gcd"
NOISE = [-0.01, 0.01, 0.0, -0.005, 0.005, 0.0]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gcd_{name}", FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"gcd_{name}"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def analysis() -> ModuleType:
    return script("analysis")


def evaluated(success: float, flawed: float) -> list[dict[str, Any]]:
    return [row({"a": success}, name=name) | {"flawed_rate": flawed} for name in ("L0", "L1")]


def look(run: Path, name: str, numbers: dict[str, Any]) -> None:
    (run / "looks").mkdir(exist_ok=True)
    (run / "looks" / f"{name}.json").write_text(json.dumps(numbers))


def sweep(
    out: Path,
    *,
    gain: float = 0.1,
    accuracy: float = 0.9,
    lift: float = 0.2,
    fall: float = 0.1,
    seeds: int = 6,
) -> Path:
    """Six pairs: GRPO succeeds in .5 of the episodes, GCD in `gain` more; the cold start makes .3
    flawed steps, GRPO `fall` fewer; cosines are .4 and .1, mean advantages of flawed steps -.2."""
    entries = []
    for seed in range(seeds):
        noise = NOISE[seed]
        arms = {
            "cold start": (evaluated(0.3, 0.3), 0),
            "wrong.grpo": (evaluated(0.5, 0.3 - fall + noise), 2),
            "wrong.gcd-ce": (evaluated(0.5 + gain + noise, 0.1), 2),
        }
        for arm, (rows, iterations) in arms.items():
            folder = f"{arm.replace(' ', '-')}/seed-{seed}"
            run = write_run(out / folder, rows, start=seed, seed=seed, iterations=iterations)
            entries.append({"folder": folder, "arm": arm, "seed": seed})
            cosine = 0.4 if arm == "wrong.grpo" else 0.1
            cosines = [
                {"kind": "good-flawed", "relation": "other", "pairs": 3, "mean": cosine + noise},
                {"kind": "good-flawed", "relation": "same state", "pairs": 9, "mean": -1.0},
                {"kind": "good-good", "relation": "other", "pairs": 9, "mean": 1.0},
            ]
            rate = {"share": 0.5 + lift + noise, "null": 0.5}
            look(run, "coupling-after", {"cosines": cosines})
            look(run, "coupling-before", {"mean_push": {"rates": {"pi > 0.5": rate}}})
            judged = {"by_episode": {"flawed_mean": {"value": -0.2 + noise}}}
            look(run, "calibration", {"methods": {"grpo": {"all": judged}}})
            if arm == "wrong.gcd-ce":
                learnt = {"stage": "rl", "step": 2, "verdict_accuracy": accuracy}
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(learnt) + "\n")
    (out / "sweep.json").write_text(json.dumps({"runs": entries}))
    return out


def verdicts(claims: list[Any]) -> list[str]:
    return [claim.verdict for claim in claims]


def test_what_was_put_in_is_found(analysis: ModuleType, tmp_path: Path) -> None:
    claims = analysis.claims_of(sweep(tmp_path / "s"))
    assert [c.value for c in claims] == pytest.approx([0.2, 0.1, 0.2, 0.3, 0.1])
    assert verdicts(claims) == ["reproduced"] * 5
    assert {c.runs for c in claims} == {6}
    # differences .09 .11 .10 .095 .105 .10: deviation .0070711, t(5) = 2.5706
    assert claims[4].interval == pytest.approx((0.1 - 0.0074206, 0.1 + 0.0074206), abs=1e-6)


def test_nothing_there_is_not_reproduced(analysis: ModuleType, tmp_path: Path) -> None:
    claims = analysis.claims_of(sweep(tmp_path / "s", gain=0.0, lift=0.0, fall=-0.05))
    expected = ["not reproduced", "not reproduced", "reproduced", "not reproduced"]
    assert verdicts(claims)[1:] == expected


def test_a_null_needs_verdicts_that_were_learnt(analysis: ModuleType, tmp_path: Path) -> None:
    claims = analysis.claims_of(sweep(tmp_path / "s", gain=0.0, accuracy=0.8))
    assert verdicts(claims)[3:] == ["reproduced", "undecided"]


def test_few_runs_and_no_runs_decide_nothing(analysis: ModuleType, tmp_path: Path) -> None:
    few = analysis.claims_of(sweep(tmp_path / "few", seeds=4))
    assert verdicts(few) == ["undecided"] * 5
    none = analysis.claims_of(tmp_path / "few", "short")
    assert [(c.runs, c.verdict) for c in none] == [(0, "undecided")] * 5


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.01, 0.05), "reproduced"),
        ((0.01, 0.02), "not reproduced"),
        ((-0.01, 0.02), "not reproduced"),
        ((-0.01, 0.04), "undecided"),
        (None, "undecided"),
    ],
)
def test_the_registered_rule(
    analysis: ModuleType, interval: tuple[float, float] | None, verdict: str
) -> None:
    assert analysis.verdict_of(16, interval, 0.03) == verdict


def test_the_command_writes_table_and_figure(
    analysis: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "claims"
    arguments = ["analysis.py", str(sweep(tmp_path / "s")), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--levels", "wrong"])
    analysis.main()
    written = json.loads((out / "claims.json").read_text())
    assert [c["verdict"] for c in written["claims"]] == ["reproduced"] * 5
    assert (out / "claims.svg").read_text().count("<path") > 5
    assert "| 4b GCD raises held-out success | wrong | 6 | +0.100 [" in capsys.readouterr().out


def test_pictures_show_the_pairs_and_the_course(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = script("pictures")
    made = sweep(tmp_path / "s")
    found = pictures.find_runs([made])
    assert pictures.differences(found, "wrong", "L1") == pytest.approx([0.1 + n for n in NOISE])
    assert pictures.differences(found, "short", "L1") == []
    runs = found.arms["wrong.gcd-ce"]
    first = [float(run.data.rl[0]["policy_tokens"]) for run in runs]
    assert pictures.course(runs, "policy_tokens")[0] == first
    assert pictures.course(runs, "no such metric") == []
    monkeypatch.setattr(pictures, "SETS", ["L0", "L1"])
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(made), "--out", str(tmp_path)])
    pictures.main()
    for name in ("pairs", "course"):
        assert "<path" in (tmp_path / f"study-{name}.svg").read_text()
