"""The reader of problems, grammars and game files: what it takes, and one sentence for the rest."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import alfworld_cases as cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untwine.envs.alfworld.game import build_game, display_names
from untwine.envs.alfworld.game_file import (
    MAX_BYTES,
    index_dataset,
    load_game,
    read_game_file,
)
from untwine.envs.alfworld.grammar import read_phrases
from untwine.envs.alfworld.problem import read_problem
from untwine.errors import EnvError

TYPE = "pick_heat_then_place_in_recep"


def problem_text() -> str:
    return str(cases.game_tree(TYPE)["pddl_problem"])


def test_a_problem_is_read_whole() -> None:
    problem = read_problem(problem_text(), "x")
    text = problem_text().lower()
    body = text[text.index("(:init") + 6 : text.index("(:goal")]
    expected = {tuple(x.split()) for x in re.findall(r"\(([^()]*)\)", body)}
    assert problem.facts == expected
    assert len(problem.objects) == len(re.findall(r"^ *\S+ - \S+$", text, re.M))


def test_names_are_those_of_the_demangler() -> None:
    ids = ["agent1", "appletype", "apple_bar__plus_01", "apple_bar__minus_01", "loc_bar_1"]
    ids += ["sink_bar_1_bar_sinkbasin", "sink_bar_1"]
    names = display_names(ids)
    assert names["apple_bar__minus_01"] == "apple 2"
    assert names["apple_bar__plus_01"] == "apple 1"
    assert names["sink_bar_1_bar_sinkbasin"] == "sinkbasin 1"
    assert names["sink_bar_1"] == "sink 1"
    assert names["agent1"] == "agent1 "


def _sub(pattern: str, by: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        changed = re.sub(pattern, by, text, count=1)
        assert changed != text
        return changed

    return change


FAULTS: dict[str, tuple[Callable[[str], str], str]] = {
    "unknown predicate": (_sub(r"\(pickupable", "(pickable"), "unknown predicate 'pickable'.*Did"),
    "arity": (_sub(r"\(pickupable ", "(pickupable agent1 "), "takes 1 arguments, not 2"),
    "wrong type": (_sub(r"\(pickupable \S+\)", "(pickupable agent1)"), "must be of type object"),
    "undeclared": (_sub(r"\(pickupable \S+\)", "(pickupable it)"), "not among the :objects"),
    "no type": (_sub(r"- location\s*\)", ")"), "has no type"),
    "unknown type": (_sub(r"- location", "- place"), "unknown type 'place'"),
    "truncated": (lambda text: text[: len(text) // 2], "truncated"),
    "unbalanced": (lambda text: text + ")", "after the last"),
    "deep": (lambda text: "(" * 5000, "nested deeper"),
    "empty": (lambda text: "", "truncated"),
    "markup": (_sub(r"agent1", "<b>agent1</b>"), "has characters other than"),
    "not ascii": (_sub(r"agent1", "agent\u0661"), "not ASCII"),
    "twice": (_sub(r"agent1 - agent", "agent1 - agent agent1 - agent"), "declared twice"),
    "two agents": (_sub(r"agent1 - agent", "agent1 bob - agent"), "exactly one agent"),
    "no place": (_sub(r"\(atLocation agent1 \S+\)", ""), "exactly one location, not at 0"),
    "domain": (_sub(r":domain alfred", ":domain blocks"), "another domain"),
    "section": (_sub(r":init", ":start"), "unknown section ':start'"),
    "no goal": (lambda text: text[: text.index("(:goal")] + ")", "lacks the section :goal"),
    "goal": (_sub(r"\(isHot \?o\)", "(isHot ?x)"), "not declared"),
    "goal arity": (_sub(r"\(isHot \?o\)", "(not)"), "takes 1 parts"),
    "contradiction": (_sub(r":init", r":init (not (holdsAny agent1)) (holdsAny agent1)"), "both"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_problem_is_one_sentence(fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(EnvError, match=message) as caught:
        read_problem(change(problem_text()), "game file /x/game.tw-pddl")
    assert "game file /x/game.tw-pddl" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_cyclic_containment_is_refused() -> None:
    things = re.findall(r"\(objectType (\S+) ", problem_text())[:3]
    ring = zip(things, (*things[1:], things[0]), strict=True)
    facts = " ".join(f"(inReceptacleObject {a} {b})" for a, b in ring)
    with pytest.raises(EnvError, match="cyclic containment"):
        read_problem(problem_text().replace("(:init", f"(:init {facts}"), "x")


def test_a_goal_too_large_to_be_written_out_is_refused() -> None:
    text = problem_text()
    variables = " ".join(f"?x{i}" for i in range(9))
    goal = f"(:goal (exists ({variables} - object) (and (isHot ?x0) (isClean ?x8)))))"
    problem = read_problem(text[: text.index("(:goal")] + goal, "x")
    tree = cases.game_tree(TYPE)
    phrases = read_phrases(tree["grammar"], tree["pddl_domain"], "x")
    with pytest.raises(EnvError, match="too many variables"):
        build_game(problem, phrases, "x")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("grammar", _sub("You close the", "You shut the"), "rule 'CloseObject.feedback'"),
        ("grammar", _sub('template :: "open', 'template :: "unlock'), "action 'OpenObject'"),
        ("grammar", _sub("Your task is to: ", "Your task is to: {__import__('os')}"), "markup"),
        ("grammar", lambda text: text[:5000], "stands in the grammar where"),
        ("grammar", lambda text: "", "rule 'intro'"),
        ("pddl_domain", _sub(r"\(holds \?a \?o\)", "(holdsAny ?a)"), "'examineobject' of its PDDL"),
        ("pddl_domain", lambda text: text[:3000], "truncated"),
    ],
)
def test_other_grammars_and_domains_are_refused(
    tmp_path: Path, key: str, change: Callable[[str], str], message: str
) -> None:
    tree = cases.game_tree(TYPE)
    tree[key] = change(tree[key])
    with pytest.raises(EnvError, match=message):
        load_game(cases.write_game(tmp_path, tree))


def test_the_short_way_reads_a_grammar_as_the_long_way_does() -> None:
    tree = cases.game_tree(TYPE)
    grammar, domain = tree["grammar"], tree["pddl_domain"]
    short = read_phrases(grammar, domain, "x")
    assert short == read_phrases(grammar + "\n", domain + "\n", "x")
    assert short.task == cases.fixtures()["games"][TYPE]["task"] + "."
    assert (short.old_put, short.old_goto) == (False, False)
    assert (short.help_text or "").startswith("Available commands:\n  look: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON, or is truncated"),
        (b'{"pddl_problem": "(de', "not JSON, or is truncated"),
        (b"[1, 2]", "no JSON object"),
        (b'{"a": 1}', "no text 'pddl_problem'"),
        (b"[" * 200_000, "not JSON, or is truncated"),
        (b"\xff\xfe\x00\x01", "not JSON, or is truncated"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "game.tw-pddl"
    path.write_bytes(content)
    with pytest.raises(EnvError, match=message) as caught:
        load_game(path)
    assert str(path) in str(caught.value)


def test_a_huge_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "game.tw-pddl"
    with path.open("wb") as stream:
        stream.truncate(5 * MAX_BYTES)  # sparse: reading it would cost 100 MB
    with pytest.raises(EnvError, match="has 100 MB"):
        load_game(path)
    with pytest.raises(EnvError, match="cannot be read"):
        load_game(tmp_path / "nowhere")


def test_a_dataset_is_indexed_with_reasons(tmp_path: Path) -> None:
    root = tmp_path / "json_2.1.1"
    for number, task_type in enumerate(cases.task_types()):
        split = ("train", "valid_seen", "valid_unseen")[number % 3]
        cases.write_fixture(root / split / f"{task_type}-X" / "trial_1", task_type)
    tree = cases.game_tree(TYPE)
    trajectory = {"task_type": TYPE}
    train = root / "train"
    cases.write_game(train / "pick_and_place_with_movable_recep-X" / "t", tree, trajectory)
    cases.write_game(train / f"{TYPE}-AppleSliced" / "t", tree, trajectory)
    cases.write_game(train / "a", {**tree, "solvable": False}, trajectory)
    unsaid = {k: v for k, v in tree.items() if k != "solvable"}
    cases.write_game(train / "b", unsaid, trajectory)
    cases.write_game(train / "c", {**tree, "pddl_problem": "("}, trajectory)
    (train / "d").mkdir()
    (train / "d" / "traj_data.json").write_text(json.dumps(trajectory))
    seen: list[int] = []
    index = index_dataset(tmp_path, lambda done, of, path: seen.append(done), check=True)
    assert index.folder == root
    assert index.count == 6
    assert seen == list(range(1, 13))
    reasons = " | ".join(index.reasons())
    for part in ("movable", "not solvable", "does not say", "truncated", "no game.tw-pddl"):
        assert part in reasons
    assert sum(index.reasons().values()) == 6
    with pytest.raises(EnvError, match="has no ALFWorld games"):
        index_dataset(tmp_path / "elsewhere")


def test_the_file_says_what_is_in_it(tmp_path: Path) -> None:
    file = read_game_file(cases.write_fixture(tmp_path, TYPE))
    assert (file.task_type, file.solvable) == (TYPE, True)
    bare = cases.write_game(tmp_path / f"{TYPE}-Mug" / "t", {**cases.game_tree(TYPE)})
    assert read_game_file(bare).task_type == TYPE


@functools.cache
def _bytes() -> bytes:
    return json.dumps(cases.game_tree(TYPE)).encode()


def _reads_or_refuses(folder: Path, content: bytes) -> None:
    path = folder / f"{os.getpid()}.tw-pddl"
    path.write_bytes(content)
    fault = f"{path} is sound"
    try:
        load_game(path)
    except EnvError as error:
        fault = str(error)
    assert str(path) in fault
    assert "\n" not in fault


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300))
def test_fuzz_random_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    _reads_or_refuses(tmp_path_factory.getbasetemp(), content)


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1), drop=st.integers(0, 2000))
def test_fuzz_truncations(tmp_path_factory: pytest.TempPathFactory, cut: float, drop: int) -> None:
    content = _bytes()
    place = int(cut * len(content))
    _reads_or_refuses(tmp_path_factory.getbasetemp(), content[:place])
    _reads_or_refuses(tmp_path_factory.getbasetemp(), content[:place] + content[place + drop :])


@settings(max_examples=80, deadline=None)
@given(
    field=st.sampled_from(["pddl_problem", "grammar", "pddl_domain"]),
    edits=st.lists(
        st.tuples(
            st.floats(0, 1),
            st.integers(0, 12),
            st.one_of(
                st.text(max_size=8),
                st.sampled_from(
                    ["(", ")", " - ", "?", ";", '"', '"""', "::", "{", "}", "(not ", "exists",
                     "forall", "agent1", "\u0000", "\u2028", "(= a 1)", "\\", "#", "- object"]
                ),
            ),
        ),
        min_size=1,
        max_size=6,
    ),
)  # fmt: skip
def test_fuzz_mutations(
    tmp_path_factory: pytest.TempPathFactory, field: str, edits: list[tuple[float, int, str]]
) -> None:
    tree = cases.game_tree(TYPE)
    text = tree[field]
    for where, drop, put in edits:
        place = int(where * len(text))
        text = text[:place] + put + text[place + drop :]
    _reads_or_refuses(tmp_path_factory.getbasetemp(), json.dumps({**tree, field: text}).encode())


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=6,
    ),
    field=st.sampled_from(["pddl_problem", "grammar", "pddl_domain", "solvable", "walkthrough"]),
)
def test_fuzz_foreign_values(
    tmp_path_factory: pytest.TempPathFactory, value: object, field: str
) -> None:
    tree = {**cases.game_tree(TYPE), field: value}
    _reads_or_refuses(tmp_path_factory.getbasetemp(), json.dumps(tree).encode())
