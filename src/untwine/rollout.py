"""From task instances to groups of episodes.

Each slot of the pool goes its own way: it reads an observation, replies, acts, and begins the next
episode when the last one is over. Every forward pass serves all slots whose reply is under way.
With worker processes the slots are split into waves, and the environments of one act while the
policy replies for the next (docs/rollout.md). Which slot goes when never depends on time, so a
rollout can be repeated exactly. An episode whose worker died is begun again and counted, so none is
lost.

An episode may also begin in the middle of another one (`Start`), perhaps with a given reply: that
is how steps are judged by branching (diagnose/branching.py).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from untwine.config import PromptConfig, SamplingConfig, lists_commands
from untwine.envs.pool import Beginning, EnvPool, EpisodeAnswer, Lost, ResetRequest, StepRequest
from untwine.envs.protocol import Reset
from untwine.errors import EnvError, UntwineError
from untwine.policy.choices import Choices
from untwine.policy.loading import Policy
from untwine.policy.sampler import Sample, Sampler
from untwine.prompting.choosing import command_choices
from untwine.prompting.parser import PROBLEM_FEEDBACK, Reply, parse_reply
from untwine.prompting.prompter import Conversation, Prompter, action_as_shown
from untwine.records import Episode, Group, Observation, Step, TaskRef

_MAX_RETRIES = 5


@dataclass(slots=True)
class RolloutStats:
    """What a rollout cost. `episodes_lost` were begun again; none is missing."""

    env_steps: int = 0
    episodes_lost: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """A moment of an episode from which to play on.

    back          brings an environment there
    state_key     of the state there; an environment with another one is not there
    observation   what the policy read last
    conversation  all that the policy has read
    steps         played before; they count for the step limit
    reply         given instead of the first sampled one
    """

    ref: TaskRef
    goal: str
    back: Beginning
    state_key: str
    observation: str
    conversation: Conversation
    steps: tuple[Step, ...]
    reply: Sample | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    index: int  # position in the result
    ref: TaskRef
    id: str
    start: Start | None = None
    tries: int = 0
    told: tuple[str, ...] = ()

    @property
    def beginning(self) -> Beginning:
        return self.start.back if self.start else ResetRequest(self.ref.task, self.ref.variation)


@dataclass(slots=True)
class _Live:
    """An episode under way in one slot."""

    job: _Job
    goal: str
    conversation: Conversation
    observation: Observation
    steps: list[Step] = field(default_factory=list)
    reply: Sample | None = None  # given instead of the next sampled one


@dataclass(frozen=True, slots=True)
class _Act:
    """What a slot replied; its command, if there is one, is with the environment."""

    sample: Sample
    text: str
    reply: Reply


class Collector:
    """Plays episodes with a policy in a pool of environments."""

    def __init__(
        self,
        policy: Policy,
        pool: EnvPool,
        max_steps: int,
        prompt: PromptConfig,
        sampling: SamplingConfig,
    ) -> None:
        self.policy = policy
        self.pool = pool
        self.info = pool.info
        self.max_steps = max_steps
        self.prompt = prompt
        self.sampling = sampling
        self.prompter = Prompter(policy.chat, prompt)
        self.choices = command_choices(self.prompter) if sampling.constrained else None
        waves = sampling.waves or (2 if self.info.remote else 1)
        self.waves = min(waves, pool.slots) if pool.workers else 1
        if lists_commands(prompt, sampling) and not self.info.lists_commands:
            raise EnvError(
                f"environment {self.info.name!r} cannot list admissible commands; set "
                "prompt.list_admissible, prompt.only_admissible and sampling.constrained to false"
            )

    def collect(
        self,
        refs: Sequence[TaskRef],
        group_size: int,
        generator: torch.Generator,
        *,
        prefix: str = "",
        told: Sequence[tuple[str, ...]] = (),
        greedy: bool = False,
        temperature: float | None = None,
        on_turn: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Group], RolloutStats]:
        """One group of `group_size` episodes for every ref, in the order of `refs`.

        prefix   begins the ids of the episodes
        told     for each ref, sentences that the prompts of all its episodes carry; none by default
        temperature  instead of `sampling.temperature`
        on_turn  called before every turn with (episodes done, episodes in all); may raise to stop
        """
        sentences = told or [()] * len(refs)
        jobs = [
            _Job(i * group_size + g, ref, f"{prefix}{i:03d}-{g:02d}", told=said)
            for i, (ref, said) in enumerate(zip(refs, sentences, strict=True))
            for g in range(group_size)
        ]
        sampling = self.sampling
        if temperature is not None:
            sampling = sampling.model_copy(update={"temperature": temperature})
        sampler = Sampler(self.policy, sampling, generator, greedy=greedy)
        play = _Play(self, sampler, deque(jobs), on_turn)
        finished, stats = play.run()
        episodes = [episode for episode in finished if episode is not None]
        groups = [
            Group(ref, tuple(episodes[i * group_size : (i + 1) * group_size]))
            for i, ref in enumerate(refs)
        ]
        return groups, stats

    def play_on(
        self,
        starts: Sequence[Start],
        generator: torch.Generator,
        *,
        on_turn: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Episode | None], RolloutStats]:
        """One episode for every start, its earlier steps included; None where the environment did
        not come back to the state it should be in."""
        jobs = [_Job(i, start.ref, f"{i:06d}", start) for i, start in enumerate(starts)]
        sampler = Sampler(self.policy, self.sampling, generator)
        return _Play(self, sampler, deque(jobs), on_turn).run()

    def check_room(self, ref: TaskRef) -> None:
        """UntwineError when the first prompt of a task instance leaves no room for a reply."""
        job = _Job(0, ref, "")
        self.pool.send({0: job.beginning})
        answer = self.pool.receive([0])[0]
        if isinstance(answer, Reset):  # else its worker died, which a rollout survives
            self.begin(job, answer)

    def begin(self, job: _Job, start: Reset) -> _Live:
        """The episode of a job whose environment has been reset."""
        goal, observation = start
        conversation = self.prompter.begin(goal, observation.text, observation.admissible, job.told)
        live = _Live(job, goal, conversation, observation)
        if not self._fits(live):
            raise UntwineError(self._no_room(job.ref, live))
        return live

    def _fits(self, live: _Live) -> bool:
        """Whether the model may read the prompt, and has positions for the longest reply to it."""
        tokens = len(live.conversation.prompt_ids)
        fits = tokens + self._reply_tokens(live) <= self.policy.max_positions
        return fits and tokens <= self.prompt.max_tokens

    def _reply_tokens(self, live: _Live) -> int:
        """What a reply may have: a command that is chosen comes to its end whatever
        `sampling.max_new_tokens`, which then limits what is free before it."""
        if self.choices is None or live.observation.done:
            return self.sampling.max_new_tokens
        free = self.sampling.max_new_tokens if self.prompt.reasons else 0
        commands = self._commands(live.observation.admissible)
        # without any, `choices_among` says so
        return free + (self.choices.longest(commands) if commands else 0)

    def _no_room(self, ref: TaskRef, live: _Live) -> str:
        """That a first prompt does not fit, and what to do about each cause."""
        positions, tokens = self.policy.max_positions, len(live.conversation.prompt_ids)
        reply, limit = self._reply_tokens(live), self.sampling.max_new_tokens
        room = min(self.prompt.max_tokens, positions - reply)
        advice = []
        if tokens > self.prompt.max_tokens:
            advice.append(f"raise prompt.max_tokens (now {self.prompt.max_tokens})")
        if tokens >= positions:
            advice.append(f"use a model with more than {positions} positions")
        elif tokens + reply > positions:
            most = positions - tokens - (reply - limit)
            lower = f"lower sampling.max_new_tokens (now {limit}) to {most} or less, or "
            lower = lower if 0 < most < limit else ""
            advice.append(f"{lower}use a model with more than {positions} positions")
        return (
            f"the first prompt of {ref} has {tokens} tokens but only {max(room, 0)} fit; "
            f"{' and '.join(advice)}"
        )

    def choices_of(self, live: _Live) -> Choices | None:
        """The replies the policy may give; None when it may say anything."""
        return self.choices_among(live.observation.admissible, live.job.ref, len(live.steps))

    def choices_among(
        self, admissible: Sequence[str] | None, ref: TaskRef, step: int
    ) -> Choices | None:
        """The same where these commands are admissible. EnvError when there is none."""
        if self.choices is None:
            return None
        commands = self._commands(admissible)
        if not commands:
            raise EnvError(
                f"{ref} lists no admissible command at step {step}; "
                "set sampling.constrained to false"
            )
        return self.choices.among(commands)

    def _commands(self, admissible: Sequence[str] | None) -> list[str]:
        return [c for c in admissible or () if c not in self.info.blocked]

    def read(self, live: _Live, sample: Sample) -> _Act:
        """What a reply says."""
        text, over = self.policy.chat.decode(sample.ids)
        reply = parse_reply(
            text,
            ended=over,
            verb_last=self.prompt.verb_last,
            thoughts=self.prompt.thoughts,
            tags=self.prompt.tags,
            blocked=self.info.blocked,
            admissible=live.observation.admissible if self.prompt.only_admissible else None,
        )
        return _Act(sample, text, reply)

    def ending(self, live: _Live) -> str | None:
        if live.observation.done:
            return "success" if live.observation.success else "failure"
        return "limit" if len(live.steps) >= self.max_steps or not self._fits(live) else None


class _Play:
    """One rollout. A slot is free, or its environment is starting, or it has an episode; then its
    reply is under way in the sampler, or its command is with the environment (`acts`)."""

    def __init__(
        self,
        collector: Collector,
        sampler: Sampler,
        queue: deque[_Job],
        on_turn: Callable[[int, int], None] | None,
    ) -> None:
        self.collector = collector
        self.pool = collector.pool
        self.sampler = sampler
        self.queue = queue
        self.on_turn = on_turn
        self.total = len(queue)
        self.stats = RolloutStats()
        self.starting: dict[int, _Job] = {}
        self.episodes: dict[int, _Live] = {}
        self.acts: dict[int, _Act] = {}
        self.finished: dict[int, Episode | None] = {}

    def run(self) -> tuple[list[Episode | None], RolloutStats]:
        """An episode for every job; None for one that could not begin where it should."""
        with self.collector.policy.kept_casts():
            self._play()
        self.stats.prompt_tokens = self.sampler.prompt_tokens
        self.stats.computed_tokens = self.sampler.computed_tokens
        return [self.finished[i] for i in range(self.total)], self.stats

    def _play(self) -> None:
        slots, waves = range(self.pool.slots), self.collector.waves
        for wave in itertools.cycle([slots[w::waves] for w in range(waves)]):
            if len(self.finished) == self.total:
                break
            if self.on_turn:
                self.on_turn(len(self.finished), self.total)
            self._listen(wave)
            self._refill(wave)
            if waves == 1:  # nobody else can reply while the environments start
                self._listen(wave)
            while self.sampler.busy:
                self._act(self.sampler.step())
                if not self.pool.workers:  # the environments have answered already
                    break

    def _refill(self, wave: Iterable[int]) -> None:
        """Free slots take jobs from the queue."""
        free = [s for s in wave if s not in self.episodes and s not in self.starting]
        jobs = {slot: self.queue.popleft() for slot in free[: len(self.queue)]}
        self.pool.send({slot: job.beginning for slot, job in jobs.items()})
        self.starting.update(jobs)

    def _listen(self, wave: Iterable[int]) -> None:
        """Take the answers of the environments, and let the policy reply to them."""
        acting = [s for s in wave if s in self.acts]
        starting = [s for s in wave if s in self.starting]
        asked = [s for s in acting if self.acts[s].reply.command is not None]
        answers = self.pool.receive([*asked, *starting])
        for slot in starting:
            self._started(slot, self.starting.pop(slot), answers[slot])
        for slot in acting:
            self._answered(slot, self.acts.pop(slot), answers.get(slot))

    def _started(self, slot: int, job: _Job, answer: EpisodeAnswer) -> None:
        if isinstance(answer, Lost):
            self._redo(job, answer)
            return
        if isinstance(answer, Reset):
            self.episodes[slot] = self.collector.begin(job, answer)
        else:
            assert isinstance(answer, Observation)
            assert job.start is not None
            if answer.state_key != job.start.state_key:
                self.finished[job.index] = None
                return
            self.episodes[slot] = _returned(job, job.start, answer)
        self._reply(slot)

    def _answered(self, slot: int, act: _Act, answer: EpisodeAnswer | None) -> None:
        live = self.episodes[slot]
        if isinstance(answer, Lost):
            del self.episodes[slot]
            self.sampler.forget(slot)
            self._redo(live.job, answer)
            return
        assert answer is None or isinstance(answer, Observation)
        _record(live, act, answer)
        if how := self.collector.ending(live):
            del self.episodes[slot]
            self.sampler.forget(slot)
            self.finished[live.job.index] = _episode(live, how)
        else:
            self._reply(slot)

    def _reply(self, slot: int) -> None:
        live = self.episodes[slot]
        if live.reply is not None:
            given, live.reply = live.reply, None
            self._act({slot: given})
            return
        choices = self.collector.choices_of(live)
        self.sampler.begin(slot, live.conversation.prompt_ids, choices)

    def _act(self, samples: Mapping[int, Sample]) -> None:
        """Send the commands of replies that are over."""
        acts = {s: self.collector.read(self.episodes[s], x) for s, x in samples.items()}
        commands = {s: act.reply.command for s, act in acts.items()}
        self.pool.send({s: StepRequest(c) for s, c in commands.items() if c is not None})
        self.acts.update(acts)
        self.stats.env_steps += sum(c is not None for c in commands.values())
        self.stats.sampled_tokens += sum(len(sample.ids) for sample in samples.values())

    def _redo(self, job: _Job, lost: Lost) -> None:
        self.stats.episodes_lost += 1
        if job.tries + 1 >= _MAX_RETRIES:
            raise EnvError(f"{job.ref} failed {_MAX_RETRIES} times in new workers: {lost.reason}")
        self.queue.appendleft(replace(job, tries=job.tries + 1))


def _record(live: _Live, act: _Act, answer: Observation | None) -> None:
    """Append a step to an episode and go on to the next prompt."""
    sample, text, reply = act.sample, act.text, act.reply
    before = live.observation
    # without an answer the parser refused the reply, and nothing reached the environment
    after = answer or before
    invalid = after.invalid if answer else reply.problem
    feedback = answer.text if answer else PROBLEM_FEEDBACK[reply.problem or "empty"]
    conversation = live.conversation
    live.steps.append(
        Step(
            index=len(live.steps),
            state_key=before.state_key,
            observation=live.steps[-1].feedback if live.steps else before.text,
            prompt_ids=conversation.prompt_ids,
            action_ids=sample.ids,
            logprobs=sample.logprobs,
            allowed=sample.allowed,
            text=text,
            thought=reply.thought,
            tag=reply.tag,
            command=reply.command,
            invalid=invalid,
            next_state_key=after.state_key,
            feedback=feedback,
            score=after.score,
            outcome=after.outcome,
            reward=after.outcome - before.outcome,
            done=after.done,
            admissible=before.admissible,
        )
    )
    live.observation = after
    shown = action_as_shown(reply.command, text)
    conversation.advance(sample.ids, shown, feedback, after.admissible)


def _returned(job: _Job, start: Start, observation: Observation) -> _Live:
    """The episode as it was at its start."""
    return _Live(
        job,
        start.goal,
        start.conversation.fork(),
        replace(observation, text=start.observation),
        list(start.steps),
        start.reply,
    )


def _episode(live: _Live, ended: str) -> Episode:
    return Episode(
        id=live.job.id,
        ref=live.job.ref,
        goal=live.goal,
        steps=tuple(live.steps),
        outcome=live.observation.outcome,
        score=live.observation.score,
        success=live.observation.success,
        ended=ended,  # type: ignore[arg-type]
        told=live.conversation.told,
    )
