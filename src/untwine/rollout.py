"""From task instances to groups of episodes.

All slots of the pool act in step: one batched reply of the policy, then one command for each
environment. A slot whose episode has ended begins the next one at once. An episode whose worker
died is begun again in a new worker and counted, so none is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from untwine.config import PromptConfig, SamplingConfig
from untwine.envs.pool import EnvPool, Lost, ResetRequest, StepRequest
from untwine.envs.protocol import Reset
from untwine.errors import EnvError, UntwineError
from untwine.policy.choices import CommandChoices, Node
from untwine.policy.loading import Policy
from untwine.policy.sampler import Sample, Sampler
from untwine.prompting.parser import PROBLEM_FEEDBACK, Reply, parse_reply
from untwine.prompting.prompter import Conversation, Prompter
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


@dataclass(slots=True)
class _Live:
    """An episode under way in one slot."""

    ref: TaskRef
    id: str
    goal: str
    conversation: Conversation
    observation: Observation
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Job:
    index: int  # position in the result
    ref: TaskRef
    id: str
    tries: int = 0


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
        self._longest = min(prompt.max_tokens, policy.max_positions - sampling.max_new_tokens)
        self.choices = CommandChoices(policy.chat) if sampling.constrained else None
        listed = prompt.list_admissible or prompt.only_admissible or sampling.constrained
        if listed and not self.info.lists_commands:
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
        greedy: bool = False,
        on_turn: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Group], RolloutStats]:
        """One group of `group_size` episodes for every ref, in the order of `refs`.

        prefix   begins the ids of the episodes
        on_turn  called before every turn with (episodes done, episodes in all); may raise to stop
        """
        jobs = [
            _Job(i * group_size + g, ref, f"{prefix}{i:03d}-{g:02d}")
            for i, ref in enumerate(refs)
            for g in range(group_size)
        ]
        stats = RolloutStats()
        episodes = self._play(deque(jobs), generator, greedy, on_turn, stats)
        groups = [
            Group(ref, tuple(episodes[i * group_size : (i + 1) * group_size]))
            for i, ref in enumerate(refs)
        ]
        return groups, stats

    def _play(
        self,
        queue: deque[_Job],
        generator: torch.Generator,
        greedy: bool,
        on_turn: Callable[[int, int], None] | None,
        stats: RolloutStats,
    ) -> list[Episode]:
        total = len(queue)
        finished: dict[int, Episode] = {}
        running: dict[int, tuple[_Job, _Live]] = {}
        sampler = Sampler(self.policy, self.sampling, generator, greedy=greedy)
        while queue or running:
            if on_turn:
                on_turn(len(finished), total)
            self._begin(queue, running, stats)
            if not running:
                continue
            samples = sampler.sample(
                {slot: live.conversation.prompt_ids for slot, (_, live) in running.items()},
                self._choices(running) if self.choices else None,
            )
            ended = self._act(queue, running, samples, stats)
            for slot, episode in ended.items():
                job, _ = running.pop(slot)
                finished[job.index] = episode
                sampler.forget(slot)
        stats.prompt_tokens += sampler.prompt_tokens
        stats.computed_tokens += sampler.computed_tokens
        return [finished[i] for i in range(total)]

    def _choices(self, running: dict[int, tuple[_Job, _Live]]) -> dict[int, Node]:
        """For each slot the trie of the commands it may give."""
        assert self.choices is not None
        blocked = set(self.info.blocked)
        tries = {}
        for slot, (job, live) in running.items():
            commands = [c for c in live.observation.admissible or () if c not in blocked]
            if not commands:
                raise EnvError(
                    f"{job.ref} lists no admissible command at step {len(live.steps)}; "
                    "set sampling.constrained to false"
                )
            tries[slot] = self.choices.trie(commands)
        return tries

    def _begin(
        self, queue: deque[_Job], running: dict[int, tuple[_Job, _Live]], stats: RolloutStats
    ) -> None:
        """Fill free slots from the queue."""
        free = [slot for slot in range(self.pool.slots) if slot not in running]
        starting = {slot: queue.popleft() for slot in free[: len(queue)]}
        if not starting:
            return
        replies = self.pool.call(
            {s: ResetRequest(job.ref.task, job.ref.variation) for s, job in starting.items()}
        )
        for slot, job in starting.items():
            reply = replies[slot]
            if isinstance(reply, Lost):
                self._redo(queue, job, reply, stats)
                continue
            assert isinstance(reply, Reset)
            goal, observation = reply
            conversation = self.prompter.begin(goal, observation.text, observation.admissible)
            if len(conversation.prompt_ids) > self._longest:
                raise UntwineError(
                    f"the first prompt of {job.ref} has {len(conversation.prompt_ids)} tokens but "
                    f"only {self._longest} fit; raise prompt.max_tokens or use a model with more "
                    "positions"
                )
            live = _Live(job.ref, job.id, goal, conversation, observation)
            running[slot] = (job, live)

    def _redo(self, queue: deque[_Job], job: _Job, lost: Lost, stats: RolloutStats) -> None:
        stats.episodes_lost += 1
        if job.tries + 1 >= _MAX_RETRIES:
            raise EnvError(f"{job.ref} failed {_MAX_RETRIES} times in new workers: {lost.reason}")
        queue.appendleft(_Job(job.index, job.ref, job.id, job.tries + 1))

    def _act(
        self,
        queue: deque[_Job],
        running: dict[int, tuple[_Job, _Live]],
        samples: dict[int, Sample],
        stats: RolloutStats,
    ) -> dict[int, Episode]:
        """Send every command, append every step; the episodes that ended."""
        replies: dict[int, tuple[str, Reply]] = {}
        for slot, (_, live) in running.items():
            text, over = self.policy.chat.decode(samples[slot].ids)
            only = live.observation.admissible if self.prompt.only_admissible else None
            replies[slot] = (
                text,
                parse_reply(
                    text,
                    ended=over,
                    thoughts=self.prompt.thoughts,
                    blocked=self.info.blocked,
                    admissible=only,
                ),
            )
            stats.sampled_tokens += len(samples[slot].ids)
        answers = self.pool.call(
            {s: StepRequest(r.command) for s, (_, r) in replies.items() if r.command is not None}
        )
        stats.env_steps += len(answers)
        ended: dict[int, Episode] = {}
        for slot in list(running):
            job, live = running[slot]
            answer = answers.get(slot)
            if isinstance(answer, Lost):
                del running[slot]
                self._redo(queue, job, answer, stats)
                continue
            assert answer is None or isinstance(answer, Observation)
            text, reply = replies[slot]
            self._record(live, samples[slot], text, reply, answer)
            if how := self._ending(live):
                ended[slot] = _episode(live, how)
        return ended

    def _record(
        self, live: _Live, sample: Sample, text: str, reply: Reply, answer: Observation | None
    ) -> None:
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
        shown = reply.command if reply.command is not None else " ".join(text.split())[:200]
        conversation.advance(sample.ids, shown, feedback, after.admissible)

    def _ending(self, live: _Live) -> str | None:
        if live.observation.done:
            return "success" if live.observation.success else "failure"
        too_long = len(live.conversation.prompt_ids) > self._longest
        return "limit" if len(live.steps) >= self.max_steps or too_long else None


def _episode(live: _Live, ended: str) -> Episode:
    return Episode(
        id=live.id,
        ref=live.ref,
        goal=live.goal,
        steps=tuple(live.steps),
        outcome=live.observation.outcome,
        score=live.observation.score,
        success=live.observation.success,
        ended=ended,  # type: ignore[arg-type]
    )
