"""The documentation cannot drift: keys, defaults, exit codes, links and snippets are checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders import REF, make_episode, make_step
from untwine import errors
from untwine.config import Recipe, load_recipe
from untwine.config.keys import all_keys
from untwine.episodes import read_groups, write_groups
from untwine.records import Group, Label

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(path), re.MULTILINE | re.DOTALL)


def default_of(key: str) -> Any:
    value: Any = Recipe().model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def test_every_recipe_key_is_documented() -> None:
    text = read(DOCS / "recipes.md")
    missing = [key for key in all_keys(Recipe) if f"`{key}`" not in text]
    assert not missing, f"add to docs/recipes.md: {missing}"


def test_documented_defaults_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(.*?)` \|", read(DOCS / "recipes.md"), re.MULTILINE)
    assert len(rows) > 60
    for key, shown in rows:
        assert json.loads(shown) == default_of(key), key


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_load(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_blocks_are_recipes(path: Path, tmp_path: Path) -> None:
    for block in blocks(path, "yaml"):
        (tmp_path / "block.yaml").write_text(block, encoding="utf-8")
        load_recipe(tmp_path / "block.yaml")


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_overrides_in_commands_are_known(path: Path, tmp_path: Path) -> None:
    for line, key in overrides_in(path):
        assert key in KEYS or key.startswith("env.options."), line


KEYS = set(all_keys(Recipe))
COMMAND = r"untwine (?:train|evaluate|sweep|demo|diagnose) [^;]*"
OVERRIDE = r"[ ',](?!-)([a-z_]+(?:\.[a-z_]+)*)="


def overrides_in(path: Path) -> list[tuple[str, str]]:
    """(command, key) of every `section.key=` of an `untwine` command of a page, loops included."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.findall(COMMAND, line):
                text = re.sub(r"--arm ['\"]?\w+:", " ", command)
                found += [(line, key) for key in re.findall(OVERRIDE, text)]
    return found


def test_overrides_are_looked_for_in_every_kind_of_command() -> None:
    commands = {line for path in TEXTS for line, _ in overrides_in(path)}
    for kind in ("train", "evaluate", "sweep", "diagnose"):
        assert any(f"untwine {kind} " in line for line in commands), kind
    assert len(commands) > 12


def test_readme_shows_two_set_up_commands() -> None:
    section = read(ROOT / "README.md").partition("## Set up")[2].partition("\n## ")[0]
    assert re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL) == [
        "make demo\nmake test\n"
    ]
    assert len(read(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("command", ["make demo", "make test", "make lint", "make docs"])
def test_make_targets_exist(command: str) -> None:
    assert re.search(rf"^{command.split()[1]}:", read(ROOT / "Makefile"), re.MULTILINE)


def slug(heading: str) -> str:
    """Anchor of a heading, as GitHub and Python-Markdown make it for plain headings."""
    plain = re.sub(r"[`*]|\[|\]\(.*?\)", "", heading).strip().lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain))


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_internal_links_resolve(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", read(file), re.MULTILINE)
            assert anchor in {slug(h) for h in headings}, f"{path.name}: {target}"


def test_navigation_holds_every_page() -> None:
    def pages(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        children = node.values() if isinstance(node, dict) else node
        return [page for child in children for page in pages(child)]

    nav = yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"]
    assert sorted(pages(nav)) == sorted(p.relative_to(DOCS).as_posix() for p in PAGES)


def test_exit_codes_are_documented() -> None:
    text = read(DOCS / "troubleshooting.md")
    classes = [
        c
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, errors.UntwineError)
    ]
    assert len(classes) > 4
    for known in classes:
        code = known.exit_code if known is not errors.Interrupted else "130, 143"
        assert f"| {code} | `{known.__name__}` |" in text


def test_metric_keys_are_documented() -> None:
    from untwine.report.numbers import COLD_START_KEYS, RL_KEYS

    text = read(DOCS / "run-directory.md")
    assert not [key for key in [*RL_KEYS, *COLD_START_KEYS] if f"`{key}`" not in text]


def group() -> Group:
    """Two episodes: growing prompts, a fresh prompt, a missing advantage, a label."""
    steps = [
        make_step(0, prompt=(1, 2), action=(3, 4), advantage=0.25),
        make_step(
            1, prompt=(1, 2, 3, 4, 5), action=(6,), labels=(Label("rule", "flawed", "undo"),)
        ),
        make_step(
            2,
            prompt=(1, 9),
            action=(7, 8, 9),
            advantage=-1.5,
            allowed=((7,), (8, 3), (1, 2, 9)),
        ),
    ]
    return Group(REF, (make_episode(1.0, steps, id="a"), make_episode(0.0, steps[:1], id="b")))


def test_reader_in_the_docs_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "iter-000000.jsonl.gz"
    write_groups(path, [group(), group()])
    (code,) = blocks(DOCS / "episodes.md", "python")
    scope: dict[str, Any] = {}
    exec(code, scope)
    found = scope["read"](str(path))
    expected = [episode for g in read_groups(path) for episode in g.episodes]
    assert [e["id"] for e in found] == [e.id for e in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for step, reference in zip(ours["steps"], theirs.steps, strict=True):
            assert tuple(step["prompt_ids"]) == reference.prompt_ids
            assert tuple(step["action_ids"]) == reference.action_ids
            assert tuple(step["logprobs"]) == reference.logprobs
            assert step["advantage"] == reference.advantage
            expected_allowed = reference.allowed or ((),) * len(reference.action_ids)
            assert tuple(map(tuple, step["allowed"])) == expected_allowed
            assert step["state_key"] == reference.state_key


def test_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_groups(tmp_path / "runs/smoke/episodes/iter-000000.jsonl.gz", [group()])
    monkeypatch.chdir(tmp_path)
    for code in [
        *blocks(ROOT / "README.md", "python"),
        *blocks(DOCS / "environments.md", "python"),
        *blocks(DOCS / "diagnose/calibration.md", "python"),
    ]:
        exec(code, {})
    printed = capsys.readouterr().out
    assert "[score 1]" in printed
    assert "{'value': 0.5, 'interval': " in printed
    assert "rooms/fetch/0 1 go north None ['undo']" in printed
