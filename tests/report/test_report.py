"""The report: what it reads, what it says, and that nothing hostile gets into its markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import HOSTILE, make_groups

from untwine.errors import CheckpointError, UntwineError
from untwine.evaluate.recorded import record_evaluation
from untwine.evaluate.statistics import wilson_interval
from untwine.report import build_report, load_run, report_numbers
from untwine.report.episode_data import LONGEST_TEXT, plain_episode, take_episodes
from untwine.report.first_look import first_look
from untwine.report.microscope_view import Limits
from untwine.report.page import embed_json

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """Elements with their attributes, the text outside scripts, and the scripts themselves."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def page_of(tmp_path: Path, *runs: Path) -> Page:
    return Page(build_report(runs, tmp_path / "out" / "report.html").read_text("utf-8"))


# --- reading -----------------------------------------------------------------------------------


def test_load_run_reads_every_stage(make_run: MakeRun) -> None:
    run = load_run(make_run(iterations=20))
    assert (run.name, len(run.cold_start), len(run.rl)) == ("boil water", 60, 20)
    assert [number for number, _ in run.episodes] == [0, 10]
    assert run.problems == ()


def test_a_torn_last_line_is_left_out_and_named(make_run: MakeRun) -> None:
    path = make_run(iterations=8)
    metrics = path / "metrics.jsonl"
    whole = load_run(path).rl
    metrics.write_text(metrics.read_text() + '{"stage": "rl", "step": 8, "outco')
    run = load_run(path)
    assert run.rl == whole
    assert run.problems == ("The last line of metrics.jsonl is torn and was left out.",)


def test_a_resumed_run_counts_each_step_once(make_run: MakeRun) -> None:
    path = make_run(iterations=4)
    with (path / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"stage": "r\n[1]\n{"stage": "rl", "step": 2, "outcome_mean": 9}\n')
    run = load_run(path)
    assert [row["step"] for row in run.rl] == [0, 1, 2, 3]
    assert run.rl[2]["outcome_mean"] == 9
    assert "2 lines" in run.problems[0]


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(CheckpointError, match=r"run directory"):
        load_run(path)


def test_no_runs_and_an_unwritable_target_are_plain_errors(
    tmp_path: Path, make_run: MakeRun
) -> None:
    with pytest.raises(UntwineError, match="at least one"):
        build_report([], tmp_path / "r.html")
    (tmp_path / "taken").touch()
    with pytest.raises(UntwineError, match="cannot be written"):
        build_report([make_run(iterations=2)], tmp_path / "taken" / "r.html")


# --- numbers -----------------------------------------------------------------------------------


def test_numbers_are_json_and_hold_the_last_evaluation_of_each_phase(make_run: MakeRun) -> None:
    numbers = report_numbers([make_run(iterations=20)])
    json.dumps(numbers, allow_nan=False)
    run = numbers["runs"][0]
    assert [(r["phase"], r["set"], r["step"]) for r in run["results"]] == [
        ("cold_start", "L0", 0), ("cold_start", "L1", 0), ("rl", "L0", 20), ("rl", "L1", 20),
    ]  # fmt: skip
    assert run["results"][3]["success_rate"] == pytest.approx(0.28)
    assert run["totals"]["env_steps"] == sum(900 - k for k in range(20))
    assert run["trends"]["flawed_rate"]["window"] == 10
    assert list(run["flawed_kinds"]) == ["repeat", "no_effect", "invalid", "undo"]
    assert len(run["first_look"]) == 3


def test_tasks_are_as_sure_as_their_instances_are_many(tmp_path: Path) -> None:
    """Four episodes of one instance do not pass for four."""
    cell = {"episodes": 4, "outcome_mean": 1.0, "success_rate": 1.0}
    row = {"stage": "evaluate", "step": 1, "set": "L0", "episodes": 8, "success_rate": 1.0}
    row |= {"by_task": {"boil": cell, "a/b": cell}}
    row |= {"per_instance": {"boil/9": [1.0, 1.0], "a/b/1": [1.0, 1.0], "a/b/2": [1.0, 1.0]}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    tasks = report_numbers([tmp_path])["runs"][0]["results"][0]["by_task"]
    assert [tasks[name]["instances"] for name in ("boil", "a/b")] == [1, 2]
    assert tasks["boil"]["success_interval"] == pytest.approx(list(wilson_interval(1, 1)))
    assert tasks["a/b"]["success_interval"] == pytest.approx(list(wilson_interval(2, 2)))
    page = page_of(tmp_path / "o", tmp_path)
    assert "n = 2" in page.text
    assert "n = 4" not in page.text


def test_what_was_played_afterwards_is_shown(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(iterations=4)
    weights = run / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"of another policy")
    row = {"set": "L2", "episodes": 40, "success_rate": 0.9, "outcome_mean": 0.9}
    record_evaluation(run, row | {"decoding": "sampled"})
    weights.write_bytes(b"of the last one")
    record_evaluation(run, row | {"decoding": "greedy", "success_rate": 0.2, "flawed_rate": 0.125})
    record_evaluation(run, row | {"decoding": "sampled", "success_rate": 0.6})
    record_evaluation(run, row | {"decoding": "sampled", "success_rate": 0.5})
    told = {"overrides": {"prompt.history": f"3{HOSTILE}"}, "success_rate": 0.7}
    record_evaluation(run, row | {"decoding": "sampled"} | told)
    found = report_numbers([run])["runs"][0]
    played = [(r["decoding"], r["success_rate"], len(r["overrides"])) for r in found["evaluated"]]
    assert played == [
        ("sampled", 0.5, 0), ("sampled", 0.7, 1), ("greedy", 0.2, 0),
    ]  # fmt: skip
    assert found["evaluated"][0]["success_interval"] == pytest.approx([0.352, 0.648], abs=1e-3)
    page = page_of(tmp_path, run)
    assert "Played afterwards" in page.text
    assert "n\xa0=\xa040" in page.text
    assert "Left out of evaluations.jsonl: 1 about another policy" in page.text
    assert "img" not in dict(page.elements)
    assert f"prompt.history=3{HOSTILE}" in page.text


def test_sets_played_only_afterwards_are_results_too(tmp_path: Path, make_run: MakeRun) -> None:
    runs = []
    for name, rate in (("a", 0.9), ("b", 0.1)):
        run = make_run(name, name=name)
        (run / "metrics.jsonl").write_text('{"stage": "rl", "step": 0, "success_rate": 0.4}\n')
        (run / "model").mkdir()
        (run / "model" / "model.safetensors").write_bytes(b"weights")
        row = {"set": "L2", "decoding": "sampled", "episodes": 40, "success_rate": rate}
        record_evaluation(run, row)
        runs.append(run)
    page = page_of(tmp_path, *runs)
    assert "No evaluation was recorded" not in page.text
    assert "On L2, 90 % [77, 96] of the episodes succeed (after RL)." in page.text
    assert "On L2, a leads with a success rate of 90 %" in page.text


def test_the_environment_is_named(tmp_path: Path, make_run: MakeRun) -> None:
    """By its title; by its family when an older run has no title."""
    titled, older = (make_run(n, env={"name": e}) for n, e in (("a", "alfworld"), ("b", "rooms")))
    info = json.loads((titled / "run.json").read_text())
    info |= {"environment": "ALFWorld (synthetic games)", "splits": "0123456789abcdef"}
    (titled / "run.json").write_text(json.dumps(info))
    runs = report_numbers([titled, older])["runs"]
    assert [run["environment"] for run in runs] == ["ALFWorld (synthetic games)", "rooms"]
    assert [run["splits"] for run in runs] == ["0123456789abcdef", None]
    header = page_of(tmp_path, titled).text.partition("Curves")[2].partition("Results")[0]
    assert header.count("ALFWorld (synthetic games)") == 2
    assert "0123456789ab" in header
    assert "ALFWorld (synthetic games) · rooms" in page_of(tmp_path, titled, older).text


def test_a_missing_success_interval_is_wilson(tmp_path: Path) -> None:
    row = {
        "stage": "evaluate",
        "step": 1,
        "set": "L0",
        "episodes": 20,
        "success_rate": 0.0,
        "outcome_mean": None,
        "by_task": {"a": {"episodes": 2, "success_rate": 1.0}},
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    numbers = report_numbers([tmp_path])
    result = numbers["runs"][0]["results"][0]
    assert result["success_interval"] == pytest.approx([0.0, 0.1611], abs=1e-4)
    assert result["outcome_interval"] is None
    assert numbers["tasks"][0]["rows"][0]["cells"][0]["success_interval"][1] == 1.0


def test_first_look_claims_only_what_intervals_show(make_run: MakeRun) -> None:
    weak = report_numbers([make_run("weak", lift=-0.1)])["runs"][0]["first_look"]
    strong = report_numbers([make_run("strong", lift=0.4)])["runs"][0]["first_look"]
    assert "the intervals overlap" in weak[0]
    assert "do not overlap" in strong[0]
    assert "Flawed steps fell" in strong[1]
    assert "points the right way" in strong[1]
    assert strong[2].startswith("Nothing stands out")


def test_first_look_points_at_what_is_wrong(make_run: MakeRun) -> None:
    run = dict(report_numbers([make_run()])["runs"][0])
    run["status"] = "interrupted"
    run["trends"] = {
        **run["trends"],
        "entropy": {"first": 1.0, "last": 0.1, "window": 5},
        "advantage_flawed": {"first": 0.0, "last": 0.5, "window": 5},
    }
    sentences = first_look(run)
    assert "points the wrong way" in sentences[1]
    assert "interrupted, with 60 of 60 iterations" in sentences[2]
    assert "entropy fell from 1 to 0.1" in sentences[2]


def test_two_runs_are_compared(make_run: MakeRun) -> None:
    gcd = {"objective": "generative/ce"}
    runs = [make_run("a", "same"), make_run("b", "same", seed=1, lift=0.4, gcd=gcd)]
    numbers = report_numbers(runs)
    assert [run["label"] for run in numbers["runs"]] == ["same (a)", "same (b)"]
    assert numbers["comparison"].startswith("On L1, same (b) leads with a success rate of 68 %")
    assert {row["key"] for row in numbers["differences"]} == {"seed", "gcd.objective"}
    level = report_numbers([make_run("c", "one"), make_run("d", "two")])["comparison"]
    assert level.startswith("On L1, one and two are level with a success rate of")


# --- the page ----------------------------------------------------------------------------------


def test_nothing_hostile_becomes_markup(tmp_path: Path, make_run: MakeRun) -> None:
    path = make_run(text=HOSTILE, iterations=12)
    html = build_report([path, make_run("tame")], tmp_path / "r.html").read_text("utf-8")
    page = Page(html)
    names = {name for name, _ in page.elements}
    assert "img" not in names
    assert "b" not in names
    assert all(not key.startswith("on") for _, attrs in page.elements for key in attrs)
    assert len(page.scripts) == 2
    assert "<img" not in html
    assert "\u2028" not in page.scripts[0]
    # The text is there all the same, in the markup and in the data.
    assert f"boil water{HOSTILE}" in page.text
    assert any(HOSTILE in episode["goal"] for episode in page.data["episodes"])
    assert page.data["runs"][0]["label"] == f"boil water{HOSTILE}"


def test_the_page_asks_nothing_of_the_network(tmp_path: Path, make_run: MakeRun) -> None:
    page = page_of(tmp_path, make_run(iterations=6))
    for name, attrs in page.elements:
        assert not attrs.keys() & {"src", "srcset", "action", "poster", "style"}, name
        assert (attrs.get("href") or "#").startswith("#")
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "@import" not in html
    assert "url(" not in html
    assert "innerHTML" not in html
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}


def test_the_policy_allows_exactly_our_script(tmp_path: Path, make_run: MakeRun) -> None:
    page = page_of(tmp_path, make_run(iterations=3))
    policy = next(a["content"] for n, a in page.elements if n == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_embedded_json_cannot_leave_its_element() -> None:
    value = {"a": HOSTILE, "b": [float("nan"), 1 / 3], "<k>": "\u2029&"}
    text = embed_json(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"a": HOSTILE, "b": [None, 0.33333], "<k>": "\u2029&"}


@pytest.mark.parametrize(
    "missing", ["run.json", "recipe.yaml", "metrics.jsonl", "episodes", "safetensors", "most"]
)
def test_missing_parts_leave_a_page_that_says_so(
    tmp_path: Path, make_run: MakeRun, missing: str
) -> None:
    path = make_run(iterations=4)
    if missing in ("episodes", "most"):
        for file in (path / "episodes").iterdir():
            file.unlink()
        (path / "episodes").rmdir()
    if missing == "safetensors":
        for file in (path / "episodes").glob("*.safetensors"):
            file.unlink()
    for name in ("run.json", "recipe.yaml") if missing == "most" else (missing,):
        if (path / name).is_file():
            (path / name).unlink()
    if missing == "most":
        (path / "metrics.jsonl").write_text('{"stage": "rl", "step": 0, "outcome_mean": null}\n')
    page = page_of(tmp_path, path)
    if missing in ("metrics.jsonl", "most"):
        assert "No evaluation was recorded" in page.text
        assert "No result by task was recorded" in page.text
    if missing == "recipe.yaml":
        assert "recipe.yaml is missing." in page.text
    if missing == "safetensors":
        assert "Episodes of iteration 0 are unreadable" in page.text
    if missing in ("episodes", "safetensors", "most"):
        assert page.data["episodes"] == []


def test_odd_values_are_survived(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"stage": "rl", "step": 0, "outcome_mean": "much", "flawed_kinds": [1], "kl": True},
        {"stage": "rl", "step": 1, "outcome_mean": float("inf"), "outcome_by_task": {"a": 0.5}},
        {"stage": "rl", "step": None}, {"stage": "other", "step": 3}, {"step": 1},
        {"stage": "evaluate", "step": 1, "set": 3, "by_task": {"a": 1}, "success_interval": [1]},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text('{"name": null, "status": ["x"], "seed": 0')
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff\n\t- broken: [")
    page = page_of(tmp_path / "o", tmp_path)
    assert "run.json is not a JSON object" in page.text
    assert page.data["runs"][0]["rl"].keys() == {"step"}
    assert "Training episodes" in page.text


def test_a_training_only_run_shows_tasks_from_training(tmp_path: Path) -> None:
    row = {"stage": "rl", "step": 0, "success_rate": 0.5, "outcome_by_task": {"boil": 0.25}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    page = page_of(tmp_path / "o", tmp_path)
    assert "In training, success went from 50 % to 50 %" in page.text
    assert "25 %" in page.text


# --- episodes ----------------------------------------------------------------------------------


def test_first_middle_and_last_iterations_are_embedded(tmp_path: Path, make_run: MakeRun) -> None:
    data = page_of(tmp_path, make_run(iterations=50)).data
    counts = data["runs"][0]["episodes"]
    assert counts == {"embedded": 48, "recorded": 48, "iterations": [0, 20, 40], "files": 5}
    assert {episode["iteration"] for episode in data["episodes"]} == {0, 20, 40}


def test_the_file_stays_small(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("untwine.report.page.LIMITS", Limits(episode_bytes=320_000))
    monkeypatch.setattr("untwine.report.page.MAX_BYTES", 230_000)
    path = make_run(text="x" * 900, iterations=21)
    out = build_report([path], tmp_path / "r.html")
    counts = Page(out.read_text("utf-8")).data["runs"][0]["episodes"]
    assert out.stat().st_size <= 230_000
    assert 0 < counts["embedded"] < counts["recorded"] == 48


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    rows = [{"stage": "rl", "step": k, "outcome_mean": float(k % 2)} for k in range(3000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = page_of(tmp_path / "o", tmp_path).data["runs"][0]
    assert run["points"] == 3000
    assert len(run["rl"]["step"]) == 1000
    assert run["rl"]["step"][:2] == [1, 4]


def test_an_episode_keeps_what_the_browser_shows() -> None:
    episodes = [episode for group in make_groups(groups=6) for episode in group.episodes]
    for episode in episodes:
        plain = plain_episode(episode)
        assert plain["flawed"] == sum(
            any(label.verdict == "flawed" for label in step.labels) for step in episode.steps
        )
        for step, shown in zip(episode.steps, plain["steps"], strict=True):
            assert ("observation" in shown) == (step.index == 0)  # later ones repeat the feedback
            assert shown.get("command") == step.command
            assert shown.get("raw") == (step.text if step.command is None else None)
            assert ("advantage" in shown) == (step.advantage is not None)
            assert shown["logprob"] == pytest.approx(sum(step.logprobs) / 2, abs=1e-3)


def test_budget_and_long_texts() -> None:
    groups = make_groups(text="y" * 9000)
    taken, used = take_episodes(groups, 200_000)
    assert 0 < len(taken) < 16
    assert used <= 200_000
    assert len(taken[0]["goal"]) < LONGEST_TEXT + 50
    assert taken[0]["goal"].endswith("characters left out)")
    assert take_episodes(groups, 0) == ([], 0)
