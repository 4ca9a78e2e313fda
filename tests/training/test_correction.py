"""Prompt-based correction: when sentences are on, who is told, and whole small runs with it."""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gcd.test_training import recipe
from tests.runs import in_one_and_in_two, rows
from tests.training.test_resume import RECIPE, assert_same, finish, start, wait_for
from untwine.batch import policy_rows
from untwine.config import CorrectionConfig, PromptConfig, Recipe
from untwine.demonstrations import demonstration
from untwine.diagnose.restoring import restore_points
from untwine.envs.rooms import INFO
from untwine.episodes import read_groups
from untwine.errors import ConfigError
from untwine.gcd.labels import rule_labels
from untwine.progress import Display
from untwine.prompting.corrections import instructions
from untwine.records import Group
from untwine.rollout import Collector
from untwine.training.cold_start import instructed
from untwine.training.correction import Correction, frequency, share_told, switched_on
from untwine.training.loop import train
from untwine.training.run_dir import RunDir, episode_files
from untwine.workshop import Workshop

QUIET = Display(quiet=True)
ALWAYS = {"kinds": ["invalid", "repeat"], "above": 0.0, "below": 0.0, "share": 0.5}


def corrected(iterations: int, **changes: Any) -> Recipe:
    """Free writing from a short cold start, so that most commands are flawed."""
    sections: dict[str, Any] = {
        "sampling": {"constrained": False, "max_new_tokens": 6},
        "rl": {"groups": 4, "drop_constant_groups": False},
        "correction": ALWAYS,
        "cold_start": {"instructed": 0.5, "imitate_noise": True},
    }
    return recipe(iterations, **(sections | changes))


def row(kind: str, on: int, **seen: tuple[float, int]) -> dict[str, Any]:
    """Metrics of an iteration: share of the kind and steps, for `told` and `plain`."""
    return {
        "correction_on": {kind: on},
        "correction_steps": {name: steps for name, (_, steps) in seen.items()},
        **{f"correction_{name}": {kind: share} for name, (share, _) in seen.items()},
    }


# When


def test_a_sentence_comes_in_above_and_goes_out_below() -> None:
    config = CorrectionConfig(kinds=["undo"], above=0.3, below=0.1)
    shares = [0.29, 0.3, 0.2, 0.1, 0.09, 0.2, 0.31, 0.05]
    expected = [False, True, True, True, False, False, True, False]
    state = 0
    for share, on in zip(shares, expected, strict=True):
        found = switched_on(config, [row("undo", state, plain=(share, 10))])
        assert found == (("undo",) if on else ())
        state = int(on)
    assert switched_on(config, []) == ()


def test_the_frequency_is_that_of_episodes_that_were_told_nothing() -> None:
    rng = random.Random(0)
    found = []
    flawed: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    for _ in range(5):
        seen = {}
        for name in ("told", "plain"):
            n = rng.randint(1, 40)
            bad = rng.randint(0, n)
            flawed[name] += bad
            steps[name] += n
            seen[name] = (bad / n, n)
        found.append(row("undo", 1, **seen))
    assert frequency("undo", found) == pytest.approx(flawed["plain"] / steps["plain"])
    everyone = [row("undo", 1, told=(0.25, 4)), row("undo", 1, told=(0.5, 12))]
    assert frequency("undo", everyone) == (1 + 6) / 16
    assert frequency("undo", [{}]) is None


def test_the_share_falls_linearly_and_ends_at_zero() -> None:
    free = CorrectionConfig(share=0.6)
    forced = CorrectionConfig(share=0.6, anneal=0.5)
    at = [0.0, 0.125, 0.25, 0.5, 0.75, 1.0]
    assert [share_told(free, p) for p in at] == [0.6] * 6
    assert [share_told(forced, p) for p in at] == pytest.approx([0.6, 0.45, 0.3, 0, 0, 0])
    assert share_told(CorrectionConfig(share=1.0, anneal=1.0), 1.0) == 0.0


def test_as_many_groups_are_told_as_the_share_says() -> None:
    only = {**ALWAYS, "kinds": ["repeat"], "share": 0.3}
    own = recipe(1, correction=only, rl={"groups": 8})
    correction = Correction(own)
    assert correction.decide(0, 0.0).told == ((),) * 8  # nothing is known yet
    correction.learn(row("repeat", 0, plain=(0.2, 10)))
    shown = [correction.decide(i, 0.0) for i in range(400)]
    counts = [sum(bool(t) for t in s.told) for s in shown]
    assert set(counts) == {2, 3}
    assert sum(counts) / 400 == pytest.approx(2.4, abs=0.1)
    each = [sum(bool(s.told[g]) for s in shown) for g in range(8)]
    assert min(each) > 80  # 120 of 400 expected
    sentence = instructions(own.correction)["repeat"]
    assert {t for s in shown for t in s.told} == {(), (sentence,)}
    assert shown == [correction.decide(i, 0.0) for i in range(400)]
    assert all(s.on == ("repeat",) for s in shown)


@pytest.mark.parametrize("kinds", [{"kinds": ["repaet"]}, {"sentences": {"undo": ""}}])
def test_mistakes_are_said_before_anything_is_made(tmp_path: Path, kinds: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^correction\.(kinds|sentences)"):
        train(corrected(1, correction=kinds), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


# Whole runs


def groups_of(run: Path, iteration: int) -> list[Group]:
    return read_groups(episode_files(run)[iteration])


def test_a_run_in_two_parts_is_the_run_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[Group]] = []
    save = RunDir.save_groups

    def keep(self: RunDir, iteration: int, groups: Any) -> Path:
        kept.append(list(groups))
        return save(self, iteration, groups)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save_groups", keep)
        whole, _ = in_one_and_in_two(tmp_path, corrected, 3)
    kept = kept[:3]  # those of the run in one part

    found = rows(whole)
    assert [r["correction_groups"] for r in found] == [0, 2, 2]
    assert [r["correction_on"] for r in found] == [
        {"invalid": int(i > 0), "repeat": int(i > 0)} for i in range(3)
    ]
    known = instructions(CorrectionConfig())
    sentences = (known["invalid"], known["repeat"])
    for iteration, before in enumerate(kept):
        groups = groups_of(whole, iteration)
        assert [g.told for g in groups] == [g.told for g in before]
        for ours, theirs in zip(
            policy_rows(groups, "token"), policy_rows(before, "token"), strict=True
        ):
            for field in ("ids", "targets", "weights", "old_logprobs", "advantages"):
                np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
        for name in ("told", "plain"):
            own = [g for g in groups if bool(g.told) == (name == "told")]
            if not own:
                assert f"correction_{name}" not in found[iteration]
                continue
            assert {g.told for g in own} == {sentences if name == "told" else ()}
            labels = [x for g in own for table in rule_labels(g, INFO) for x in table]
            kinds = Counter(x.kind for x in labels if x is not None and x.verdict == "flawed")
            expected = {k: kinds[k] / len(labels) for k in known}
            assert found[iteration][f"correction_{name}"] == pytest.approx(expected)
            assert found[iteration]["correction_steps"][name] == len(labels)
            solved = [e.success for g in own for e in g.episodes]
            success = found[iteration]["correction_success"][name]
            assert success == pytest.approx(sum(solved) / len(solved))

    with Workshop(corrected(3), QUIET, whole / "model") as workshop:
        decode = workshop.policy.tokenizer.decode
        for iteration in range(3):
            for group in groups_of(whole, iteration):
                for step in (s for e in group.episodes for s in e.steps):
                    text = decode(step.prompt_ids)
                    assert text.count(" ".join(sentences)) == bool(group.told)
        # the microscope comes back to their states
        episodes = [e for g in groups_of(whole, 2) if g.told for e in g.episodes]
        starts, mismatches = restore_points(
            workshop.pool, workshop.collector.prompter, [(e, range(e.length)) for e in episodes]
        )
        assert not mismatches
        assert len(starts) == sum(e.length for e in episodes)


@pytest.mark.parametrize("section", ["correction", "cold_start"])
def test_the_tokenizer_from_scratch_knows_the_words(section: str) -> None:
    """Their words are tokens, which they are not where no recipe speaks of them."""
    tiny = {**RECIPE["policy"]["tiny"], "vocab_size": 900}  # type: ignore[index]
    known = instructions(CorrectionConfig()).values()
    words = sum(len(sentence.split()) + 1 for sentence in known)  # and the full stop
    changes = {"correction": {"kinds": ["undo"]}, "cold_start": {"instructed": 0.5}}
    pieces = []
    for chosen in ({}, {section: changes[section]}):
        with Workshop(recipe(1, policy={"tiny": tiny}, **chosen), QUIET) as workshop:
            chat = workshop.policy.chat
            pieces.append(sum(len(chat.word_ids(sentence)) for sentence in known))
    assert pieces[0] > 1.5 * words
    assert pieces[1] <= words


def test_evaluation_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[bool, set[tuple[str, ...]]] = {True: set(), False: set()}
    collect = Collector.collect

    def spy(self: Collector, *arguments: Any, **options: Any) -> Any:
        groups, stats = collect(self, *arguments, **options)
        told[options["prefix"] == "eval-"] |= {e.told for g in groups for e in g.episodes}
        return groups, stats

    monkeypatch.setattr(Collector, "collect", spy)
    train(corrected(2, evaluate={"every": 1}), tmp_path / "run", QUIET)
    assert told[True] == {()}
    assert len(told[False]) == 2


def test_the_sentences_go_at_the_end_of_a_budget_of_tokens(tmp_path: Path) -> None:
    """Annealing goes by whatever ends the run first."""
    always = {**ALWAYS, "share": 1.0, "anneal": 0.9}
    train(corrected(3, correction=always), tmp_path / "free", QUIET)
    assert [r["correction_share"] for r in rows(tmp_path / "free")] == pytest.approx(
        [1.0, 1 - 0.5 / 0.9, 0.0]
    )
    spent = [r["policy_tokens"] + r.get("gcd_tokens", 0) for r in rows(tmp_path / "free")]
    budget = 2 * spent[0]
    run = tmp_path / "run"
    train(corrected(9, correction=always, rl={"token_budget": budget}), run, QUIET)
    found = rows(run)
    used = 0.0
    for i, r in enumerate(found):
        assert r["correction_share"] == pytest.approx(1 - max(i / 8, used / budget) / 0.9)
        used += r["policy_tokens"] + r.get("gcd_tokens", 0)
    assert used >= budget


def test_choice_among_commands_works_with_it(tmp_path: Path) -> None:
    own = corrected(2, sampling={"constrained": True}, prompt={"layout": "window", "history": 1})
    train(own, tmp_path / "run", QUIET)
    groups = groups_of(tmp_path / "run", 1)
    assert any(group.told for group in groups)
    for step in (s for g in groups for e in g.episodes for s in e.steps):
        assert step.command in (step.admissible or ())


@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_experts_are_told_not_to_do_what_they_do_not_do(noise: float) -> None:
    cold = {"instructed": 0.5, "imitate_noise": True, "noise": noise, "episodes": 40}
    own = corrected(1, cold_start=cold)
    by_sentence = {sentence: kind for kind, sentence in instructions(own.correction).items()}
    with Workshop(own, QUIET) as workshop:
        prompter = workshop.collector.prompter
        episodes = [demonstration(t, prompter, imitate_noise=True) for t in workshop.transcripts]
        told = instructed(episodes, workshop.info, own)
        assert told == instructed(episodes, workshop.info, own)
        assert prompter.config == PromptConfig()
    share = sum(bool(sentences) for sentences in told) / len(told)
    assert 0.25 < share < 0.75
    left_out = 0
    for episode, sentences in zip(episodes, told, strict=True):
        labels = rule_labels(Group(episode.ref, (episode,)), INFO)[0]
        did = {x.kind for x in labels if x is not None and x.verdict == "flawed"}
        assert not did & {by_sentence[sentence] for sentence in sentences}
        left_out += len(did)
    assert (left_out > 0) == (noise > 0)


def test_a_killed_run_is_told_the_same(tmp_path: Path) -> None:
    own = corrected(5, evaluate={"every": 2})
    file = tmp_path / "recipe.yaml"
    file.write_text(own.to_yaml(), encoding="utf-8")
    run, reference = tmp_path / "run", tmp_path / "reference"
    process = start(str(file), "--run", str(run))
    wait_for(run, "rl", 3, process)
    process.send_signal(signal.SIGKILL)
    assert finish(process) == -9
    train(own, run, QUIET, resume=True)
    train(own, reference, QUIET)
    assert_same(run, reference)
