"""What a sweep consists of: combinations, shared cold starts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from untwine.compare.runs import read_sweep
from untwine.config import EvaluateConfig
from untwine.errors import ConfigError, UntwineError
from untwine.progress import Display
from untwine.sweep.command import run_sweep
from untwine.sweep.looks import Look
from untwine.sweep.plan import (
    Arm,
    Planned,
    check_examined,
    check_folder,
    folder_name,
    plan_sweep,
    vary,
    write_plan,
)

RECIPE = {
    "name": "base",
    "seed": 4,
    "env": {"name": "rooms"},
    "cold_start": {"episodes": 8, "steps": 3},
    "rl": {"iterations": 2},
}
NONE, CE = "gcd.objective=none", "gcd.objective=generative/ce"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


def test_every_combination_is_an_arm() -> None:
    arms = vary(["rl.epochs=1,2", "env.tasks=[fetch, tidy],[unlock]"])
    assert [arm.overrides for arm in arms] == [
        ("rl.epochs=1", "env.tasks=[fetch, tidy]"),
        ("rl.epochs=1", "env.tasks=[unlock]"),
        ("rl.epochs=2", "env.tasks=[fetch, tidy]"),
        ("rl.epochs=2", "env.tasks=[unlock]"),
    ]
    assert arms[0].name == "rl.epochs=1, env.tasks=[fetch, tidy]"
    assert vary([]) == [Arm("", ())]
    assert [a.overrides[0] for a in vary(['env.name="a,b",c'])] == ['env.name="a,b"', "env.name=c"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["rl.epochs"], "not of the form"),
        (["rl.epochs=1,"], "not of the form"),
        (["=1,2"], "not of the form"),
        (["seed=1,2"], "sets seed, .* --seeds"),
        ([" seed =1"], "sets seed, .* --seeds"),
        (["rl.epochs=1,1"], "names a value twice"),
        (["rl.epochs=1,2", "rl.epochs=3,4"], "names a key twice"),
    ],
)
def test_senseless_variation_is_refused(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        vary(options)


def test_arms_share_the_cold_start_of_a_seed(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = plan_sweep(recipe, ["loss.kl=0.1"], vary([f"{NONE},generative/ce"]), 2, out)
    titles = [one.job.title for one in planned]
    assert titles == [
        *("cold start, seed 4", f"{NONE}, seed 4", f"{CE}, seed 4"),
        *("cold start, seed 5", f"{NONE}, seed 5", f"{CE}, seed 5"),
    ]
    cold, plain, gcd = (one.job for one in planned[:3])
    assert (plain.after, gcd.after, cold.after) == (cold.run, cold.run, None)
    assert (cold.recipe.rl.iterations, cold.recipe.cold_start.episodes) == (0, 8)
    assert (gcd.recipe.rl.iterations, gcd.recipe.cold_start.episodes) == (2, 0)
    assert Path(gcd.recipe.policy.model) == cold.run / "model"
    assert gcd.recipe.gcd.objective == "generative/ce"
    assert {one.job.recipe.policy.threads for one in planned} == {1}
    assert {one.job.recipe.loss.kl for one in planned} == {0.1}
    assert len({one.job.run for one in planned}) == 6


def test_how_long_an_expert_episode_may_be_belongs_to_the_cold_start(
    recipe: Path, tmp_path: Path
) -> None:
    """A budget that the longer prompts of an arm need."""
    long = Arm("long", ("prompt.max_tokens=20000", "rl.microbatch_tokens=32768"))
    planned = plan_sweep(recipe, [], [Arm("usual"), long], 1, tmp_path / "out")
    colds = [one.job.recipe for one in planned if one.job.after is None]
    assert [cold.rl.microbatch_tokens for cold in colds][1:] == [32768]
    assert len(colds) == 2


def test_arms_that_differ_before_have_cold_starts_of_their_own(
    recipe: Path, tmp_path: Path
) -> None:
    arms = vary(["cold_start.steps=3,5", "rl.epochs=1,2"])
    planned = plan_sweep(recipe, [], arms, 1, tmp_path / "out")
    colds = {one.job.run: one for one in planned if one.job.after is None}
    assert [one.arm for one in colds.values()] == [
        "cold start (cold_start.steps=3)",
        "cold start (cold_start.steps=5)",
    ]
    for one in planned:
        if one.job.after:
            steps = colds[one.job.after].job.recipe.cold_start.steps
            assert f"cold_start.steps={steps}" in one.arm


def test_a_cold_start_is_examined_as_all_its_arms_are(recipe: Path, tmp_path: Path) -> None:
    dev, few = "evaluate.sets=[dev]", "evaluate.episodes=16"
    arms = [
        Arm("plain", (dev, few)),
        Arm("gcd", (dev, CE)),
        Arm("longer", ("cold_start.steps=5", "evaluate.sets=[L1]")),
    ]
    planned = plan_sweep(recipe, [], arms, 1, tmp_path / "out")
    colds = [one.job.recipe.evaluate for one in planned if one.job.after is None]
    usual = EvaluateConfig().episodes
    assert usual != 16
    assert [(c.sets, c.episodes) for c in colds] == [(["dev"], usual), (["L1"], usual)]


@pytest.mark.parametrize(
    ("overrides", "pair"),
    [([], False), (["cold_start.episodes=0"], True), (["rl.iterations=0"], True)],
)
def test_runs_are_whole_where_nothing_is_shared(
    recipe: Path, tmp_path: Path, overrides: list[str], pair: bool
) -> None:
    planned = plan_sweep(recipe, overrides, vary([]), 2, tmp_path / "out", pair=pair)
    assert [(one.arm, one.seed, one.job.after) for one in planned] == [
        ("base", 4, None),
        ("base", 5, None),
    ]
    assert planned[0].job.recipe.policy.model == "tiny"


def test_folder_names_are_plain_and_differ() -> None:
    assert folder_name(NONE) == NONE
    slashed = folder_name(CE)
    assert "/" not in slashed
    assert slashed != folder_name("gcd.objective=generative-ce")
    assert len(folder_name("x" * 500)) < 100
    assert folder_name("../../etc").startswith("etc")
    assert folder_name("") == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("gcd.objective=generative/cee", "unknown gcd.objective.*Did you mean 'generative/ce'"),
        ("credit.name=gppo", "unknown credit method 'gppo'.*Did you mean 'grpo'"),
        ("credit.options.eps=abc", r"credit\.options\.eps: .*\(got 'abc'\)"),
        ("gcd.labels=[rules]", "unknown label source 'rules'.*Did you mean 'rule'"),
        ("env.tasks=[fetsh]", "unknown task 'fetsh'"),
        ("evaluate.sets=[L9]", "L9"),
        ("correction.kinds=[undoo]", "undoo"),
    ],
)
def test_an_arm_that_cannot_be_trained_is_refused_before_any_run(
    recipe: Path, tmp_path: Path, change: str, words: str
) -> None:
    out = tmp_path / "out"
    planned = plan_sweep(recipe, [], [Arm("good"), Arm("bad", (change,))], 2, out)
    with pytest.raises(UntwineError, match=words) as caught:
        run_sweep(planned, out, Display(quiet=True))
    cold = change.startswith("env.")  # its cold start comes first, and cannot be made either
    assert str(caught.value).startswith("arm 'cold start (" if cold else "arm 'bad': ")
    assert not out.exists()


def test_looks_and_measure_are_checked_before_any_run(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = plan_sweep(recipe, [], vary([]), 1, out)
    faults: dict[str, dict[str, Any]] = {
        "unknown measure 'luck'; it is success or score": {"measure": "luck"},
        "look 'x': .* no command 'cupling'.*Did you mean 'coupling'": {
            "looks": [Look("x", ("cupling",))]
        },
        "look 'x': No such option: --iteratoin": {
            "looks": [Look("x", ("coupling", "--iteratoin", "0"))]
        },
        "look 'x': Invalid value for '--steps'": {"looks": [Look("x", ("truth", "--steps", "0"))]},
    }
    for words, options in faults.items():
        with pytest.raises(ConfigError, match=words):
            run_sweep(planned, out, Display(quiet=True), **options)
    assert not out.exists()


def test_a_plan_grows_and_what_was_begun_stays(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = plan_sweep(recipe, [], vary([f"{NONE},generative/ce"]), 1, out)
    write_plan(out, first)
    run = first[1].job.run
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(first[1].job.recipe.to_yaml())
    check_folder(out)
    write_plan(out, plan_sweep(recipe, [], vary([f"{NONE},generative/ce"]), 3, out))
    assert len(read_sweep(out)) == 9
    write_plan(out, first)
    assert sorted(e["seed"] for e in read_sweep(out)) == [4, 4, 4, 5, 5, 5, 6, 6, 6]
    changed = plan_sweep(recipe, ["rl.groups=3"], vary([f"{NONE},generative/ce"]), 1, out)
    with pytest.raises(
        ConfigError, match=r"was begun with another recipe \(rl.groups\); choose another"
    ):
        write_plan(out, changed)
    moved = tmp_path / "moved"
    out.rename(moved)
    write_plan(moved, plan_sweep(recipe, [], vary([f"{NONE},generative/ce"]), 1, moved))


def begun(planned: Planned) -> None:
    planned.job.run.mkdir(parents=True)
    (planned.job.run / "recipe.yaml").write_text(planned.job.recipe.to_yaml())


def test_other_seeds_of_an_arm_are_trained_alike_or_refused(recipe: Path, tmp_path: Path) -> None:
    """Else one arm of the comparison would hold two ways to train."""
    out, arms = tmp_path / "out", [Arm("a", ("rl.epochs=1",)), Arm("b", ())]
    first = plan_sweep(recipe, [], arms, 1, out)
    write_plan(out, first)
    for one in first:
        begun(one)
    later = plan_sweep(recipe, ["seed=7"], arms, 2, out)
    write_plan(out, later)
    other = plan_sweep(recipe, ["seed=9", "rl.groups=3"], arms, 1, out)
    with pytest.raises(
        ConfigError, match=r"'a' was trained in another way with seed 4 \(rl.groups\)"
    ):
        write_plan(out, other)
    unpaired = plan_sweep(recipe, ["seed=9"], arms, 1, out, pair=False)
    with pytest.raises(ConfigError, match=r"cold_start.episodes, policy.model"):
        write_plan(out, unpaired)


def test_how_a_finished_cold_start_was_examined_is_no_obstacle(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arms = [Arm("a", ("evaluate.episodes=16",)), Arm("b", ("gcd.weight=0.1",))]
    for one in plan_sweep(recipe, [], arms[:1], 1, out):
        begun(one)
    write_plan(out, plan_sweep(recipe, [], arms, 1, out))
    changed = plan_sweep(recipe, ["cold_start.steps=4"], arms, 1, out)
    with pytest.raises(ConfigError, match=r"\(cold_start.steps\)"):
        write_plan(out, changed)


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ([Arm("a", ("evaluate.episodes=4",)), Arm("b", ())], "'a' and 'b' have no evaluation set"),
        ([Arm("a", ("env.max_steps=7",)), Arm("b", ())], "no evaluation set in common"),
        ([Arm("a", ("evaluate.episodes=0",))], r"episodes is 0 \(arm 'a'\)"),
        ([Arm("a", ("evaluate.sets=[]",))], "sets is empty"),
    ],
)
def test_a_sweep_that_could_not_end_in_a_comparison_is_not_begun(
    recipe: Path, tmp_path: Path, arms: list[Arm], words: str
) -> None:
    out = tmp_path / "out"
    planned = plan_sweep(recipe, [], arms, 1, out)
    with pytest.raises(ConfigError, match=words):
        run_sweep(planned, out, Display(quiet=True))
    assert not out.exists()


def test_arms_may_differ_in_some_sets(recipe: Path, tmp_path: Path) -> None:
    arms = [Arm("a", ("evaluate.sets=[L0, L1]",)), Arm("b", ("evaluate.sets=[L1]",))]
    check_examined(plan_sweep(recipe, [], arms, 1, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("cold start", "rl.epochs=2", "has the name of the cold starts"),
        ("a", "policy.threads=2", "every run of a sweep has one thread"),
        ("a", "cold_start.threads=2", "every run of a sweep has one thread"),
        ("a", "name=x", "name the arm instead"),
    ],
)
def test_what_a_sweep_sets_itself_makes_no_arm(name: str, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Arm(name, (override,))


def test_other_folders_are_left_alone(recipe: Path, tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    with pytest.raises(ConfigError, match="holds something else than a sweep"):
        check_folder(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        check_folder(recipe)
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": []}))
    check_folder(tmp_path)
