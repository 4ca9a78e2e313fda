"""Arms of several keys, plan files, and the looks of a sweep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.builders import REF, make_episode, make_step
from tests.compare.finished_runs import row, write_run
from tests.sweep.test_plan import RECIPE
from untwine.config import CorrectionConfig, load_recipe
from untwine.credit import check_credit, credit_method
from untwine.episodes import write_groups
from untwine.errors import ConfigError
from untwine.progress import Display
from untwine.prompting.corrections import instructions
from untwine.records import Group, Label
from untwine.sweep.crew import Job
from untwine.sweep.looks import Look, missing_looks, take_looks
from untwine.sweep.plan import Arm, Planned, plan_sweep
from untwine.sweep.plan_file import choose_plan, named_arms, read_plan

ROOT = Path(__file__).parents[2]
STUDY, RECIPES = ROOT / "studies" / "gcd" / "plan.yaml", ROOT / "recipes"
PLAN = {
    "recipe": "recipe.yaml",
    "seeds": 2,
    "levels": {"few": {"cold_start.steps": 3}, "many": {"cold_start.steps": 9}},
    "arms": {
        "grpo": {"seeds": {"few": 3}},
        "gcd": {"set": {"gcd.objective": "head", "gcd.labels": ["rule"]}},
    },
    "looks": {"before": {"command": ["coupling", "--iteration", "0"], "arms": ["gcd"]}},
}


def written(folder: Path, **changes: object) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(PLAN | changes))
    return file


def test_arms_tie_keys_together() -> None:
    arms = named_arms(["grpo:", "mine:gcd.objective=head,gcd.labels=[rule, group],rl.epochs=2"])
    assert [arm.name for arm in arms] == ["grpo", "mine"]
    assert arms[1].overrides == ("gcd.objective=head", "gcd.labels=[rule, group]", "rl.epochs=2")


@pytest.mark.parametrize(
    "options", [["grpo"], [":rl.epochs=1"], ["a:rl.epochs"], ["a:", "a:"], ["a:seed=4"]]
)
def test_senseless_arms_are_refused(options: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--arm|sets seed"):
        named_arms(options)


def test_a_plan_is_levels_times_arms_with_their_seeds(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path))
    planned = plan_sweep(plan.recipe, [], plan.arms, plan.seeds, tmp_path / "out")
    runs = [(one.arm, one.seed) for one in planned if one.job.after]
    assert sorted(runs) == sorted(
        [(f"{level}.{arm}", seed) for level in ("few", "many") for arm in ("grpo", "gcd")
         for seed in (4, 5)] + [("few.grpo", 6)]
    )  # fmt: skip
    assert len({one.job.after for one in planned if one.job.after}) == 5
    ours = next(one.job.recipe for one in planned if one.arm == "many.gcd")
    assert (ours.gcd.objective, ours.gcd.labels) == ("head", ["rule"])
    assert plan.looks == (
        Look("before", ("coupling", "--iteration", "0"), ("few.gcd", "many.gcd")),
    )


def test_an_arm_may_be_trained_at_some_levels_only(tmp_path: Path) -> None:
    arms = {"grpo": {}, "head": {"set": {"gcd.objective": "head"}, "levels": ["many"]}}
    plan = read_plan(written(tmp_path, arms=arms, looks={}))
    assert [arm.name for arm in plan.arms] == ["few.grpo", "many.grpo", "many.head"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {}}, "arms: .* at least 1 item"),
        ({"colour": 1}, "unknown key 'colour'; known are recipe, seeds, levels, arms, looks"),
        ({"sedes": 1}, "unknown key 'sedes'.*Did you mean 'seeds'"),
        ({"arms": {"a": {"sett": {}}}}, "unknown key 'arms.a.sett'.*Did you mean 'set'"),
        ({"looks": {"a": {"comand": ["x"]}}}, "the key 'looks.a.command' is missing"),
        ({"looks": {"a": {"command": ["x"], "arm": []}}}, "looks.a.arm'.*Did you mean 'arms'"),
        ({"arms": {"a": None}}, "arms.a must hold keys, of set, seeds, levels"),
        ({"arms": {"a": {"seeds": "many"}}}, r"arms.a.seeds: .*integer.* \(got 'many'\)"),
        ({"recipe": 3}, r"recipe: .* \(got 3\)"),
        ({"arms": {"a": {"set": {"seed": 3}}}, "looks": {}}, "arm 'few.a' sets seed, .*`seeds:`"),
        ({"levels": {"few": {"seed": 3}}}, "arm 'few.gcd' sets seed"),
        ({"looks": {"x": {"command": ["truth"], "arms": ["gdc"]}}}, "gdc.*gcd"),
        ({"arms": {"a": {"seeds": {"fwe": 2}}}}, "fwe.*few"),
        ({"arms": {"a": {"levels": ["mnay"]}}}, "mnay.*many"),
    ],
)
def test_faults_of_a_plan_are_named(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_plan(written(tmp_path, **changes))


def test_a_plan_is_no_list_and_has_no_arm_twice(tmp_path: Path) -> None:
    file = written(tmp_path)
    for text, words in (
        ("[1]", "the file must hold keys, of recipe, seeds, levels, arms, looks"),
        ("arms: {a: {}, a: {}}", "not valid YAML: the key 'a' stands there a second time"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_plan(file)


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    plan, recipe = written(tmp_path), tmp_path / "recipe.yaml"
    with pytest.raises(ConfigError, match="--plan FILE"):
        choose_plan(None, [], [], [], None, None)
    with pytest.raises(ConfigError, match="one of the two"):
        choose_plan(recipe, [], ["rl.epochs=1,2"], ["a:"], None, None)
    with pytest.raises(ConfigError, match="leave the recipe out"):
        choose_plan(recipe, [], [], [], plan, None)
    with pytest.raises(ConfigError, match="leave --vary"):
        choose_plan(None, [], [], [], plan, 3)
    changes: list[str] = []
    choose_plan(Path("rl.groups=3"), changes, [], [], plan, None)
    assert changes == ["rl.groups=3"]


def test_the_plan_of_the_study_is_complete(tmp_path: Path) -> None:
    plan = read_plan(STUDY)
    planned = plan_sweep(plan.recipe, [], plan.arms, plan.seeds, tmp_path)
    runs = [one for one in planned if one.job.after]
    assert len(runs) == 117
    for arm in ("wrong.grpo", "wrong.gcd-ce"):
        assert sum(one.arm == arm for one in runs) == 16
    assert all(one.job.recipe.evaluate.episodes >= 480 for one in runs)
    assert len({one.job.recipe.rl.token_budget for one in runs}) == 1
    shared = {one.job.after for one in runs if one.arm in ("wrong.grpo", "wrong.gcd-ce")}
    assert len(shared) == 16
    assert len({one.job.after for one in runs}) == 41
    own = {one.arm: one.job.recipe for one in runs}
    first = read_plan(STUDY.with_name("primary.yaml"))
    begun = plan_sweep(first.recipe, [], first.arms, first.seeds, tmp_path)
    wanted = {one.job.run: one.job.recipe for one in planned}
    assert len(begun) == 48
    assert all(wanted[one.job.run] == one.job.recipe for one in begun)
    assert first.looks == tuple(
        replace(look, arms=tuple(arm for arm in look.arms if arm in {a.name for a in first.arms}))
        for look in plan.looks
    )
    for alike in (["grpo-told-start", "correction"], ["grpo-apart-start", "gcd-apart"]):
        arms = {f"wrong.{arm}" for arm in alike}
        assert len({one.job.after for one in runs if one.arm in arms}) == 5
    assert set(own["wrong.correction"].correction.kinds) <= set(
        instructions(own["wrong.correction"].correction)
    )
    assert own["wrong.grpo-told-start"].correction == CorrectionConfig()


@pytest.mark.parametrize(
    ("file", "runs", "starts"), [("household-arms", 105, 30), ("scienceworld-third", 172, 56)]
)
def test_the_arms_of_all_levels_have_equal_budgets_and_shared_cold_starts(
    tmp_path: Path, file: str, runs: int, starts: int
) -> None:
    plan = read_plan(STUDY.with_name(f"{file}.yaml"))
    planned = plan_sweep(plan.recipe, [], plan.arms, plan.seeds, tmp_path)
    trained = [one for one in planned if one.job.after]
    assert (len(trained), len({one.job.after for one in trained})) == (runs, starts)
    assert len({one.job.recipe.rl.token_budget for one in trained}) == 1
    objectives = set()
    for one in trained:
        gcd = one.job.recipe.gcd
        objectives.add(gcd.objective)
        assert gcd.objective == "none" or (gcd.weight_of, gcd.weight) == ("gradient", 0.3)
    assert objectives == {"none", "generative/ce", "generative/rl", "pairwise", "head"}


def test_the_arms_with_tags_share_their_cold_starts(tmp_path: Path) -> None:
    """And have the credit and the objective of the recipes of their names."""
    plan = read_plan(STUDY.with_name("tags.yaml"))
    planned = plan_sweep(plan.recipe, [], plan.arms, plan.seeds, tmp_path)
    runs = [one for one in planned if one.job.after]
    assert (len(runs), len({one.job.after for one in runs})) == (50, 15)
    own = {one.arm: one.job.recipe for one in runs}
    for arm, name in (
        ("wrong.rlvmr", "rlvmr"), ("wrong.rlvmr-gcd", "rlvmr-gcd"),
        ("short.rlvmr", "rlvmr"), ("full.rlvmr-gcd-held", "rlvmr-gcd"),
    ):  # fmt: skip
        recipe, named = own[arm], load_recipe(RECIPES / f"{name}.yaml")
        check_credit(recipe.credit.name, recipe.prompt)
        credit_method(recipe.credit.name, recipe.credit.options)
        assert (recipe.credit, recipe.sampling) == (named.credit, named.sampling)
        assert recipe.gcd.objective == named.gcd.objective
        assert recipe.prompt.tags
    assert own["wrong.grpo"].credit.name == "grpo"


def test_sentences_of_its_own_make_a_cold_start_of_its_own() -> None:
    """They are in it where experts are told; when and to whom is no part of it."""
    same = Arm("a", ("correction.kinds=[undo]", "correction.share=1.0", "rl.groups=3"))
    other = Arm("b", ("correction.kinds=[undo]", "correction.sentences={undo: Go on.}"))
    single = Arm("c", ("correction.sentences.undo=Go on.",))
    assert [len(arm.before) for arm in (same, other, single)] == [0, 1, 1]


def test_looks_are_taken_once_and_failures_are_said(tmp_path: Path) -> None:
    """Real commands on a run without episodes, which `diagnose` refuses with a sentence."""
    run = write_run(tmp_path / "run", [row({"a": 0.5})])
    planned = [Planned(Job("run", load_recipe(run / "recipe.yaml"), run), "gcd", 0)]
    look, other = Look("found", ("separation",)), Look("else", ("separation",), ("grpo",))
    assert missing_looks(planned, [look, other]) == {run: [look]}
    failed = take_looks(planned, [look, other], Display(quiet=True), 1)
    assert list(failed) == [run]
    assert "holds no episodes" in failed[run]
    assert [file.name for file in (run / "looks").iterdir()] == ["found.log"]
    look.file(run).write_text(json.dumps({}))
    assert missing_looks(planned, [look]) == {}


def test_a_look_is_kept_whole(tmp_path: Path) -> None:
    """A real command on real episodes."""
    run = write_run(tmp_path / "run", [row({"a": 0.5})])
    (run / "episodes").mkdir()
    write_groups(run / "episodes" / "iter-000000.jsonl.gz", [labelled_group()])
    planned = [Planned(Job("run", load_recipe(run / "recipe.yaml"), run), "gcd", 0)]
    look = Look("found", ("calibration", "--labels", "rule"))
    assert take_looks(planned, [look], Display(quiet=True), 1) == {}
    found = json.loads(look.file(run).read_text())
    assert found["flawed"] == 1
    assert "grpo" in found["methods"]
    assert sorted(file.name for file in (run / "looks").iterdir()) == ["found.json", "found.log"]


def labelled_group() -> Group:
    flawed, good = Label("rule", "flawed", "undo"), Label("rule", "good", "progress")
    steps = [
        make_step(0, state="a", after="a", advantage=0.5, labels=(flawed,)),
        make_step(1, state="a", after="b", advantage=0.5, labels=(good,), reward=0.5),
    ]
    return Group(REF, (make_episode(1.0, steps),))
