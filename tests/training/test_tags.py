"""Reasoning tags from the expert to the optimizer, in small whole runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.gcd.test_training import recipe
from tests.runs import cold_start_of, in_one_and_in_two, rows
from untwine.config import Recipe
from untwine.credit.rlvmr import rlvmr
from untwine.demonstrations import demonstration
from untwine.episodes import read_groups
from untwine.errors import ConfigError
from untwine.progress import Display
from untwine.prompting.parser import parse_reply
from untwine.prompting.tags import TAGS
from untwine.workshop import Workshop


def tagged(iterations: int, **changes: Any) -> Recipe:
    """RLVMR with a cold start just long enough for replies that can be read."""
    sections: dict[str, Any] = {
        "prompt": {"tags": True, "layout": "window", "history": 1},
        "sampling": {"constrained": False, "max_new_tokens": 80},
        "credit": {"name": "rlvmr"},
        "cold_start": {"steps": 60, "batch_tokens": 1024, "optimizer": {"lr": 1.0e-2}},
    }
    return recipe(iterations, **(sections | changes))


def test_expert_replies_are_what_the_parser_reads() -> None:
    """With errors of the expert, as in the cold start; in all four forms of a reply."""
    own = tagged(1, cold_start={"episodes": 12, "noise": 0.8})
    with Workshop(own, Display(quiet=True)) as workshop:
        chat = workshop.policy.chat
        found = set()
        for transcript in workshop.transcripts:
            episode = demonstration(transcript, workshop.collector.prompter)
            for step in episode.steps:
                text, ended = chat.decode(step.action_ids)
                assert (text, ended) == (step.text, True)
                reply = parse_reply(text, ended=ended, thoughts=False, tags=True)
                assert (reply.command, reply.tag) == (step.command, step.tag)
                both = parse_reply(text, ended=ended, thoughts=True, tags=True)
                assert both == reply
                found.add(step.tag)
            assert episode.steps[0].tag == "planning"
    assert found <= set(TAGS)
    assert {"planning", "reflection", "explore"} <= found


def test_a_reply_with_tags_must_have_room() -> None:
    own = tagged(1, sampling={"constrained": False, "max_new_tokens": 6})
    with (
        Workshop(own, Display(quiet=True)) as workshop,
        pytest.raises(ConfigError, match=r"raise sampling\.max_new_tokens \(now 6\) to \d\d "),
    ):
        cold_start_of(workshop)


def test_only_what_is_free_needs_room() -> None:
    """A chosen command comes to its end whatever the limit, so it is not counted."""
    free = _tokens_wanted(constrained=False)
    chosen = _tokens_wanted(constrained=True)
    assert chosen < free


def _tokens_wanted(constrained: bool) -> int:
    own = tagged(1, sampling={"constrained": constrained, "max_new_tokens": 6})
    with (
        Workshop(own, Display(quiet=True)) as workshop,
        pytest.raises(ConfigError, match="with their tags the expert's replies") as caught,
    ):
        cold_start_of(workshop)
    found = re.search(r"up to (\d+) tokens", str(caught.value))
    assert found is not None
    enough = {"constrained": constrained, "max_new_tokens": int(found[1])}
    with Workshop(tagged(1, sampling=enough), Display(quiet=True)) as workshop:
        cold_start_of(workshop)
    return int(found[1])


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path: Path) -> None:
    whole, _ = in_one_and_in_two(tmp_path, tagged, 3)

    files = sorted((whole / "episodes").glob("*.jsonl.gz"))
    assert len(files) == 3
    seen = []
    for row, file in zip(rows(whole), files, strict=True):
        groups = read_groups(file)
        for group in groups:
            recorded = [[step.advantage for step in e.steps] for e in group.episodes]
            assert recorded == rlvmr(group)
        steps = [step for g in groups for e in g.episodes for step in e.steps]
        shares = {tag: sum(s.tag == tag for s in steps) / len(steps) for tag in TAGS}
        assert row.get("tags", dict.fromkeys(TAGS, 0.0)) == pytest.approx(shares)
        assert all((step.tag is None) == (step.command is None) for step in steps)
        seen += [step.tag for step in steps]
    assert any(seen)
