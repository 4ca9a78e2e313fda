"""The microscope in the report: what is read, what is said of it, and how it is cut to size."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from synthetic_microscope import (
    calibration,
    judging,
    last_file,
    steps_of,
    write_coupling,
    write_json,
    write_microscope,
    write_truth_of,
)
from synthetic_runs import HOSTILE
from test_report import Page, page_of

from untwine.errors import UntwineError
from untwine.report import build_report, report_numbers
from untwine.report.microscope_view import Limits
from untwine.report.shape import Misshapen, each, maybe, shaped

MakeRun = Callable[..., Path]


@pytest.fixture
def measured(make_run: MakeRun) -> Path:
    return write_microscope(make_run(iterations=21))


def microscope(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = report_numbers([run])["runs"][0]["microscope"]
    return found


# --- reading -----------------------------------------------------------------------------------


def test_json_gives_what_the_files_hold(measured: Path) -> None:
    found = microscope(measured)
    assert (found["missing"], found["problems"]) == ([], [])
    files = {
        name: json.loads((measured / "diagnose" / f"{name}.json").read_text())
        for name in ("labels", "calibration", "coupling", "judging", "separation")
    }
    ours = found["calibration"]["methods"]["grpo"]
    theirs = files["calibration"]["methods"]["grpo"]
    assert ours["all"] == theirs["all"]
    assert ours["lemma"] == theirs["lemma"]
    for name, theirs in files["labels"]["sources"].items():
        ours = dict(found["labels"]["sources"][name])
        assert ours == {
            key: theirs[key] for key in ("coverage", "accuracy", "flawed", "good", "worth")
        }
    for key in (
        "offenders", "cosines", "sample_list", "reinforced", "lifts", "credits", "head_correlation",
    ):  # fmt: skip
        assert found["coupling"][key] == files["coupling"][key]
    for key in ("policy", "verdict", "permuted", "questions", "right_verdicts"):
        assert found["judging"][key] == files["judging"][key]
    assert found["separation"]["layers"] == files["separation"]["layers"]
    lines = (measured / "diagnose" / "truth-iter-000020.jsonl").read_text().splitlines()
    assert [row["advantage"] for row in found["truth"][0]["rows"]] == [
        json.loads(line)["advantage"] for line in lines[1:]
    ]


def test_arrays_beside_the_numbers(measured: Path) -> None:
    """Cosines of the Gram by the textbook, and the maps as they lie there."""
    found = microscope(measured)
    gram_NN = load_file(measured / "diagnose" / "coupling.safetensors")["K_NN"].tolist()
    rows = found["coupling"]["cosine_rows"]
    assert [len(row) for row in rows] == list(range(1, len(gram_NN) + 1))
    for i, row in enumerate(rows):
        for j, cosine in enumerate(row):
            right = gram_NN[i][j] / math.sqrt(gram_NN[i][i] * gram_NN[j][j])
            assert cosine == pytest.approx(right, abs=5.1e-5)
    maps = load_file(measured / "diagnose" / "separation.safetensors")["maps_SN2"]
    assert np.allclose(found["separation"]["maps"], maps, atol=1e-5)
    verdicts = [found["coupling"]["sample_list"][i]["verdict"] for i in found["coupling"]["order"]]
    assert verdicts == sorted(verdicts, key=["good", "flawed", None].index)


def test_key_numbers_stand_for_the_rest(measured: Path) -> None:
    key = microscope(measured)["key_numbers"]
    steps = len(steps_of(last_file(measured)[1])[::3])
    assert (key["truth"]["steps"], key["truth"]["flawed"]) == (steps, math.ceil(steps / 3))
    assert key["credit"]["flawed_mean"]["value"] == -0.35
    assert key["reinforced"]["meaning"] == "labelled flawed"
    assert key["reinforced"]["share"] == 0.625
    assert (key["mean_push"]["batches"], key["honesty"]["slope"]) == (3, 1.01)
    assert key["judging"] == {"verdict": 0.1875, "permuted": [-0.09375, 0.0625], "policy": 0.5}
    assert (key["probe"]["layer"], key["probe"]["balanced"]) == (2, pytest.approx(0.7))


def test_what_is_missing_names_its_command(tmp_path: Path, make_run: MakeRun) -> None:
    bare, partly = make_run("bare run", iterations=3), make_run("partly", iterations=3)
    write_truth_of(partly)
    assert [gap["topic"] for gap in microscope(bare)["missing"]] == [
        "truth", "labels", "calibration", "coupling", "judging", "separation",
    ]  # fmt: skip
    page = page_of(tmp_path, bare).text
    assert f"untwine diagnose coupling '{bare}'" in page
    assert "Nothing was measured yet" in page
    page = page_of(tmp_path, partly).text
    for topic in ("labels", "calibration", "coupling", "judging", "separation"):
        assert f"not measured: untwine diagnose {topic} {partly}" in page
    assert f"untwine diagnose truth {partly}" not in page


def damage(run: Path, what: str) -> None:
    folder = run / "diagnose"
    coupling = json.loads((folder / "coupling.json").read_text())
    if what == "torn":
        (folder / "coupling.json").write_text('{"format": "untwine-coupling-1", "iter')
    elif what == "format":
        (folder / "coupling.json").write_text(json.dumps({**coupling, "format": "other"}))
    elif what == "a word for a number":
        coupling["sample_list"][0]["delta"] = "<img src=x onerror=alert(1)>"
        (folder / "coupling.json").write_text(json.dumps(coupling))
    elif what == "a list for an object":
        (folder / "coupling.json").write_text("[[[[1]]]]")
    elif what == "other arrays":
        save_file({"K_NN": np.eye(3)}, folder / "coupling.safetensors")
    elif what == "damaged arrays":
        (folder / "coupling.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    elif what == "no such array":
        save_file({"other": np.eye(3)}, folder / "coupling.safetensors")


@pytest.mark.parametrize(
    "what",
    [
        "torn", "format", "a word for a number", "a list for an object", "other arrays",
        "damaged arrays", "no such array",
    ],
)  # fmt: skip
def test_a_damaged_file_is_left_out_and_named(tmp_path: Path, measured: Path, what: str) -> None:
    damage(measured, what)
    found = microscope(measured)
    assert found["coupling"] is None
    assert [gap["topic"] for gap in found["missing"]] == ["coupling"]
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith("diagnose/coupling.json was left out: ")
    page = page_of(tmp_path, measured)
    assert "diagnose/coupling.json was left out" in page.text
    assert not any("push" in step for e in page.data["episodes"] for step in e["steps"])


def test_without_arrays_only_their_plots_are_missing(tmp_path: Path, measured: Path) -> None:
    for name in ("coupling", "separation"):
        (measured / "diagnose" / f"{name}.safetensors").unlink()
    found = page_of(tmp_path, measured).data["runs"][0]["microscope"]
    assert found["coupling"]["heat"] is None
    assert len(found["coupling"]["points"]) == 24
    assert found["separation"]["maps"] is None


def test_truth_of_other_episodes_is_refused(tmp_path: Path, measured: Path) -> None:
    file = measured / "diagnose" / "truth-iter-000020.jsonl"
    head, *rows = file.read_text().splitlines()
    changed = {**json.loads(head), "episodes_sha256": "0" * 64}
    file.write_text("\n".join([json.dumps(changed), *rows]))
    (measured / "diagnose" / "truth-iter-000004.jsonl").touch()
    found = microscope(measured)
    assert found["truth"] == []
    assert "judges episodes that are not there" in found["problems"][0]
    assert "judges other episodes" in found["problems"][1]
    assert "judges other episodes" in page_of(tmp_path, measured).text


SHAPE = {"a": float, "b": maybe(int), "c": [str], "d": each(bool)}


def test_shapes() -> None:
    value = {"a": 1, "b": None, "c": ["x"], "d": {"k": True}, "more": 1}
    assert shaped(value, SHAPE) == {"a": 1.0, "b": None, "c": ["x"], "d": {"k": True}}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"a": "1"}, "a is not a number"), ({"a": True}, "a is not a number"),
        ({"a": math.nan}, "a is not a number"), ({"b": "x"}, "b is not a number"),
        ({"c": "x"}, "c is not a list"), ({"c": [1]}, r"c\[0\] is not str"),
        ({"d": []}, "d is not an object"), ({"d": {"k": 1}}, "d.k is not bool"),
    ]  # fmt: skip
    for change, message in wrong:
        with pytest.raises(Misshapen, match=message):
            shaped({**value, **change}, SHAPE)
    assert shaped({"x": math.inf}, {"x": maybe(float)}) == {"x": None}


# --- sentences ---------------------------------------------------------------------------------


def test_the_first_sentences_come_from_the_truth(measured: Path) -> None:
    first = report_numbers([measured])["runs"][0]["first_look"]
    steps = len(steps_of(last_file(measured)[1])[::3])
    assert len(first) == 3
    assert first[1].startswith(f"Of {steps} steps judged by branching, {math.ceil(steps / 3)} are")
    assert "grpo gives flawed steps −0.35 [−0.45, −0.25] on average" in first[1]
    assert "points the right way" in first[1]
    assert "positive in 25 % of the flawed ones" in first[1]
    assert first[2] == (
        "Look first at this: 62 % of the flawed samples are pushed up, more than with permuted "
        "weights (40 % [20, 50])."
    )


def test_sentences_claim_only_what_intervals_show(measured: Path) -> None:
    def second(flawed: float) -> str:
        write_json(measured, "calibration", calibration(flawed=flawed))
        return str(report_numbers([measured])["runs"][0]["first_look"][1])

    assert "does not surely tell them apart" in second(0.2)  # good ones have 0.25
    assert "points the wrong way" in second(0.5)


def test_what_cannot_be_trusted_is_said_first(measured: Path) -> None:
    file = measured / "diagnose" / "coupling.json"
    numbers = json.loads(file.read_text())
    numbers["honesty"]["correlation"] = 0.5
    numbers["drift"]["mean"] = 0.4
    file.write_text(json.dumps(numbers))
    third = report_numbers([measured])["runs"][0]["first_look"][2]
    assert "do not come true (correlation with the measured change 0.50)" in third
    assert "another policy" in third


def test_labels_in_place_of_truth_are_called_so(make_run: MakeRun) -> None:
    run = make_run(iterations=3)
    write_json(run, "calibration", {**calibration(), "source": "group", "flawed_by_chance": None})
    first = report_numbers([run])["runs"][0]["first_look"]
    assert first[1].startswith("Grpo, by `group` labels, gives flawed steps")


# --- the page ----------------------------------------------------------------------------------


def test_steps_carry_what_was_measured(tmp_path: Path, measured: Path) -> None:
    iteration, file = last_file(measured)
    everyone = steps_of(file)
    judged = {(e.id, s.index) for _, e, s in everyone[::3]}
    found = microscope(measured)["coupling"]["sample_list"]
    pushed = {(s["episode"], s["step"]): s["coupled"] for s in found}
    seen = 0
    for episode in page_of(tmp_path, measured).data["episodes"]:
        for step in episode["steps"]:
            place = (episode["id"], step["index"])
            assert ("truth" in step) == (episode["iteration"] == iteration and place in judged)
            if place in pushed and episode["iteration"] == iteration:
                seen += 1
                assert "push" in step
    assert seen == len(pushed) == 24


def test_equal_steps_share_a_push(tmp_path: Path, measured: Path) -> None:
    """Synthetic steps all have one prompt and one action, so each is the same sample."""
    data = page_of(tmp_path, measured).data
    steps = [s for e in data["episodes"] if e["iteration"] == 20 for s in e["steps"]]
    assert all(("push" in step) == ("advantage" in step) for step in steps)


def test_coupling_of_other_episodes_is_not_joined(tmp_path: Path, measured: Path) -> None:
    file = measured / "diagnose" / "coupling.json"
    numbers = json.loads(file.read_text())
    for sample in numbers["sample_list"]:
        sample["text"] += " other"
    file.write_text(json.dumps(numbers))
    page = page_of(tmp_path, measured)
    assert "was measured on other episodes of iteration 20" in page.text
    assert not any("push" in s for e in page.data["episodes"] for s in e["steps"])


def test_measured_iterations_are_embedded(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(iterations=60)
    write_coupling(run)
    file = run / "diagnose" / "coupling.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "iteration": 10}))
    counts = page_of(tmp_path, run).data["runs"][0]["episodes"]
    assert counts["iterations"] == [0, 10, 20, 50]


def test_the_page_shows_numbers_and_prompts(tmp_path: Path, measured: Path) -> None:
    page = page_of(tmp_path, measured)
    text = " ".join(page.text.split())
    for words in ("−0.35 [−0.45, −0.25]", "0.999 correlation of predicted", "62 % 5 40 % [20, 50]"):
        assert words in text
    assert "Step 10: the pot is on the stovetable." in text  # the diff of steps 1 and 0
    names = [name for name, _ in page.elements]
    assert names.count("del") >= 4
    assert names.count("ins") >= 4


def test_the_page_shows_what_labels_are_worth(tmp_path: Path, measured: Path) -> None:
    """By source: coverage, accuracy, precision and recall of either verdict, mean A*."""
    text = " ".join(page_of(tmp_path, measured).text.split())
    sure, part = "75 % [62, 88] of 12", "38 % [25, 50] of 10"
    worth = "−0.25 [−0.50, 0.00] –"
    assert f"rule50 % [38, 62] of 30{sure}{sure}{part}{sure}–{worth}" in text
    assert f"mine25 % [12, 38] of 30––{part}––{worth}" in text


def test_the_page_shows_what_judging_moves(tmp_path: Path, measured: Path) -> None:
    text = page_of(tmp_path, measured).text
    rows = ("policy loss", "verdict loss", "verdict loss, labels permuted (3 times)")
    table = text[text.index("A step down the") :]
    assert sorted(map(table.index, rows)) == [table.index(row) for row in rows]
    assert "+0.19" in table  # .125 + .0625
    assert "0.00 [−0.06, 0.06]" in table  # good steps with permuted labels: mean, range
    assert "12 questions of generative/ce, 75 % answered right" in text
    (measured / "diagnose" / "coupling.json").unlink()  # which has something more alarming to say
    look = report_numbers([measured])["runs"][0]["first_look"]
    assert (
        "learning to judge helps acting (good minus flawed +0.19, with permuted labels" in look[2]
    )
    strong = {"good": 1.0, "flawed": -1.0, "difference": 2.0}
    write_json(measured, "judging", {**judging(), "policy": strong})  # beside which it is nothing
    look = report_numbers([measured])["runs"][0]["first_look"]
    assert "learning to judge does not move acting (good minus flawed +0.19" in look[2]
    write_json(measured, "judging", {**judging(), "verdict": judging()["permuted"][1]})
    look = report_numbers([measured])["runs"][0]["first_look"]
    assert "learning to judge does not move acting (good minus flawed +0.06" in look[2]
    wrong = {"good": -0.1, "flawed": 0.1, "difference": -0.2}
    write_json(measured, "judging", {**judging(), "verdict": wrong})
    look = report_numbers([measured])["runs"][0]["first_look"]
    assert "learning to judge hurts acting (good minus flawed −0.20" in look[2]


def test_the_page_shows_who_lifts(tmp_path: Path, measured: Path) -> None:
    """Columns all and repeat, in units of the self term of .002."""
    text = " ".join(page_of(tmp_path, measured).text.split())
    lines = "self−1.00 −1.00 ", "same command, rewarded, good+0.50 +0.55 "
    lines += "other, punished, no label+0.25 +0.25 ", "sum−0.25 −0.20 "
    assert text.index("Who lifts") < min(map(text.index, lines))
    file = measured / "diagnose" / "coupling.json"
    numbers = json.loads(file.read_text())
    assert text.index("What other uses of the labels would do") < text.index(
        "veto+0.25 −0.12 +0.38"
    )
    del numbers["lifts"], numbers["credits"]  # measured before they were told
    file.write_text(json.dumps(numbers))
    text = page_of(tmp_path, measured).text
    assert "Who lifts" not in text
    assert "other uses" not in text
    assert "coupling.json was left out" not in text


def test_labels_measured_before_their_worth_was_are_shown(tmp_path: Path, measured: Path) -> None:
    file = measured / "diagnose" / "labels.json"
    numbers = json.loads(file.read_text())
    for source in numbers["sources"].values():
        del source["worth"]
    file.write_text(json.dumps(numbers))
    text = " ".join(page_of(tmp_path, measured).text.split())
    assert "mine25 % [12, 38] of 30––38 % [25, 50] of 10––––" in text


def test_labels_of_an_older_form_are_left_out(tmp_path: Path, measured: Path) -> None:
    file = measured / "diagnose" / "labels.json"
    numbers = json.loads(file.read_text())
    del numbers["format"]
    file.write_text(json.dumps(numbers))
    page = page_of(tmp_path, measured).text
    assert "diagnose/labels.json was left out: its format is not untwine-labels-1." in page
    assert f"Labels were not measured: untwine diagnose labels {measured}" in page


def test_runs_side_by_side(tmp_path: Path, measured: Path, make_run: MakeRun) -> None:
    other = make_run("other", "other", iterations=3)
    text = " ".join(page_of(tmp_path, measured, other).text.split())
    assert "Flawed lifted by one step62 % permuted 40 % [20, 50]–" in text
    assert f"not measured: untwine diagnose coupling {other}" in text


def test_metrics_nobody_named_are_shown(tmp_path: Path) -> None:
    rows = [
        {"stage": "rl", "step": k, "diagnose_gram_rate": 0.1 * k, "probe": {"good": k, "flawed": 1},
         "note": "text", "flag": True, "outcome_by_task": {"a": 1.0}}
        for k in range(3)
    ]  # fmt: skip
    del rows[1]["diagnose_gram_rate"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = page_of(tmp_path / "o", tmp_path).data["runs"][0]
    assert run["others"] == ["diagnose_gram_rate", "probe/good", "probe/flawed"]
    assert run["rl"]["diagnose_gram_rate"] == [0.0, None, 0.2]
    assert run["rl"]["probe/good"] == [0.0, 1.0, 2.0]
    trends = report_numbers([tmp_path])["runs"][0]["trends"]
    assert trends["probe/good"] == {"first": 0.0, "last": 2.0, "window": 1}


def test_nothing_hostile_becomes_markup(tmp_path: Path, make_run: MakeRun) -> None:
    text = HOSTILE + "\u202e\"' onmouseover=alert(2) x='" + "w" * 300
    run = write_microscope(make_run(text=text, iterations=3), text)
    html = build_report([run], tmp_path / "r.html").read_text("utf-8")
    page = Page(html)
    assert {"img", "b"} & {name for name, _ in page.elements} == {"b"}  # our own ones
    assert all(not key.startswith("on") for _, attrs in page.elements for key in attrs)
    assert len(page.scripts) == 2
    assert "<img" not in html
    assert not set(html) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")
    assert "[U+202E]" in page.text
    shown = " ".join(page.text.split())
    source = " ".join(("mine" + text.replace("\u202e", "[U+202E]")).split())
    assert f"asked anew: rule, {source}, all others" in shown  # a label source, word by word
    assert f"{source}25 %" in shown
    points = page.data["runs"][0]["microscope"]["coupling"]["points"]
    assert any("</script><img src=x" in point["name"] for point in points)


# --- size --------------------------------------------------------------------------------------


def test_halved_limits_cut_everything(tmp_path: Path, measured: Path, monkeypatch: Any) -> None:
    """The bound holds whatever it is, until nothing is left to halve."""
    whole = build_report([measured], tmp_path / "whole.html")
    assert "Some of it was left out" not in whole.read_text("utf-8")
    size = whole.stat().st_size
    bound = size // 2
    monkeypatch.setattr("untwine.report.page.MAX_BYTES", bound)
    small = build_report([measured], tmp_path / "small.html")
    assert small.stat().st_size <= bound
    assert "Some of it was left out" in small.read_text("utf-8")
    monkeypatch.setattr("untwine.report.page.MAX_BYTES", 1000)
    with pytest.raises(UntwineError, match="give fewer runs"):
        build_report([measured], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_a_large_microscope_stays_under_ten_megabytes(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(iterations=3)
    write_microscope(run, samples=40)
    file = run / "diagnose" / "coupling.json"
    numbers = json.loads(file.read_text())
    for offender in numbers["offenders"]:
        for i, pusher in enumerate(offender["pushers"]):
            pusher["prompt"] = "".join(f"line {k * (i + 2)}\n" for k in range(20_000))
    numbers["offenders"] *= 40
    file.write_text(json.dumps(numbers))
    (run / "recipe.yaml").write_text("# " + "x" * 12_000_000)
    out = build_report([run], tmp_path / "r.html")
    assert out.stat().st_size < 10_000_000
    assert "characters left out)" in out.read_text("utf-8")


def test_limits_halve_to_one() -> None:
    limits = Limits()
    for _ in range(40):
        limits = limits.halved()
    assert set(dataclasses.astuple(limits)) == {1}
