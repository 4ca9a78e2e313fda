"""The records that travel through untwine, from environment to optimizer.

    Env -> Prompter -> Policy -> parser -> Step -> Episode -> Group -> credit -> Batch -> losses

All of them are frozen: a later stage never edits an earlier one, it makes a new record
(`Group.with_advantages`, `Group.with_labels`). `untwine.records` imports nothing from untwine, so
every room may depend on it.

Invariants (each has a test):

* Sampled token ids are kept and never retokenised; `Step.text` is for people.
* An absent advantage is `None`, never 0.
* A step knows the key of the state it was taken in, whether it was valid, and if not, why.
* Statistics of a group see each episode exactly once, whatever its length.
* A training batch can be rebuilt from the records on disk bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "flawed"]


@dataclass(frozen=True, slots=True)
class TaskRef:
    """One task instance: environment family, task name, variation number."""

    env: str
    task: str
    variation: int

    def __str__(self) -> str:
        return f"{self.env}/{self.task}/{self.variation}"


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment says after `reset` or `step`.

    text        what the policy may read
    state_key   canonical key of the environment's state: equal keys mean equal situations,
                across the episodes of one task instance
    score       raw score on the environment's own scale
    outcome     the same in [0, 1]; at the end of the episode this is the return R
    done        the environment is over (solved, failed, or its own step limit)
    success     the task is solved
    invalid     why the last command was not understood, or None
    admissible  commands that are valid now; None when the environment does not list them
    """

    text: str
    state_key: str
    score: float
    outcome: float
    done: bool
    success: bool
    invalid: str | None = None
    admissible: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Label:
    """A verdict on one step.

    source      who says so: rule, group, branch, expert, judge, or one's own as module:function
    verdict     good or flawed (docs/concepts.md)
    kind        the reason in one word: invalid, no_effect, repeat, undo, progress, ...
    confidence  in (0, 1]; a source in doubt gives no label at all
    """

    source: str
    verdict: Verdict
    kind: str
    confidence: float = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One decision: the state the policy read, the action it wrote, what came of it.

    prompt_ids    token ids of the acting prompt, exactly as the model read them
    action_ids    token ids as sampled, the end-of-turn token included when it was sampled
    logprobs      log-probability of each action id under the sampling policy (divided by the
                  temperature, before any truncation), len == len(action_ids)
    allowed       for each action id the ids it was chosen from, when the choice was constrained
                  to the admissible commands (the log-probabilities are then normalised over
                  these), none where the whole vocabulary was open; None: it always was
    text          the action decoded, for people
    thought       the part before the command, if any (the words inside think and reasoning tags)
    tag           the reasoning tag before the command, if any (prompting/tags.py)
    command       the command sent to the environment; None when the parser refused the text
    invalid       why the action was not valid, or None; set by the parser or the environment
    state_key     key of the state before the action
    observation   the text the policy saw before the action
    next_state_key, feedback, score, outcome, done: what the environment said after it
    reward        change of the outcome caused by this step
    """

    index: int
    state_key: str
    observation: str
    prompt_ids: tuple[int, ...]
    action_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    thought: str | None
    command: str | None
    invalid: str | None
    next_state_key: str
    feedback: str
    score: float
    outcome: float
    reward: float
    done: bool
    admissible: tuple[str, ...] | None = None
    allowed: tuple[tuple[int, ...], ...] | None = None
    labels: tuple[Label, ...] = ()
    advantage: float | None = None
    tag: str | None = None

    @classmethod
    def played(
        cls,
        index: int,
        before: Observation,
        command: str,
        after: Observation,
        *,
        prompt_ids: tuple[int, ...] = (),
        action_ids: tuple[int, ...] = (),
        allowed: tuple[tuple[int, ...], ...] | None = None,
        logprobs: tuple[float, ...] | None = None,
        text: str | None = None,
        labels: tuple[Label, ...] = (),
        advantage: float | None = None,
        tag: str | None = None,
    ) -> Step:
        """A step from what the environment said before and after it. The log-probabilities are 0
        unless given (no policy sampled it), and `text` is the command unless given."""
        return cls(
            index=index,
            state_key=before.state_key,
            observation=before.text,
            prompt_ids=prompt_ids,
            action_ids=action_ids,
            logprobs=(0.0,) * len(action_ids) if logprobs is None else logprobs,
            text=command if text is None else text,
            thought=None,
            command=command,
            invalid=after.invalid,
            next_state_key=after.state_key,
            feedback=after.text,
            score=after.score,
            outcome=after.outcome,
            reward=after.outcome - before.outcome,
            done=after.done,
            admissible=before.admissible,
            allowed=allowed,
            labels=labels,
            advantage=advantage,
            tag=tag,
        )

    def __post_init__(self) -> None:
        if len(self.action_ids) != len(self.logprobs):
            raise ValueError(
                f"step {self.index}: {len(self.action_ids)} action ids "
                f"but {len(self.logprobs)} log-probabilities"
            )
        if self.allowed is not None and len(self.allowed) != len(self.action_ids):
            raise ValueError(
                f"step {self.index}: {len(self.action_ids)} action ids "
                f"but {len(self.allowed)} sets of allowed ids"
            )
        if self.command is None and self.invalid is None:
            raise ValueError(f"step {self.index} has no command and no reason why")


@dataclass(frozen=True, slots=True)
class Episode:
    """The steps up to success, failure or the step limit.

    ended: success | failure | limit (our step limit, the environment went on)
    told: instructions that all its acting prompts carried (docs/methods/correction.md)
    """

    id: str
    ref: TaskRef
    goal: str
    steps: tuple[Step, ...]
    outcome: float
    score: float
    success: bool
    ended: Literal["success", "failure", "limit"]
    told: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return len(self.steps)

    @property
    def action_tokens(self) -> int:
        return sum(len(s.action_ids) for s in self.steps)


@dataclass(frozen=True, slots=True)
class Group:
    """G episodes of the same task instance, sampled by the same policy.

    returns  what counts as the return R of an episode: its outcome, or its success as 0 or 1
    """

    ref: TaskRef
    episodes: tuple[Episode, ...]
    returns: Literal["outcome", "success"] = "outcome"

    def __post_init__(self) -> None:
        foreign = [e.id for e in self.episodes if e.ref != self.ref]
        if foreign:
            raise ValueError(f"group {self.ref} holds episodes of other tasks: {foreign}")
        ids = [e.id for e in self.episodes]
        if len(set(ids)) != len(ids):
            raise ValueError(f"group {self.ref} holds an episode twice: {ids}")
        if len({e.told for e in self.episodes}) > 1:
            raise ValueError(f"group {self.ref} holds episodes that were told different things")

    @property
    def told(self) -> tuple[str, ...]:
        """Instructions that the acting prompts of all its episodes carried."""
        return self.episodes[0].told if self.episodes else ()

    @property
    def returns_G(self) -> tuple[float, ...]:
        """Return of each episode, in [0, 1], shape (G,); each episode counts once."""
        if self.returns == "success":
            return tuple(float(e.success) for e in self.episodes)
        return tuple(e.outcome for e in self.episodes)

    def with_advantages(self, advantages_GT: Sequence[Sequence[float | None]]) -> Group:
        """A copy whose steps carry the given advantages (None: the step is not trained on)."""
        return self._with("advantage", advantages_GT)

    def with_labels(self, labels_GT: Sequence[Sequence[tuple[Label, ...]]]) -> Group:
        """A copy whose steps carry the given labels."""
        return self._with("labels", labels_GT)

    def _with(self, field: str, values_GT: Sequence[Sequence[object]]) -> Group:
        episodes = []
        for episode, values in zip(self.episodes, values_GT, strict=True):
            steps = tuple(
                dataclasses.replace(step, **{field: value})  # type: ignore[arg-type]
                for step, value in zip(episode.steps, values, strict=True)
            )
            episodes.append(dataclasses.replace(episode, steps=steps))
        return dataclasses.replace(self, episodes=tuple(episodes))
