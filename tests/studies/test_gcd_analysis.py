"""The analysis of the study on made-up sweeps whose answers are known."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.compare.finished_runs import row, write_run
from untwine.compare.runs import find_runs
from untwine.errors import UntwineError
from untwine.evaluate.identity import model_digest

FOLDER = Path(__file__).parents[2] / "studies" / "gcd"
NOISE = [-0.01, 0.01, 0.0, -0.005, 0.005, 0.0]


def script(name: str) -> ModuleType:
    """As if it were run: what lies beside it can be imported."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def analysis() -> ModuleType:
    return script("analysis")


def evaluated(
    success: float, flawed: float, sets: Sequence[str] = ("L0", "L1"), episodes: int = 8
) -> list[dict[str, Any]]:
    return [
        row({"a": success}, name=name, episodes=episodes) | {"flawed_rate": flawed} for name in sets
    ]


def look(run: Path, name: str, numbers: dict[str, Any]) -> None:
    (run / "looks").mkdir(exist_ok=True)
    (run / "looks" / f"{name}.json").write_text(json.dumps(numbers))


def sweep(
    out: Path,
    *,
    gain: float = 0.1,
    accuracy: Sequence[float] = (0.9,),
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
                with (run / "metrics.jsonl").open("a") as file:
                    for step, value in enumerate(accuracy, 2):
                        learnt = {"stage": "rl", "step": step, "verdict_accuracy": value}
                        file.write(json.dumps(learnt) + "\n")
    (out / "sweep.json").write_text(json.dumps({"runs": entries}))
    return out


def join(sweep: Path, arm: str, rows: list[dict[str, Any]], tokens: int = 0, **run: Any) -> None:
    """One more run of an arm, which used so many more tokens."""
    made = write_run(sweep / arm / f"seed-{run.get('seed', 0)}", rows, **run)
    with (made / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "rl", "step": 2, "policy_tokens": tokens}) + "\n")
    tree = json.loads((sweep / "sweep.json").read_text())
    entry = {"folder": str(made.relative_to(sweep)), "arm": arm, "seed": run.get("seed", 0)}
    (sweep / "sweep.json").write_text(json.dumps({"runs": [*tree["runs"], entry]}))


def evaluate(run: Path, rows: list[dict[str, Any]]) -> None:
    """What `untwine evaluate` found since."""
    weights = model_digest(run / "model")
    text = "".join(json.dumps(row | {"weights": weights}) + "\n" for row in rows)
    (run / "evaluations.jsonl").write_text(text)


def claims_of(analysis: ModuleType, sweep: Path, level: str = "wrong") -> list[Any]:
    found: list[Any] = analysis.claims_of(find_runs([sweep]), level)
    return found


def verdicts(claims: list[Any]) -> list[str]:
    return [claim.verdict for claim in claims]


def test_what_was_put_in_is_found(analysis: ModuleType, tmp_path: Path) -> None:
    claims = claims_of(analysis, sweep(tmp_path / "s"))
    assert [c.value for c in claims] == pytest.approx([0.2, 0.1, 0.2, 0.3, 0.1])
    assert verdicts(claims) == ["reproduced"] * 5
    assert {c.runs for c in claims} == {6}
    # differences .09 .11 .10 .095 .105 .10: deviation .0070711, t(5) = 2.5706
    assert claims[4].interval == pytest.approx((0.1 - 0.0074206, 0.1 + 0.0074206), abs=1e-6)


def test_nothing_there_is_not_reproduced(analysis: ModuleType, tmp_path: Path) -> None:
    claims = claims_of(analysis, sweep(tmp_path / "s", gain=0.0, lift=0.0, fall=-0.05))
    expected = ["not reproduced", "not reproduced", "reproduced", "not reproduced"]
    assert verdicts(claims)[1:] == expected


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        ((0.8,), "undecided"),
        ((0.2, 0.2, 0.2) + (0.9,) * 10, "not reproduced"),
        ((1.0, 1.0, 1.0) + (0.8,) * 10, "undecided"),
        ((0.0, 1.0) + (0.84,) * 9, "not reproduced"),  # .856; too low over nine, and over eleven
    ],
)
def test_a_null_needs_verdicts_that_were_learnt_by_the_last_ten_iterations(
    analysis: ModuleType, tmp_path: Path, accuracy: Sequence[float], verdict: str
) -> None:
    claims = claims_of(analysis, sweep(tmp_path / "s", gain=0.0, accuracy=accuracy))
    assert verdicts(claims)[3:] == ["reproduced", verdict]


def test_few_runs_and_no_runs_decide_nothing(analysis: ModuleType, tmp_path: Path) -> None:
    few = claims_of(analysis, sweep(tmp_path / "few", seeds=4))
    assert verdicts(few) == ["undecided"] * 5
    none = claims_of(analysis, tmp_path / "few", "short")
    assert [(c.runs, c.verdict) for c in none] == [(0, "undecided")] * 5


def test_an_arm_that_lacks_a_set_changes_nothing_for_the_others(
    analysis: ModuleType, tmp_path: Path
) -> None:
    made = sweep(tmp_path / "s")
    join(made, "wrong.head", evaluated(0.5, 0.2, ["L0"]), gcd={"objective": "head"})
    claims = claims_of(analysis, made)
    assert verdicts(claims) == ["reproduced"] * 5
    assert (claims[4].runs, claims[4].lacking) == (6, [])


def test_why_the_primary_claim_has_no_pairs_is_said(analysis: ModuleType, tmp_path: Path) -> None:
    made = sweep(tmp_path / "s")
    join(made, "wrong.gcd-ce", evaluated(0.6, 0.1, ["L0"]), seed=9, start=9)
    join(made, "wrong.grpo", evaluated(0.5, 0.2), seed=9, start=9)
    claim = claims_of(analysis, made)[4]
    assert (claim.runs, claim.verdict) == (0, "undecided")
    assert claim.lacking == [f"{made / 'wrong.gcd-ce' / 'seed-9'} was not evaluated on L1"]
    assert "Claim 4b at wrong: " in analysis.remarks(find_runs([made]), "wrong", [claim])[-1]


def test_flawed_steps_are_compared_on_equal_sets_only(analysis: ModuleType, tmp_path: Path) -> None:
    """A later look at more episodes is no measure of the fall, until both were looked at so."""
    made = sweep(tmp_path / "s")
    cold, grpo = made / "cold-start" / "seed-0", made / "wrong.grpo" / "seed-0"
    evaluate(grpo, evaluated(0.5, 0.9, ["L0"], episodes=16))
    claim = claims_of(analysis, made)[1]
    assert (claim.runs, claim.value, claim.lacking) == (6, pytest.approx(0.1), [])
    evaluate(cold, evaluated(0.5, 0.4, ["L0"], episodes=16))
    # five falls of .1, with their noise (the first had .01), and one of .4 - .9
    assert claims_of(analysis, made)[1].value == pytest.approx((0.6 - 0.11 - 0.5) / 6)


def test_a_cold_start_on_another_set_is_left_out_with_a_reason(
    analysis: ModuleType, tmp_path: Path
) -> None:
    made = sweep(tmp_path / "s", seeds=5)
    join(made, "wrong.grpo", evaluated(0.5, 0.2), seed=7, start=7)
    join(made, "cold start", evaluated(0.5, 0.2, episodes=16), seed=7, start=7, iterations=0)
    join(made, "wrong.grpo", evaluated(0.5, 0.2), seed=8, start=8)
    claim = claims_of(analysis, made)[1]
    assert claim.runs == 5
    other, none = claim.lacking
    assert "the evaluation sets differ" in other
    assert "seed-8 has no cold start" in none


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (("reproduced", "reproduced"), "reproduced"),
        (("reproduced", "undecided"), "undecided"),
        (("reproduced", "not reproduced"), "not reproduced"),
        (("undecided", "not reproduced"), "not reproduced"),
    ],
)
def test_claim_4_needs_both_parts(analysis: ModuleType, parts: tuple[str, str], whole: str) -> None:
    names = ("1 a", "4a b", "4b c")
    claims = [
        analysis.Claim(name, "wrong", 6, 0.1, (0.0, 0.2), 0.0, verdict)
        for name, verdict in zip(names, ("reproduced", *parts), strict=True)
    ]
    assert analysis.claim_4(claims) == whole


def test_unequal_tokens_make_a_comparison_explored_only(
    analysis: ModuleType, tmp_path: Path
) -> None:
    made = sweep(tmp_path / "s")
    join(made, "short.grpo", evaluated(0.5, 0.2), tokens=0, name="a")
    join(made, "short.gcd-ce", evaluated(0.5, 0.2), tokens=2, name="b")
    join(made, "full.grpo", evaluated(0.5, 0.2), tokens=0, name="c")
    join(made, "full.gcd-ce", evaluated(0.5, 0.2), tokens=4, name="d")
    join(made, "short.other", evaluated(0.5, 0.2), tokens=9, name="e")
    found = find_runs([made])
    spread = {level: analysis.token_spread(analysis.tokens_of(found, level))
              for level in ("wrong", "short", "full")}  # fmt: skip
    assert spread == pytest.approx({"wrong": 0.0, "short": 2 / 30, "full": 4 / 30})
    said = {level: " ".join(analysis.remarks(found, level, [])) for level in spread}
    assert "differ by 13.3 % between grpo and gcd-ce at full" in said["full"]
    assert "(full.grpo used fewest, full.gcd-ce most)" in said["full"]
    assert ["explored only" in said[level] for level in spread] == [False, False, True]


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
    printed = capsys.readouterr().out
    assert "| 4b GCD raises held-out success | wrong | 6 | +0.100 [" in printed
    assert "Claim 4 at wrong: reproduced. It is reproduced when both of its parts are." in printed
    assert "Tokens of updates differ by 0.0 % between grpo and gcd-ce at wrong." in printed
    assert written["claim_4"] == {"wrong": "reproduced"}
    assert written["token_spread"] == {"wrong": 0.0}


def refusal(analysis: ModuleType, patch: pytest.MonkeyPatch, sweep: Path, *more: str) -> str:
    out = str(sweep.parent / "claims")
    patch.setattr(sys, "argv", ["analysis.py", str(sweep), "--out", out, *more])
    with pytest.raises(UntwineError) as caught:
        analysis.main()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_read_is_said(
    analysis: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nowhere is not the folder of a sweep" in refusal(
        analysis, monkeypatch, tmp_path / "nowhere"
    )
    made = sweep(tmp_path / "s")
    unknown = refusal(analysis, monkeypatch, made, "--levels", "wrnog")
    assert unknown == "the sweep has no level 'wrnog', but wrong. Did you mean 'wrong'?"
    for torn in ('{"cosines": [', "[]"):
        file = made / "wrong.grpo" / "seed-3" / "looks" / "coupling-after.json"
        file.write_text(torn)
        assert str(file) in refusal(analysis, monkeypatch, made)


def test_pictures_show_the_pairs_and_the_course(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = script("pictures")
    made = sweep(tmp_path / "s")
    found = pictures.find_runs([made])
    assert pictures.differences(found, "wrong", "gcd-ce", "L1") == pytest.approx(
        [0.1 + n for n in NOISE]
    )
    assert pictures.differences(found, "short", "gcd-ce", "L1") == []
    runs = found.arms["wrong.gcd-ce"]
    first = [float(run.data.rl[0]["policy_tokens"]) for run in runs]
    assert pictures.course(runs, "policy_tokens")[0] == first
    assert pictures.course(runs, "no such metric") == []
    argv = ["pictures.py", str(made), "--out", str(tmp_path), "--sets", "L0,L1"]
    monkeypatch.setattr(sys, "argv", argv)
    pictures.main()
    for name in ("pairs", "course"):
        assert "<path" in (tmp_path / f"study-{name}.svg").read_text()


def test_claim_4_may_be_about_another_arm(analysis: ModuleType, tmp_path: Path) -> None:
    made = sweep(tmp_path / "s")
    for seed in range(6):
        join(made, "wrong.head", evaluated(0.45, 0.2), seed=seed, start=seed, name="head")
    claims = analysis.claims_of(find_runs([made]), "wrong", "head")
    assert (claims[4].runs, claims[4].value) == (6, pytest.approx(-0.05, abs=0.02))
    none = analysis.claims_of(find_runs([made]), "wrong", "gcd-rl")[4]
    assert none.lacking == [
        "no finished runs of gcd-rl and grpo have seed and cold start in common"
    ]


def test_worth_is_averaged_over_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three runs, one of which calls nothing good."""
    worth = script("worth")
    made = sweep(tmp_path / "s")
    arguments = ["worth.py", str(made), "--arm", "wrong.grpo", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(UntwineError, match=r"'wrong.grpo' .* has measured labels"):
        worth.main()
    for seed, (flawed, good) in enumerate([(-0.1, 0.3), (0.0, 0.5), (-0.2, None)]):
        folder = made / "wrong.grpo" / f"seed-{seed}" / "diagnose"
        folder.mkdir()
        means = {
            "flawed_mean": {"value": flawed},
            "good_mean": None if good is None else {"value": good},
            "difference": None,
        }
        (folder / "labels.json").write_text(json.dumps({"sources": {"rule": {"worth": means}}}))
    worth.main()
    rule = json.loads((tmp_path / "out" / "worth.json").read_text())["rule"]
    assert set(rule) == {"flawed_mean", "good_mean"}
    assert rule["good_mean"]["mean"] == pytest.approx(0.4)
    # standard error .1 / sqrt(3), Student's 97.5 % quantile with 2 degrees of freedom 4.3027
    assert rule["flawed_mean"]["interval"] == pytest.approx(
        [-0.1 - 0.2484, -0.1 + 0.2484], abs=1e-4
    )
    assert "| rule | flawed | 3 | -0.100 [" in capsys.readouterr().out


def test_every_arm_is_compared_with_the_plain_one_of_its_cold_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`head` begins where `grpo` does, `correction` where `grpo-told-start` does."""
    secondary = script("secondary")
    made = sweep(tmp_path / "s", accuracy=(0.9, 0.7))
    for seed in range(3):
        arms = {
            "head": (0.4, seed),
            "correction": (0.7, 50 + seed),
            "grpo-told-start": (0.6, 50 + seed),
        }
        for arm, (success, start) in arms.items():
            objective = "none" if arm != "head" else "head"
            join(
                made, f"wrong.{arm}", evaluated(success, 0.25), seed=seed, start=start,
                gcd={"objective": objective}, name=arm,
            )  # fmt: skip
    lines = {line.arm: line for line in secondary.lines_of(secondary.find_runs([made]))}
    assert {arm: (line.plain, line.pairs) for arm, line in lines.items()} == {
        "wrong.gcd-ce": ("wrong.grpo", 6),
        "wrong.head": ("wrong.grpo", 3),
        "wrong.correction": ("wrong.grpo-told-start", 3),
    }
    gcd, head = lines["wrong.gcd-ce"], lines["wrong.head"]
    assert gcd.differences["success L1"].mean == pytest.approx(0.1)
    assert gcd.differences["success L1"].interval == pytest.approx((0.0925794, 0.1074206), abs=1e-6)
    assert gcd.differences["cosine"].mean == pytest.approx(-0.3)
    assert gcd.verdict_accuracy == pytest.approx(0.8)
    assert head.differences["success L0"].mean == pytest.approx(-0.1)
    assert head.differences["flawed L1"].mean == pytest.approx(0.05, abs=0.01)
    assert head.differences["cosine"] is None
    assert (head.values["success L0"], head.values["cosine"]) == (
        [(seed, pytest.approx(0.4), pytest.approx(0.5)) for seed in range(3)],
        [],
    )
    assert lines["wrong.correction"].differences["success L1"].mean == pytest.approx(0.1)

    monkeypatch.setattr(sys, "argv", ["secondary.py", str(made), "--out", str(tmp_path / "out")])
    secondary.main()
    assert "| wrong.gcd-ce | grpo | 6 | +0.100 [+0.093, +0.107] |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "secondary.json").read_text())) == 3
    assert (tmp_path / "out" / "secondary.svg").read_text().count("<path") > 5


def test_the_headline_draws_the_pairs_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headline = script("headline")
    file = tmp_path / "some.json"
    file.write_text(
        json.dumps([{"arm": "a", "values": {"success L1": [[0, 0.5, 0.25], [3, 0.75, 1.0]]}}])
    )
    assert headline.values_of(file, "a", "success L1") == ([0.5, 0.75], [0.25, 1.0])
    with pytest.raises(UntwineError, match="has no flawed L1 of the arm a"):
        headline.values_of(file, "a", "flawed L1")
    out = tmp_path / "out.svg"
    monkeypatch.setattr(sys, "argv", ["headline.py", "--out", str(out)])
    headline.main()
    assert out.read_text().count("<use") >= 2 * 5 * 16  # a dot for each pair


def test_looks_before_and_after_worked_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, only GRPO's run is looked at; it began with the weights of GCD's."""
    looks = script("looks")
    made = sweep(tmp_path / "s", seeds=2)
    for arm, margin in (("grpo", 0.5), ("gcd-ce", 0.9)):
        for seed in range(2):
            run = made / f"wrong.{arm}" / f"seed-{seed}"
            layers = [
                {"margin": 9.0, "margin_shuffled": 0.0, "balanced": 1.0},
                {"margin": margin + 0.1 * seed, "margin_shuffled": 0.3, "balanced": margin},
            ]
            look(run, "separation-after", {"layers": layers})
            if arm == "grpo":
                look(run, "separation-before", {"layers": layers[:1]})
            rates = {"all": {"share": 0.25, "null": 0.5 if arm == "grpo" else None}}
            cosines = [
                {"kind": "good-flawed", "relation": "other", "pairs": pairs, "mean": mean}
                for pairs, mean in ((1, 0.8), (3, 0.0), (0, None))
            ]
            when = "before" if arm == "grpo" else "after"
            look(run, f"coupling-{when}", {"cosines": cosines, "mean_push": {"rates": rates}})
    found = looks.looks_of(find_runs([made]))
    assert list(found) == ["wrong.grpo", "wrong.gcd-ce"]
    grpo, gcd = found["wrong.grpo"], found["wrong.gcd-ce"]
    assert grpo["cosine"]["before"]["values"] == pytest.approx([0.2, 0.2])
    assert grpo["cosine"]["after"]["values"] == pytest.approx([0.39, 0.41])
    assert (grpo["cosine"]["minus"], gcd["beside"]) == (None, "wrong.grpo")
    assert gcd["cosine"]["minus"]["values"] == pytest.approx([-0.19, -0.21])
    assert (gcd["lifted"]["before"]["mean"], gcd["lifted"]["after"]) == (-0.25, None)
    assert gcd["apart"]["before"]["values"] == [9.0, 9.0]
    assert gcd["apart"]["after"]["values"] == pytest.approx([0.6, 0.7])
    assert gcd["apart"]["minus"]["mean"] == pytest.approx(0.4)
    assert gcd["probe"]["minus"]["mean"] == pytest.approx(0.4)

    monkeypatch.setattr(sys, "argv", ["looks.py", str(made), "--out", str(tmp_path / "out")])
    looks.main()
    assert "| wrong.gcd-ce | 2 | 0.200 | 0.200 | -0.200 [" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "looks.json").read_text()).keys() == found.keys()


def test_rows_of_runs_are_averaged_and_tabled() -> None:
    """Values 1 and 3: mean 2, Student's interval 2 +- 12.706 with one degree of freedom."""
    analysis = script("analysis")
    runs = [{"a": {"x": 1.0, "y": 0.0}}, {"a": {"x": 3.0, "y": 0.0}}]
    found = analysis.over_runs(runs, ["x"])
    assert found["a"]["x"]["values"] == [1.0, 3.0]
    assert found["a"]["x"]["mean"] == 2.0
    assert found["a"]["x"]["interval"] == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    assert analysis.summary_table("Row", found).split("\n") == [
        "| Row | x |", "|---|---|", "| a | +2.000 [-10.706, +14.706] |",
    ]  # fmt: skip
