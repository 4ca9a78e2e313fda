"""Expert episodes, played in the environment: text for the tokenizer, data for the cold start."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from untwine.config import PromptConfig
from untwine.envs.pool import EnvPool, Lost, ResetRequest, StepRequest
from untwine.envs.protocol import ExpertKind, Reset
from untwine.envs.wandering import Command, first_word
from untwine.errors import EnvError
from untwine.gcd.labels import EXPERT_GOOD, OFF_PLAN
from untwine.policy.choices import CommandChoices, Node, allowed_along
from untwine.prompting.prompter import (
    COMPARE_SYSTEM,
    JUDGE_SYSTEM,
    JUDGING_WORDS,
    Prompter,
    reply_text,
    state_text,
    system_text,
)
from untwine.prompting.tags import expert_tags
from untwine.records import Episode, Label, Observation, Step, TaskRef


class Move(NamedTuple):
    """One command of a transcript, and what the environment showed before and after it."""

    before: Observation
    command: Command
    after: Observation


@dataclass(frozen=True, slots=True)
class Transcript:
    """A solved episode as text, before any model is known."""

    ref: TaskRef
    goal: str
    moves: tuple[Move, ...]

    def texts(self, prompt: PromptConfig, told: Sequence[str] = ()) -> Iterator[str]:
        """Everything that a tokenizer should know: the prompts and replies of the episode, written
        as an agent reads them, and the sentences it may be told."""
        yield system_text(prompt, told)
        yield from (JUDGE_SYSTEM, COMPARE_SYSTEM, JUDGING_WORDS)
        if prompt.tags:
            yield from (written for written, _ in replies(self, prompt))
        past = [(move.before.text, move.command.text) for move in self.moves]
        whole = prompt.model_copy(update={"history": len(past)})
        yield state_text(self.goal, past, self.moves[-1].after.text, whole)


def play_experts(
    pool: EnvPool,
    refs: Sequence[TaskRef],
    max_steps: int,
    *,
    noise: float = 0.0,
    seed: int = 0,
    valid_only: bool = False,
    expert: ExpertKind = "oracle",
    alternatives: int = 0,
    memory: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Transcript]:
    """Play the expert of every ref; refs without an expert, or whose plan fails or is longer than
    `max_steps`, are left out.

    noise   chance of an error at each step. Where the environment `replans`, the expert errs and
            then plans anew (envs/wandering.py); elsewhere another command of the same plan is put
            before the right one, so that such a demonstration may be longer than `max_steps`. A
            plan that fails because of it is played again without.
    valid_only  an expert that plans anew errs with commands that are valid, for policies that
                choose among these
    expert  who plays (EnvError where there is none such)
    memory  observations that an expert that searches remembers, the present one included; 0: all
    alternatives  so many other commands are judged beside each of the expert's (EnvError where the
            environment cannot plan from anywhere, or has no snapshots)
    """
    instances = [(ref.task, ref.variation) for ref in refs]
    plans: list[tuple[Command, ...] | None]
    searching = expert != "oracle"
    if searching and not pool.info.searches:
        raise EnvError(
            f"{pool.info.title} has no expert that searches; set cold_start.expert to oracle"
        )
    if alternatives and not (pool.info.replans and pool.info.snapshots):
        raise EnvError(
            f"{pool.info.title} cannot judge commands that were not given; set "
            "cold_start.alternatives to 0"
        )
    if searching or ((noise or alternatives) and pool.info.replans):
        plans = pool.wandering_experts(
            instances,
            noise=noise,
            max_steps=max_steps,
            seed=seed,
            valid_only=valid_only,
            expert=expert,
            alternatives=alternatives,
            memory=memory,
        )
        noise = 0.0
    else:
        plans = [tuple(map(Command, plan or ())) for plan in pool.experts(instances)]
    rng = random.Random(seed)
    waiting = [
        (ref, plan, _with_noise(plan, noise, rng))
        for ref, plan in zip(refs, plans, strict=True)
        if plan and len(plan) <= max_steps
    ]
    total, done = len(waiting), 0
    found: dict[TaskRef, Transcript] = {}
    for first in range(0, len(waiting), pool.slots):
        chunk = waiting[first : first + pool.slots]
        noisy = _play([(ref, moves) for ref, _, moves in chunk], pool)
        failed = [(ref, plan) for ref, plan, _ in chunk if ref not in noisy]
        found |= noisy | _play(failed, pool)
        done += len(chunk)
        if on_progress:
            on_progress(done, total)
    return [found[ref] for ref, _, _ in waiting if ref in found]


def demonstration(
    transcript: Transcript,
    prompter: Prompter,
    *,
    imitate_noise: bool = False,
    choices: CommandChoices | None = None,
    told: tuple[str, ...] = (),
) -> Episode:
    """The transcript as an episode for one model.

    Expert steps carry advantage 1 (they are imitated) and the label `expert`; noise steps carry no
    advantage unless `imitate_noise`, and the label `off_plan` where they are known to be.
    Log-probabilities are 0: nothing was sampled.

    choices   given when the policy chooses among the admissible commands: the steps then know what
              they were chosen from, and commands that are not admissible carry no advantage. Where
              the choice was luck, those that were as good are not among it
    told      sentences that the prompts carry
    """
    moves = transcript.moves
    first = moves[0].before
    conversation = prompter.begin(transcript.goal, first.text, first.admissible, told)
    steps = []
    said = replies(transcript, prompter.config)
    for index, ((before, command, after), (written, tag)) in enumerate(
        zip(moves, said, strict=True)
    ):
        action_ids = prompter.written_ids(written)
        allowed = None
        if choices and before.admissible:
            allowed = allowed_along(choices.among(before.admissible), action_ids)
            if allowed and command.chance:
                given = {move.command.text for move in moves[:index]}
                known = given if prompter.remembers else set()
                equals = as_good(command.text, before.admissible, known)
                allowed = without_luck(allowed, action_ids, choices.trie(equals))
        possible = choices is None or allowed is not None
        imitated = possible and (command.expert or imitate_noise)
        steps.append(
            Step.played(
                index,
                before,
                command.text,
                after,
                prompt_ids=conversation.prompt_ids,
                action_ids=action_ids,
                text=written,
                allowed=allowed,
                labels=_labels(command),
                advantage=1.0 if imitated else None,
                tag=tag,
            )
        )
        conversation.advance(action_ids, command.text, after.text, after.admissible)
    last = moves[-1].after
    return Episode(
        id=f"expert-{transcript.ref}",
        ref=transcript.ref,
        goal=transcript.goal,
        steps=tuple(steps),
        outcome=last.outcome,
        score=last.score,
        success=last.success,
        ended="success",
        told=told,
    )


def replies(transcript: Transcript, prompt: PromptConfig) -> list[tuple[str, str | None]]:
    """(text of the reply, its reasoning tag) for every move, as the expert would have written it.
    Tags come by rule (prompting/tags.py)."""
    commands = [move.command for move in transcript.moves]
    actions = [reply_text(prompt, command.text) for command in commands]
    if not prompt.tags:
        return [(action, None) for action in actions]
    steps = [Step.played(t, b, c.text, a) for t, (b, c, a) in enumerate(transcript.moves)]
    tags = expert_tags(transcript.goal, steps, [command.looks for command in commands])
    return [(f"{tagged}{action}", tagged.tag) for tagged, action in zip(tags, actions, strict=True)]


def as_good(command: str, admissible: Sequence[str], known: Collection[str]) -> list[str]:
    """The commands among which this one was drawn by luck, for all that is known: those that begin
    alike, but for those that are `known` to have been given."""
    first = first_word(command)
    alike = (c for c in admissible if first_word(c) == first and c not in known)
    return list(dict.fromkeys([command, *alike]))


def without_luck(
    allowed: Sequence[tuple[int, ...]], ids: Sequence[int], equals: Node
) -> tuple[tuple[int, ...], ...]:
    """The allowed ids of a reply, without those that begin another reply of the trie `equals`. So
    what is imitated is that the reply was none of the others; which of its equals was drawn is
    not."""
    found = []
    for among, token in zip(allowed, ids, strict=True):
        if not among:  # the text before the command
            found.append(among)
            continue
        found.append(tuple(i for i in among if i == token or i not in equals))
        equals = equals.get(token, {})
    return tuple(found)


def _labels(command: Command) -> tuple[Label, ...]:
    if command.expert:
        return (EXPERT_GOOD,)
    return (OFF_PLAN,) if command.off_plan else ()


def _with_noise(plan: Sequence[Command], noise: float, rng: random.Random) -> list[Command]:
    moves = []
    for command in plan:
        others = [other.text for other in plan if other.text != command.text]
        if others and noise and rng.random() < noise:
            moves.append(Command(rng.choice(others), expert=False))
        moves.append(command)
    return moves


def _play(
    jobs: Sequence[tuple[TaskRef, Sequence[Command]]], pool: EnvPool, tries: int = 3
) -> dict[TaskRef, Transcript]:
    """Play up to `pool.slots` command lists side by side; those that end in success."""
    if not jobs:
        return {}
    starts = pool.call(
        {slot: ResetRequest(ref.task, ref.variation) for slot, (ref, _) in enumerate(jobs)}
    )
    goals: dict[int, str] = {}
    now: dict[int, Observation] = {}
    moves: dict[int, list[Move]] = {slot: [] for slot in range(len(jobs))}
    lost: set[int] = set()
    for slot, reply in starts.items():
        if isinstance(reply, Reset):
            goals[slot], now[slot] = reply
        else:
            lost.add(slot)
    for k in range(max(len(commands) for _, commands in jobs)):
        requests = {
            slot: StepRequest(commands[k].text)
            for slot, (_, commands) in enumerate(jobs)
            if slot in now and k < len(commands) and not now[slot].done
        }
        for slot, reply in pool.call(requests).items():
            if isinstance(reply, Lost):
                lost.add(slot)
                del now[slot]
                continue
            assert isinstance(reply, Observation)
            moves[slot].append(Move(now[slot], jobs[slot][1][k], reply))
            now[slot] = reply
    done = {
        jobs[slot][0]: Transcript(jobs[slot][0], goals[slot], tuple(moves[slot]))
        for slot, observation in now.items()
        if observation.success
    }
    if lost:
        if tries == 1:
            raise EnvError("environment workers keep dying while experts are played")
        done |= _play([jobs[slot] for slot in sorted(lost)], pool, tries - 1)
    return done
