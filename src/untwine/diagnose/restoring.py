"""Back to the states of recorded episodes, verified.

Every episode is played once more, command by command, in its environment. At each step the text and
the state key that come back must be those on record; from the first difference on the episode is no
basis for a diagnosis, and is reported. States on the way are saved as snapshots where the
environment has them; elsewhere they are reached by sending the commands again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from untwine.envs.pool import (
    Beginning,
    EnvPool,
    Lost,
    ReplayRequest,
    ResetRequest,
    RestoreRequest,
    Snapshot,
    SnapshotRequest,
    StepRequest,
)
from untwine.envs.protocol import Reset
from untwine.errors import CheckpointError, EnvError
from untwine.prompting.prompter import Prompter, action_as_shown
from untwine.records import Episode, Observation
from untwine.rollout import Start

_TRIES = 3


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where a recorded episode could not be repeated.

    step   index of the step whose answer differed; -1: the first observation
    what   what differed: text or state
    """

    episode: str
    step: int
    what: str


def restore_points(
    pool: EnvPool, prompter: Prompter, wanted: Sequence[tuple[Episode, Sequence[int]]]
) -> tuple[dict[tuple[str, int], Start], list[Mismatch]]:
    """A `Start` (without a reply) before each wanted step of each episode, by (episode id, step).

    Steps up to and including the wanted one are verified, so a step whose own answer cannot be
    repeated is left out too. EnvError when workers keep dying; CheckpointError when the prompts
    on record are not those of this tokenizer and prompt layout.
    """
    starts: dict[tuple[str, int], Start] = {}
    mismatches: list[Mismatch] = []
    todo = [(episode, steps) for episode, steps in wanted if steps]
    for _ in range(_TRIES):
        lost: list[tuple[Episode, Sequence[int]]] = []
        for first in range(0, len(todo), pool.slots):
            part = todo[first : first + pool.slots]
            replays = [_Replay(*entry, pool.info.snapshots) for entry in part]
            _play(pool, replays)
            for entry, replay in zip(part, replays, strict=True):
                if replay.lost:
                    lost.append(entry)
                    continue
                starts |= _starts(replay, prompter)
                mismatches += [replay.mismatch] if replay.mismatch else []
        todo = lost
    if todo:
        raise EnvError(
            f"episode {todo[0][0].id} could not be replayed: its worker died {_TRIES} times"
        )
    return starts, mismatches


class _Replay:
    """One episode on its way through its own commands."""

    def __init__(self, episode: Episode, wanted: Sequence[int], snapshots: bool) -> None:
        self.episode = episode
        self.wanted = frozenset(wanted)
        self.snapshots = snapshots
        self.saved: dict[int, Beginning] = {}
        self.at = -1  # the step whose answer is due; -1: the first observation
        self.mismatch: Mismatch | None = None
        self.lost = False

    @property
    def over(self) -> bool:
        return self.lost or self.mismatch is not None or self.at > max(self.wanted)

    def save_request(self) -> SnapshotRequest | None:
        due = self.at in self.wanted and self.at not in self.saved
        return SnapshotRequest() if due and not self.over and self.snapshots else None

    def request(self) -> ResetRequest | StepRequest | None:
        """What to send next; None when nothing was sent at this step."""
        if self.at < 0:
            return ResetRequest(self.episode.ref.task, self.episode.ref.variation)
        command = self.episode.steps[self.at].command
        return None if command is None else StepRequest(command)

    def hear(self, answer: Reset | Observation | None) -> None:
        """Compare the answer with the record and go on to the next step."""
        steps = self.episode.steps
        if isinstance(answer, Reset):
            self._compare(answer.observation, steps[0].observation, steps[0].state_key)
        elif answer is not None:
            step = steps[self.at]
            self._compare(answer, step.feedback, step.next_state_key)
        self.at += 1

    def verified(self) -> list[int]:
        """The wanted steps that were repeated exactly."""
        end = self.mismatch.step if self.mismatch else self.at
        return sorted(t for t in self.wanted if t < end)

    def _compare(self, answer: Observation, text: str, state_key: str) -> None:
        if answer.state_key != state_key:
            self.mismatch = Mismatch(self.episode.id, self.at, "state")
        elif answer.text != text:
            self.mismatch = Mismatch(self.episode.id, self.at, "text")


def _play(pool: EnvPool, replays: Sequence[_Replay]) -> None:
    """All replays in step, one slot each."""
    while any(not replay.over for replay in replays):
        saves = {slot: r.save_request() for slot, r in enumerate(replays)}
        for slot, saved in pool.call({s: r for s, r in saves.items() if r}).items():
            if isinstance(saved, Snapshot):
                replays[slot].saved[replays[slot].at] = RestoreRequest(saved)
        requests = {slot: r.request() for slot, r in enumerate(replays) if not r.over}
        answers = pool.call({slot: r for slot, r in requests.items() if r})
        for slot in requests:
            answer = answers.get(slot)
            if isinstance(answer, Lost):
                replays[slot].lost = True
            else:
                assert not isinstance(answer, Snapshot)
                replays[slot].hear(answer)


def _starts(replay: _Replay, prompter: Prompter) -> dict[tuple[str, int], Start]:
    episode = replay.episode
    steps = episode.steps
    conversation = prompter.begin(
        episode.goal, steps[0].observation, steps[0].admissible, episode.told
    )
    found = {}
    verified = replay.verified()
    for t in range(max(verified, default=-1) + 1):
        if t:
            before = steps[t - 1]
            shown = action_as_shown(before.command, before.text)
            conversation.advance(before.action_ids, shown, before.feedback, steps[t].admissible)
        if conversation.prompt_ids != steps[t].prompt_ids:
            raise CheckpointError(
                f"step {t} of episode {episode.id} was played with another prompt than this model "
                "and recipe make; name the policy that played it with --checkpoint"
            )
        if t in verified:
            commands = tuple(s.command for s in steps[:t] if s.command is not None)
            replayed = ReplayRequest(episode.ref.task, episode.ref.variation, commands)
            back = replay.saved.get(t, replayed)
            found[episode.id, t] = Start(
                ref=episode.ref,
                goal=episode.goal,
                back=back,
                state_key=steps[t].state_key,
                observation=steps[t].observation,
                conversation=conversation.fork(),
                steps=steps[:t],
            )
    return found
