"""The command line: bad input gets one sentence and the right exit code, good input works."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.training.test_resume import RECIPE
from untwine.cli import main
from untwine.config import load_recipe
from untwine.envs.alfworld.generate import generate
from untwine.envs.registry import make_env
from untwine.envs.splits import load_splits
from untwine.episodes import read_groups
from untwine.gcd.labels import agreed_verdict
from untwine.report.numbers import RL_KEYS

TINY = {
    **RECIPE,
    "rl": {"iterations": 1, "groups": 2, "group_size": 4},
    "loss": {},
    "diagnose": {},
    "evaluate": {"sets": ["L0"], "episodes": 4},
}


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def untwine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["untwine", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made once."""
    from untwine.progress import Display
    from untwine.training.loop import train

    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    train(load_recipe(folder / "recipe.yaml"), folder / "run", Display(quiet=True))
    return folder / "run"


def assert_refused(result: Result, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert result.err.count("error:") == 1
    for word in words:
        assert word in " ".join(result.err.split()), result.err


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("rl.iteration=3", 2, ["unknown key 'rl.iteration'", "Did you mean 'rl.iterations'"]),
        ("rl.groups=many", 2, ["rl.groups", "valid integer"]),
        ("env.name=romms", 3, ["unknown environment 'romms'", "Did you mean 'rooms'"]),
        ("env.tasks=[fetsh]", 3, ["fetsh", "Did you mean 'fetch'"]),
        ("env.train_set=trian", 3, ["trian", "train"]),
        ("env.splits=nowhere", 3, ["nowhere"]),
        ("env.options={roms: 4}", 3, ["no option 'roms'", "Did you mean 'rooms'"]),
        ("evaluate.sets=[L7]", 3, ["L7"]),
        ("policy.model=./nothing-here", 4, ["no model folder ./nothing-here"]),
        ("policy.device=cuda:99", 4, ["not usable here"]),
        ("policy.device=gpu:1", 4, ["torch calls it 'cuda:1'"]),
        ("policy.model=smolm2", 4, ["no preset 'smolm2'", "Did you mean 'smollm2'"]),
        ("env.tasks=fetch", 2, ["a list is wanted; write [fetch]"]),
        ("rl=5", 2, ["rl is a section", "rl.iterations"]),
        ("credit.name=gppo", 2, ["unknown credit method", "Did you mean 'grpo'"]),
        ("credit.name=rlvmr", 2, ["rewards reasoning tags", "set prompt.tags to true"]),
        ("gcd.labels=[rules]", 2, ["unknown label source", "Did you mean 'rule'"]),
        ("prompt.max_tokens=20", 1, ["only 20 fit"]),
        ("prompt.max_tokens=20000", 2, ["does not fit rl.microbatch_tokens=16384", "lower"]),
    ],
)
def test_train_refuses(
    untwine, recipe: Path, tmp_path: Path, override: str, code: int, words: list[str]
) -> None:  # type: ignore[no-untyped-def]
    arguments = ["train", recipe, override, "--run", tmp_path / "run", "cold_start.steps=1"]
    assert_refused(untwine(*arguments), code, *words)


def test_broken_recipe_files(untwine, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert_refused(untwine("train", tmp_path / "no.yaml"), 2, "is missing")
    (tmp_path / "broken.yaml").write_text("rl: {groups: [\n")
    assert_refused(untwine("train", tmp_path / "broken.yaml"), 2, "not valid YAML in line")
    assert_refused(untwine("train"), 2, "name a recipe")


def test_folders_that_are_no_models(untwine, recipe: Path, tmp_path: Path, finished: Path) -> None:  # type: ignore[no-untyped-def]
    empty = tmp_path / "empty"
    empty.mkdir()
    run = tmp_path / "run"
    refused = untwine("train", recipe, f"policy.model={empty}", "--run", run)
    assert_refused(refused, 4, "is no model folder", "config.json")
    shutil.copytree(finished / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused = untwine("train", recipe, f"policy.model={tmp_path / 'cut'}", "--run", run)
    assert_refused(refused, 4, "cannot load model")


def test_an_existing_run_is_not_overwritten(untwine, recipe: Path, finished: Path) -> None:  # type: ignore[no-untyped-def]
    before = (finished / "metrics.jsonl").read_bytes()
    assert_refused(untwine("train", recipe, "--run", finished), 5, "already exists", "--resume")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_failed_start_does_not_stand_in_the_way(untwine, recipe: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = tmp_path / "run"
    wrong = ("train", recipe, "policy.model=./nothing-here", "--run", run)
    for _ in range(2):
        assert_refused(untwine(*wrong), 4, "no model folder")
    (run / "notes.txt").write_text("mine")
    assert_refused(untwine(*wrong), 5, "already exists")
    (run / "notes.txt").unlink()
    right = ("train", recipe, "cold_start.steps=1", "rl.iterations=0", "--run", run)
    assert untwine(*right).code == 0
    assert_refused(untwine(*wrong), 5, "already exists")


def test_a_resumed_run_keeps_its_model(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    before = (finished / "recipe.yaml").read_bytes()
    for change in ("policy.model=smollm2", "policy.tiny.layers=3"):
        key = change.partition("=")[0].rpartition(".layers")[0] or "policy.model"
        assert_refused(untwine("train", "--resume", finished, change), 2, f"{key} cannot change")
    assert (finished / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "default"),
    [
        (["train"], "runs/NAME"),
        (["report"], "RUN/report.html"),
        (["sweep"], "[default: 5]"),
        (["compare"], "the first"),
        (["diagnose", "coupling"], "1024 on a CPU"),
        (["diagnose", "truth"], "played the episodes"),
    ],
)
def test_help_shows_defaults(untwine, command: list[str], default: str) -> None:  # type: ignore[no-untyped-def]
    shown = " ".join(re.sub(r"[│\n]", " ", untwine(*command, "--help").out).split())
    assert default in shown


def test_damaged_checkpoints_are_named_and_nothing_is_lost(  # type: ignore[no-untyped-def]
    untwine, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    metrics = (run / "metrics.jsonl").read_bytes()
    assert_refused(untwine("train", "--resume", run), 5, "damaged", newest.name)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    (newest / "state.json").write_text('{"format"')
    assert_refused(untwine("train", "--resume", run), 5, "damaged")
    shutil.rmtree(run / "checkpoints")
    assert_refused(untwine("train", "--resume", run), 5, "no checkpoint")
    assert_refused(untwine("train", "--resume", tmp_path / "nowhere"), 5, "no run directory")
    both = untwine("train", "--resume", run, "--run", tmp_path / "other")
    assert_refused(both, 2, "leave --run out")


def test_evaluate_prints_numbers_for_machines(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    result = untwine("evaluate", finished, "--sets", "L0,L2", "--episodes", "5", "--json")
    assert result.code == 0, result.err
    rows = json.loads(result.out)
    assert [(row["set"], row["episodes"]) for row in rows] == [("L0", 5), ("L2", 5)]
    assert all(0 <= row["outcome_mean"] <= 1 for row in rows)
    assert set(rows[1]["by_task"]) == {"tidy"}


def test_evaluate_keeps_what_it_found(untwine, finished: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "evaluations.jsonl").unlink(missing_ok=True)
    result = untwine("evaluate", run, "--episodes", "3", "--both")
    assert result.code == 0, result.err
    assert "L0, greedy" in result.out
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["identity"]["decoding"] for row in rows] == ["sampled", "greedy"]
    assert len({row["identity"]["digest"] for row in rows}) == 2
    assert {row["identity"]["episodes"] for row in rows} == {3}
    numbers = json.loads(untwine("compare", run, "--json").out)
    assert [entry["title"] for entry in numbers["sets"]] == ["L0", "L0, greedy"]
    page = untwine("compare", run, "--out", tmp_path / "page")
    assert page.code == 0, page.err
    for file in (tmp_path / "page").iterdir():  # page, figure and numbers
        assert file.stat().st_size
    assert json.loads((tmp_path / "page" / "compare.json").read_text()) == numbers
    assert_refused(untwine("compare", run, "--sets", "L1"), 2, "no run was evaluated on L1")
    assert_refused(untwine("compare", tmp_path / "no"), 5, "does not exist")


def test_evaluate_at_random_and_unknown_sets(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    result = untwine("evaluate", finished, "--model", "random", "--episodes", "6")
    assert result.code == 0, result.err
    assert "random" in result.out
    assert result.out.split()[0] == "rooms,"  # the title of the table
    assert_refused(untwine("evaluate", finished, "--sets", "L9"), 3, "L9")


def test_report(untwine, finished: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "page.html"
    assert untwine("report", finished, "--out", page).code == 0
    assert page.stat().st_size > 10_000
    numbers = json.loads(untwine("report", finished, "--json").out)
    assert numbers
    assert_refused(untwine("report", tmp_path / "nothing"), 5, "does not exist")


def test_what_a_run_records_is_documented_and_read_by_the_report(finished: Path) -> None:
    docs = Path(__file__).parents[1] / "docs"
    pages = [docs / "run-directory.md", docs / "evaluation.md"]
    text = "".join(page.read_text("utf-8") for page in pages)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    keys = {(row["stage"], key) for row in rows for key in row}
    unknown = {
        key
        for _, key in keys
        if f"`{key}`" not in text and not key.startswith(("labels_", "per_instance"))
    }
    assert not unknown
    (last,) = [row for row in rows if row["stage"] == "rl"][-1:]
    always = {"outcome_mean", "success_rate", "episode_length", "flawed_rate", "invalid_rate",
              "groups_kept", "policy_tokens", "env_steps",
              "seconds_rollout", "seconds_update"}  # fmt: skip
    assert always <= last.keys() & set(RL_KEYS)
    file = finished / "episodes" / f"iter-{last['step']:06d}.jsonl.gz"
    groups = list(read_groups(file))
    steps = [s for g in groups for e in g.episodes for s in e.steps]
    assert last["env_steps"] == sum(step.command is not None for step in steps)
    kept = [g for g in groups if any(s.advantage is not None for e in g.episodes for s in e.steps)]
    assert last["groups_kept"] == len(kept)
    flawed = [
        s.advantage for s in steps if s.advantage is not None and agreed_verdict(s) == "flawed"
    ]
    mean = sum(flawed) / len(flawed) if flawed else None
    assert last["advantage_flawed"] == (pytest.approx(mean) if flawed else None)
    outcomes = [e.outcome for g in groups for e in g.episodes]
    assert last["outcome_mean"] == pytest.approx(sum(outcomes) / len(outcomes))


def test_play_lists_tasks_and_plays(untwine, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert "fetch" in untwine("play", "rooms").out
    lines = iter(["/commands", "dance", "/expert", "/nonsense", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(lines))
    result = untwine("play", "rooms", "fetch", "3")
    assert result.code == 0
    assert "unknown_command" in result.out
    env = make_env("rooms")
    plan = env.expert("fetch", 3)
    env.reset("fetch", 3)
    assert plan
    assert plan[0] in result.out
    assert all(command in result.out for command in env.admissible())
    assert_refused(untwine("play", "rooms", "fetch", "99999"), 3, "99999")
    assert_refused(untwine("play", "rooms", "jump"), 3, "jump")
    assert_refused(untwine("play", "roms"), 3, "Did you mean 'rooms'")


def test_doctor_and_version(untwine) -> None:  # type: ignore[no-untyped-def]
    result = untwine("doctor")
    assert result.code == 0
    assert "environment rooms" in result.out
    assert "untwine 0." in untwine("--version").out


def test_doctor_says_what_untwine_cannot_do_without(  # type: ignore[no-untyped-def]
    untwine, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == "tokenizers":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr("untwine.doctor.version", version)
    result = untwine("doctor")
    assert result.code == 1
    assert re.search(r"tokenizers +│ missing +│ pip install untwine", result.out)


def test_games_are_imported(untwine, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert_refused(untwine("games", "import", tmp_path / "no"), 3, "no has no ALFWorld games")
    assert_refused(untwine("games", "import", tmp_path), 3, "has no ALFWorld games")
    generate("pick_and_place_simple", 0).write(tmp_path / "train")
    result = untwine("games", "import", tmp_path)
    assert result.code == 0, result.err
    assert re.search(r"pick_and_place_simple +│ 1 ", result.out)
    assert "1 games; index: " in result.out
    index = json.loads((tmp_path / "untwine-index.json").read_text())
    assert list(index["games"]["train"]) == ["pick_and_place_simple"]


def test_doctor_shows_what_is_wrong_with_data_of_ones_own(  # type: ignore[no-untyped-def]
    untwine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    assert "ALFWORLD_DATA" not in untwine("doctor").out
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "[no]"))
    result = untwine("doctor")
    assert result.code == 0, result.err
    shown = " ".join(result.out.replace("│", " ").split())
    assert "$ALFWORLD_DATA not usable" in shown
    assert "[no] has no ALFWorld games" in shown
    assert "ALFWorld (synthetic games): 4080 instances" in shown
    generate("pick_and_place_simple", 0).write(tmp_path / "train")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    shown = " ".join(untwine("doctor").out.replace("│", " ").split())
    assert "$ALFWORLD_DATA 6 tasks ALFWorld (synthetic games): 1 instances" in shown


def test_held_out_tasks_hold_in_training_evaluation_and_resume(  # type: ignore[no-untyped-def]
    untwine, recipe: Path, tmp_path: Path
) -> None:
    run, held_out = tmp_path / "run", "env.held_out_tasks=[unlock]"
    refused = untwine("train", recipe, "env.held_out_tasks=[unlok]", "--run", run)
    assert_refused(refused, 3, "no task 'unlok'", "Did you mean 'unlock'")
    arguments = ["env.tasks=[fetch, tidy]", "evaluate.sets=[L0, L2]", "cold_start.steps=2"]
    result = untwine("train", recipe, held_out, *arguments, "--run", run)
    assert result.code == 0, result.err
    assert load_recipe(run / "recipe.yaml").env.held_out_tasks == ["unlock"]
    info = json.loads((run / "run.json").read_text())
    assert info["environment"] == "rooms"
    assert info["splits"] == load_splits("rooms", "default", {}, ["unlock"]).checksum
    assert untwine("train", "--resume", run, "rl.iterations=2").code == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    examined = [set(row["by_task"]) for row in rows if row.get("set") == "L2"]
    assert examined == [{"unlock"}] * 2  # after the cold start, and at the end
    result = untwine("evaluate", run, "--sets", "L2", "--episodes", "2", "--json")
    assert [set(row["by_task"]) for row in json.loads(result.out)] == [{"unlock"}]


def test_a_gpu_without_memory_is_said(untwine, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def fail() -> int:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("untwine.doctor.examine", fail)
    assert_refused(untwine("doctor"), 1, "CUDA out of memory", "rl.microbatch_tokens")


def test_unknown_commands_and_options(untwine) -> None:  # type: ignore[no-untyped-def]
    assert_refused(untwine("trian"), 2, "trian", "train")
    assert_refused(untwine("train", "--resum", "x"), 2, "--resum", "--resume")


def test_demo_ends_with_a_table_and_a_report(untwine, recipe: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "demo"
    result = untwine("demo", "--recipe", recipe, "--out", out)
    assert result.code == 0, result.err
    for row in ("random commands", "cold start", "after GRPO", "after GRPO + GCD"):
        assert row in result.out
    assert "gains in success are over the cold start" in " ".join(result.out.split())
    assert "report.html" in result.out
    page = (out / "report.html").read_text()
    assert "demo-grpo" in page
    assert "demo-gcd" in page
    objectives = [load_recipe(out / arm / "recipe.yaml").gcd.objective for arm in ("grpo", "gcd")]
    assert objectives == ["none", "generative/ce"]
    assert "rooms, held-out variations" in " ".join(result.out.split())
    again = untwine("demo", "--recipe", recipe, "--out", out)
    assert again.code != 0
    assert "already exists" in again.err
