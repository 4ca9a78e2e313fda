"""Judges: a model behind an endpoint, or a local one. Texts in, opinions out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch

from untwine.batch import Row, completion_row, halved, microbatches, split_again
from untwine.config import JudgeConfig, PolicyConfig
from untwine.errors import ModelError, UntwineError
from untwine.gcd.sources.answers import AnswerFile, question_key
from untwine.gcd.sources.endpoint import Completion, Endpoint, EndpointError, shortened
from untwine.policy.loading import Policy, load_policy
from untwine.prompting.prompter import JUDGE_SYSTEM, VERDICT_WORDS
from untwine.records import Verdict
from untwine.scoring import score

PATIENCE = 3  # failures in a row after which an endpoint is left alone
SYSTEM = (
    "You judge actions in a text environment. Say whether the action helps to solve the task. "
    "Answer with one word: good, bad or unsure."
)
_SHOWN = 40  # characters of an answer that is no verdict
How = Literal["answered", "kept", "unsure", "nonsense", "failed", "skipped"]
_FIRST_WORD = re.compile(r"\W*(good|bad|unsure)\b")
_VERDICTS: Mapping[str, Verdict] = {"good": "good", "bad": "flawed"}


@dataclass(frozen=True, slots=True)
class Opinion:
    """What came of one question.

    how      answered, or kept from earlier: these may have a verdict; unsure, nonsense, failed (no
             answer) or skipped (not asked)
    tokens   that were spent now
    reason   why there is no verdict
    """

    how: How
    verdict: Verdict | None = None
    confidence: float = 0.0
    tokens: int = 0
    reason: str = ""


class Judge(Protocol):
    def ask(self, texts: Sequence[str], on_progress: Callable[[], None]) -> list[Opinion]:
        """An opinion on each question."""

    def complaint(self) -> str:
        """What went wrong besides, and does not keep it from judging; empty: nothing."""


class RemoteJudge:
    """A model behind an endpoint."""

    def __init__(self, config: JudgeConfig, answers: AnswerFile) -> None:
        self._config = config
        self._endpoint = Endpoint(config)
        self._answers = answers

    def ask(self, texts: Sequence[str], on_progress: Callable[[], None]) -> list[Opinion]:
        """Kept answers first; the others are asked `at_once` at a time, in order."""
        config = self._config
        chats = [_chat(text) for text in texts]
        keys = [question_key(config.model, chat, config.logprobs) for chat in chats]
        found: dict[int, Opinion] = {
            i: read(kept, config.confidence, kept=True)
            for i, key in enumerate(keys)
            if (kept := self._answers.get(key))
        }
        first = {key: i for i, key in reversed(list(enumerate(keys)))}  # equal questions ask once
        new = [i for i, key in enumerate(keys) if i not in found and first[key] == i]
        failures, reason = 0, ""
        with ThreadPoolExecutor(config.at_once) as threads:
            for part in _parts(new, config.at_once):
                on_progress()
                if failures >= PATIENCE:
                    found |= dict.fromkeys(part, Opinion("skipped", reason=reason))
                    continue
                if self._answers.spent >= config.token_budget:
                    used_up = f"gcd.judge.token_budget, {config.token_budget}, is used up"
                    found |= dict.fromkeys(part, Opinion("skipped", reason=used_up))
                    continue
                replies = list(threads.map(self._try, [chats[i] for i in part]))
                for i, reply in zip(part, replies, strict=True):
                    if isinstance(reply, Completion):
                        failures = 0
                        self._answers.put(keys[i], reply)
                        found[i] = read(reply, config.confidence)
                    else:
                        failures, reason = failures + 1, reply
                        found[i] = Opinion("failed", reason=reply)
        return [found.get(i) or self._again(found[first[key]]) for i, key in enumerate(keys)]

    def complaint(self) -> str:
        return self._answers.fault

    @staticmethod
    def _again(opinion: Opinion) -> Opinion:
        """The opinion on an equal question, which cost nothing more."""
        how: How = "kept" if opinion.how == "answered" else opinion.how
        return dataclasses.replace(opinion, how=how, tokens=0)

    def _try(self, chat: Sequence[Mapping[str, str]]) -> Completion | str:
        try:
            return self._endpoint.ask(chat)
        except EndpointError as error:
            return str(error)


class LocalJudge:
    """A Hugging Face model in this process, asked for the probabilities of the two words."""

    def __init__(self, config: JudgeConfig, policy: PolicyConfig, budget: int) -> None:
        """policy: device and computation type are taken from it. budget: tokens per forward pass.
        ModelError when there is no such model."""
        if config.model == "tiny":
            raise ModelError(
                f"gcd.judge.model {config.model!r} is built from random weights, which judge by "
                "chance; name a Hugging Face id or folder, or the server's model with gcd.judge.url"
            )
        choice = PolicyConfig(model=config.model, device=policy.device, dtype=policy.dtype)
        try:
            self._model: Policy = load_policy(choice, tuple)
        except ModelError as error:
            raise ModelError(str(error).replace("policy.model", "gcd.judge.model")) from error
        self._model.model.requires_grad_(False)
        self._budget = budget
        self._words = {a: self._model.chat.word_ids(w) for a, w in VERDICT_WORDS.items()}

    @torch.no_grad()
    def ask(self, texts: Sequence[str], on_progress: Callable[[], None]) -> list[Opinion]:
        """P(good) against P(bad) as the whole reply to the verdict prompt, word by word."""
        asked: list[list[Row]] = []
        for text in texts:
            prompt = self._model.chat.opening(JUDGE_SYSTEM, text)
            asked.append([completion_row(prompt, ids, 1.0) for ids in self._words.values()])
        most = self._model.max_positions
        fitting = [max(row.length for row in own) <= most for own in asked]
        rows = [row for own, fits in zip(asked, fitting, strict=True) if fits for row in own]
        numbers = {id(row): i for i, row in enumerate(rows)}
        logprobs = [0.0] * len(rows)
        waiting = list(microbatches(rows, self._budget))
        while waiting:
            on_progress()
            batch, found_N = waiting[0], None
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                found_N = score(self._model, batch, entropies=False).logprobs_N.double().tolist()
            if found_N is None:
                self._halve(batch)
                waiting = split_again(waiting, self._budget)
                continue
            del waiting[0]
            ends = [0]
            for row in batch:
                ends.append(ends[-1] + len(row.targets))
            for row, (a, b) in zip(batch, pairwise(ends), strict=True):
                logprobs[numbers[id(row)]] = math.fsum(found_N[a:b])
        opinions = []
        pairs = zip(logprobs[::2], logprobs[1::2], strict=True)
        for own, fits in zip(asked, fitting, strict=True):
            if fits:
                tokens = own[0].length + len(self._words["flawed"])
                opinions.append(_balance("answered", *next(pairs), tokens))
            else:
                reason = f"a question is longer than the {most} positions of gcd.judge.model"
                opinions.append(Opinion("skipped", reason=reason))
        return opinions

    def _halve(self, batch: Sequence[Row]) -> None:
        """Fewer tokens at once from now on: memory ran out with those of this batch."""
        if len(batch) == 1:
            raise UntwineError(
                f"a question of {batch[0].length} tokens to the local judge does not fit into the "
                "memory of the GPU beside the policy; name a smaller gcd.judge.model, or one "
                "behind an endpoint (gcd.judge.url)"
            )
        self._budget = halved(self._budget, batch)
        torch.cuda.empty_cache()

    def complaint(self) -> str:
        return ""


def read(answer: Completion, confidence: float, *, kept: bool = False) -> Opinion:
    """The opinion in an answer: its first word, after whatever the model thought aloud. How sure it
    is, is known where the answer begins with this word, so that candidates for the first token are
    candidates for the verdict."""
    tokens = 0 if kept else answer.tokens
    text = answer.text.lower()
    said = _FIRST_WORD.match(text.rpartition("</think>")[2])
    if said is None:
        shown = shortened(answer.text, _SHOWN)
        reason = f"it answers {shown!r}, neither good nor bad nor unsure"
        return Opinion("nonsense", tokens=tokens, reason=reason)
    if said[1] == "unsure":
        return Opinion("unsure", tokens=tokens)
    how: How = "kept" if kept else "answered"
    if said[1] in answer.words and text.lstrip().startswith(said[1]):
        at_most = _rest(answer.words)
        good, bad = (answer.words.get(word, at_most) for word in ("good", "bad"))
        return _balance(how, good, bad, tokens)
    return Opinion(how, _VERDICTS[said[1]], confidence, tokens)


def _rest(words: Mapping[str, float]) -> float:
    """The largest log-probability that a candidate can have which is not among the likeliest."""
    left = 1.0 - math.fsum(map(math.exp, words.values()))
    return min(*words.values(), math.log(left) if left > 0 else -math.inf)


def _balance(how: How, good: float, flawed: float, tokens: int) -> Opinion:
    """From two log-probabilities: |P(good) - P(flawed)| given one of them is tanh(|gap| / 2)."""
    sure = abs(math.tanh((good - flawed) / 2))
    if not sure > 0:
        return Opinion("unsure", tokens=tokens)
    return Opinion(how, "good" if good > flawed else "flawed", sure, tokens)


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def _parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
