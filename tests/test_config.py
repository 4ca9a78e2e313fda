"""Recipes: what is accepted, and the sentence for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from untwine.config import Recipe, ScheduleConfig, load_recipe
from untwine.config.keys import all_keys
from untwine.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_overrides_are_yaml_and_win(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 1\nrl: {groups: 4}\n")
    recipe = load_recipe(file, ["rl.groups=6", "env.tasks=[a, b]", "loss.kl=1.0e-3", "seed=7"])
    assert (recipe.rl.groups, recipe.env.tasks, recipe.loss.kl, recipe.seed) == (
        6,
        ["a", "b"],
        1e-3,
        7,
    )


def test_an_override_changes_one_of_two_sections_that_share_an_alias(tmp_path: Path) -> None:
    text = "cold_start: {optimizer: &o {lr: 1.0e-3}}\nrl: {optimizer: *o}\n"
    recipe = load_recipe(write(tmp_path, text), ["rl.optimizer.lr=1e-4"])
    assert (recipe.cold_start.optimizer.lr, recipe.rl.optimizer.lr) == (1e-3, 1e-4)


def test_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "env: {tasks: [fetch]}\n"))
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_what_a_file_leaves_out_is_the_default(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "{}")) == Recipe()
    for text in ("", "# nothing but words\n"):
        with pytest.raises(ConfigError, match="is empty; it must hold sections"):
            load_recipe(write(tmp_path, text))


def test_a_recipe_on_top_of_another(tmp_path: Path) -> None:
    """Sections are merged key by key, at every level; lists and options of a method are values."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "first.yaml").write_text("seed: 3\nrl: {groups: 4, epochs: 2}\n")
    (tmp_path / "second.yaml").write_text(
        "base: below/first.yaml\nrl: {groups: 5}\nenv: {tasks: [a, b]}\n"
        "credit: {name: rlvmr, options: {weight: 0.5, normalise: none}}\n"
    )
    text = (
        "base: second.yaml\nname: third\nenv: {tasks: [c]}\ncredit: {options: {weight: 0.2}}\n"
        "rl: {optimizer: {lr: 0.1}}\n"
    )
    recipe = load_recipe(write(tmp_path, text), ["rl.optimizer.warmup=3"])
    assert (recipe.name, recipe.seed) == ("third", 3)
    assert (recipe.rl.groups, recipe.rl.epochs) == (5, 2)
    assert (recipe.rl.optimizer.lr, recipe.rl.optimizer.warmup) == (0.1, 3)
    assert recipe.env.tasks == ["c"]
    assert (recipe.credit.name, recipe.credit.options) == ("rlvmr", {"weight": 0.2})
    assert "base" not in recipe.to_yaml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: other.yaml\n", "base r.yaml leads back to this file"),
        ("base: r.yaml\n", "base r.yaml leads back to this file"),
        ("base: nowhere.yaml\n", "nowhere.yaml, which it names as its base"),
        ("base: [r.yaml]\n", "base must be the path of a recipe"),
        ("base: fine.yaml\nrl: 3\n", "rl is a section with keys of its own"),
        ("base: fine.yaml\nseed: 1\nseed: 2\n", "line 3: the key 'seed' stands there a second"),
        ("rl: {groups: 1}\nname: x\nrl: {groups: 2}\n", "line 3: the key 'rl' stands there a sec"),
        ("rl: {groups: 1, epochs: 1, groups: 2}\n", "line 1: the key 'groups' stands there"),
    ],
)
def test_a_base_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "other.yaml").write_text("base: r.yaml\n")
    (tmp_path / "fine.yaml").write_text("rl: {groups: 4}\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(write(tmp_path, text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [1,\n", [], "not valid YAML in line"),
        ("- a\n- b\n", [], "must hold sections"),
        ("rl: {iteration: 3}\n", [], "unknown key 'rl.iteration'. Did you mean 'rl.iterations'"),
        ("polcy: {}\n", [], "unknown key 'polcy'. Did you mean 'policy'"),
        ("rl: {iterations: many}\n", [], "rl.iterations: input should be a valid integer"),
        ("rl: 3\n", [], "rl is a section with keys of its own, such as rl.iterations"),
        (
            "sampling: {temperature: 0}\n",
            [],
            "sampling.temperature: input should be greater than 0",
        ),
        ("loss: {mean: sequence}\n", [], "loss.mean: input should be 'token', 'step' or 'episode'"),
        ("policy: {tiny: {heads: 5}}\n", [], "hidden_size must be a multiple of heads"),
        ("diagnose: {every: -1}\n", [], "diagnose.every: input should be greater than or equal"),
        ("diagnose: {every: 2.5}\n", [], "diagnose.every: input should be a valid integer"),
        ("diagnose: {probes: -3}\n", [], "diagnose.probes: input should be greater than or"),
        ("diagnose: {samples: 1}\n", [], "diagnose: samples must be 2 or more"),
        ("diagnose: {evry: 2}\n", [], "unknown key 'diagnose.evry'. Did you mean 'diagnose.every'"),
        ("correction: {below: 0.3}\n", [], "below (0.3) is larger than above (0.1), so an"),
        ("correction: {above: 1.5}\n", [], "correction.above: input should be less than or equal"),
        ("correction: {share: -1}\n", [], "correction.share: input should be greater than or"),
        ("correction: {window: 0}\n", [], "correction.window: input should be greater than 0"),
        ("correction: {kinds: [undo, undo]}\n", [], "correction: kinds names a kind twice"),
        ("correction: {kind: [undo]}\n", [], "Did you mean 'correction.kinds'"),
        ("lr: 1\n", [], "Did you mean 'cold_start.optimizer.lr' or 'rl.optimizer.lr'"),
        ("rl: {lr: 1}\n", [], "Did you mean 'rl.optimizer.lr'"),
        ("kl: 1\n", [], "Did you mean 'loss.kl'"),
        ("enviroment: {}\n", [], "Did you mean 'env'"),
        ("gcd: {wieght: 1}\n", [], "Did you mean 'gcd.weight'"),
        (
            "cold_start: {lessons: [take]}\n",
            [],
            "lessons.0 is a section with keys of its own, such as",
        ),
        (
            "cold_start: {lessons: [{steps: 3, commands: [take], step: 1}]}\n",
            [],
            "unknown key 'cold_start.lessons.0.step'",
        ),
        (
            "rl: {optimizer: {betas: [0.9, 1.0]}}\n",
            [],
            "rl.optimizer.betas.1: input should be less",
        ),
        ("env: {timeout_s: .inf}\n", [], "env.timeout_s: input should be less than or equal"),
        ("seed: 3\n", ["seed"], "not of the form section.key=value"),
        ("seed: 3\n", ["rl.lr.x=1"], "unknown key 'rl.lr'"),
        ("seed: 3\n", ["seed.x=1"], "'seed' holds a value, not a section"),
        ("seed: 3\n", ["rl.groups=[1"], "not valid YAML"),
    ],
)
def test_one_sentence(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_file_folder_and_binary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError):
        load_recipe(tmp_path / "b.yaml")


def test_every_key_is_listed_once() -> None:
    keys = all_keys(Recipe)
    assert len(keys) == len(set(keys))
    assert {"seed", "rl.optimizer.lr", "policy.tiny.layers"} <= set(keys)


def test_schedule() -> None:
    assert ScheduleConfig(kind="constant", start=0.5).at(0.7) == 0.5
    assert ScheduleConfig(kind="linear", start=1.0, end=0.0).at(0.25) == 0.75
    assert ScheduleConfig(kind="linear", start=1.0, end=0.0).at(2.0) == 0.0
