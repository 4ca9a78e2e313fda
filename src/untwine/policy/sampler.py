"""Replies for many slots at once, with kept keys and values.

Every slot of a rollout owns one row of the cache. `begin` gives a slot its whole prompt; the
sampler finds how much of it this row or another one already holds (all of the past for `append`
prompts, the fixed head for `window` prompts, the first prompt for all episodes of a group) and
computes only the rest. `step` is one forward pass for all slots under way, wherever they stand:
some read a prompt, others the token they drew. Sampled ids and their log-probabilities are returned
as they were drawn.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from untwine.config import SamplingConfig
from untwine.errors import UntwineError
from untwine.policy.attention import packed_hidden_states
from untwine.policy.choices import Choices, Node, Walk
from untwine.policy.loading import Policy
from untwine.policy.packing import Ids, Packed, pack, prompt_pieces, reply_pieces
from untwine.policy.row_cache import RowCache, RowPass

_FEWEST = 64  # tokens of a pass, below which memory is not what passes need


@dataclass(frozen=True, slots=True)
class Sample:
    """A reply: sampled ids (end token included if drawn) and the log-probability of each one under
    the temperature-scaled distribution, before any truncation.

    allowed   for each id the ids it was chosen from, over which its log-probability is normalised,
              none where the whole vocabulary was open; None when it always was
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    allowed: tuple[tuple[int, ...], ...] | None = None


@dataclass(slots=True)
class _Draft:
    """A reply under way.

    prompt   what the model is to read before it; None when it has
    walk     its way through the choices it has
    fed      how many of its ids the model has read
    """

    prompt: Ids | None
    walk: Walk
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    over: bool = False
    fed: int = 0

    @property
    def node(self) -> Node | None:
        return self.walk.node

    def take(self, token: int, logprob: float) -> None:
        """Append a token that was drawn, and those that it forces."""
        self._append(token, logprob)
        self.force()

    def force(self) -> None:
        """Append tokens as long as there is no choice."""
        while self.node is not None and len(self.node) == 1:
            self._append(next(iter(self.node)), 0.0)
        if self.node is not None and not self.node:
            self.over = True

    def unread(self) -> Ids:
        """The ids that the model has not read; from now on it has."""
        first, self.fed = self.fed, len(self.ids)
        prompt, self.prompt = self.prompt or (), None
        return (*prompt, *self.ids[first:])

    def sample(self) -> Sample:
        allowed = tuple(self.walk.allowed) if self.node is not None else None
        return Sample(tuple(self.ids), tuple(self.logprobs), allowed)

    def _append(self, token: int, logprob: float) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.walk.go(self.ids)


class Sampler:
    """Samples replies for the slots of one rollout.

    Make a new one for every rollout: kept keys and values belong to the weights of their time.

    prompt_tokens     length of all prompts that were read, with what was forced to follow them
    computed_tokens   how many of these tokens the model ran over
    """

    def __init__(
        self,
        policy: Policy,
        config: SamplingConfig,
        generator: torch.Generator,
        *,
        greedy: bool = False,
    ) -> None:
        self.policy = policy
        self.config = config
        self.generator = generator
        self.greedy = greedy
        self.prompt_tokens = 0
        self.computed_tokens = 0
        self._pass_tokens = policy.pass_tokens
        self._cache = RowCache(batched=policy.device.type != "cpu")
        self._held: dict[int, Ids] = {}  # slot -> token ids whose keys and values are kept
        self._drafts: dict[int, _Draft] = {}
        self._twin: dict[int, int] = {}  # slots with the same number hold the same tokens

    @property
    def busy(self) -> bool:
        """Whether a reply is under way."""
        return bool(self._drafts)

    def begin(self, slot: int, prompt: Sequence[int], choices: Choices | None = None) -> None:
        """Begin a reply; a slot has one at a time. Slots are small integers.

        choices   the replies it may give (policy/choices.py); the reply ends where their trie does,
                  whatever `max_new_tokens`
        """
        if slot in self._drafts:
            raise ValueError(f"slot {slot} has a reply under way")
        draft = _Draft(tuple(prompt), Walk.through(choices))
        draft.force()
        self._drafts[slot] = draft

    @torch.no_grad()
    def step(self) -> dict[int, Sample]:
        """One token, and those that it forces, for every reply under way; the replies that are
        over, in the order of their slots."""
        live = sorted(slot for slot, draft in self._drafts.items() if not draft.over)
        if live:
            drafts = [self._drafts[slot] for slot in live]
            tokens, logprobs = self._draw(self._logits(live), [draft.node for draft in drafts])
            for draft, token, logprob in zip(
                drafts, tokens.tolist(), logprobs.tolist(), strict=True
            ):
                draft.take(token, logprob)
                draft.over |= draft.node is None and self._ends(draft)
        over = sorted(slot for slot, draft in self._drafts.items() if draft.over)
        return {slot: self._drafts.pop(slot).sample() for slot in over}

    def sample(
        self,
        prompts: Mapping[int, Sequence[int]],
        choices: Mapping[int, Choices] | None = None,
    ) -> dict[int, Sample]:
        """One reply for each slot, in the order of the slots."""
        for slot in sorted(prompts):
            self.begin(slot, prompts[slot], choices[slot] if choices else None)
        samples: dict[int, Sample] = {}
        with self.policy.kept_casts():
            while self.busy:
                samples.update(self.step())
        return {slot: samples[slot] for slot in sorted(samples)}

    def forget(self, slot: int) -> None:
        """The slot's episode is over; its row may be overwritten."""
        self._held.pop(slot, None)
        self._drafts.pop(slot, None)
        self._cache.free(slot)

    @torch.no_grad()
    def logits_piecewise(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after `ids`, computed in three pieces with the kept cache (for the exactness
        check of a freshly loaded model). Two rows of unequal length, as in a real rollout."""
        whole, cut = tuple(ids), len(ids) // 2
        self._read({0: whole[:cut], 1: whole[: cut // 2]}, {})
        self._read({1: whole[:cut]}, {0: whole[cut:-1]})
        return self._read({}, {0: whole[-1:]})[0]

    def _ends(self, draft: _Draft) -> bool:
        full = len(draft.ids) >= self.config.max_new_tokens
        return full or draft.ids[-1] in self.policy.chat.end_ids

    def _logits(self, live: Sequence[int]) -> torch.Tensor:
        """Let the model read what it has not; logits (B, V) after it, in the order of `live`."""
        prompts: dict[int, Ids] = {}
        replies: dict[int, Ids] = {}
        for slot in live:
            draft = self._drafts[slot]
            read = replies if draft.prompt is None else prompts
            read[slot] = draft.unread()
        self.prompt_tokens += sum(map(len, prompts.values()))
        return self._read(prompts, replies)

    def _read(self, prompts: Mapping[int, Ids], replies: Mapping[int, Ids]) -> torch.Tensor:
        """Rows become `prompts`, or are extended by `replies`; logits (B, V) after the last token
        of each, in the order of the slots."""
        copies, pieces = prompt_pieces(self._held, prompts)
        self.computed_tokens += sum(len(piece.ids) - piece.shared for piece in pieces)
        pieces += reply_pieces(self._held, replies, self._twin)
        self._held.update(prompts)
        self._held.update({slot: self._held[slot] + ids for slot, ids in replies.items()})
        try:
            self._cache.reserve(prompts, max(map(len, self._held.values())))
            self._cache.copy(copies)
        except torch.cuda.OutOfMemoryError:
            raise UntwineError(self._no_room()) from None
        packed = pack(pieces)
        self._twin = dict(packed.last)
        ends_B = np.array([packed.last[slot] for slot in sorted([*prompts, *replies])])
        ends_U, place_B = np.unique(ends_B, return_inverse=True)
        with self.policy.autocast():
            logits_UV = self.policy.project(self._hidden(packed, ends_U))
        return logits_UV[torch.from_numpy(place_B).to(logits_UV.device)]

    def _hidden(self, packed: Packed, ends_U: np.ndarray) -> torch.Tensor:
        """Run the model; hidden states (U, D) at the packed tokens `ends_U`, which are sorted. When
        CUDA runs out of memory, the passes are halved and made again: each writes what the first
        try wrote. Later rollouts begin with what fitted where prompts were read; of passes with a
        token for each row the rows are what is large."""
        while True:
            found = []
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                for first, part in packed.parts(self._pass_tokens):
                    here = ends_U[(ends_U >= first) & (ends_U < first + len(part.ids_N))] - first
                    found.append(self._forward(part, here))
                return torch.cat(found)
            del found
            self._halve(len(packed.ids_N), lasting=len(packed.ids_N) > len(ends_U))

    def _halve(self, tokens: int, lasting: bool) -> None:
        size = min(self._pass_tokens, tokens)
        if size <= _FEWEST:
            raise UntwineError(self._no_room())
        self._pass_tokens = size // 2
        if lasting:
            self.policy.pass_tokens = self._pass_tokens
        warnings.warn(
            f"out of memory with {size} tokens at once; sampling goes on with {size // 2}",
            stacklevel=2,
        )
        torch.cuda.empty_cache()

    def _no_room(self) -> str:
        return (
            f"a rollout of {len(self._held)} episodes side by side does not fit into the "
            "memory of the GPU; lower env.sessions, or set policy.dtype=bfloat16"
        )

    def _forward(self, part: Packed, wanted_U: np.ndarray) -> torch.Tensor:
        device = self.policy.device
        plan = RowPass(self._cache, part, device, wanted_U)
        model = self.policy.model.base_model
        return packed_hidden_states(model, part.ids_N, part.positions_N, plan, device)

    def _draw(
        self, logits_BV: torch.Tensor, nodes: Sequence[Node | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token (B,) and its log-probability (B,); a node restricts the choice."""
        free = [b for b, node in enumerate(nodes) if node is None]
        if free and len(free) < len(nodes):  # some have begun their command, others have not
            bound = [b for b, node in enumerate(nodes) if node is not None]
            parts = [self._draw(logits_BV[own], [nodes[b] for b in own]) for own in (free, bound)]
            back = torch.tensor([*free, *bound]).argsort().to(logits_BV.device)
            tokens, logprobs = (torch.cat(x)[back] for x in zip(*parts, strict=True))
            return tokens, logprobs
        ids_BC = _children(nodes).to(logits_BV.device)
        # In float64: summed in float32, a vocabulary of 50 000 costs 1e-5.
        if ids_BC.numel():
            scaled = logits_BV.gather(-1, ids_BC.clamp_min(0)).double() / self.config.temperature
            scaled = scaled.masked_fill(ids_BC < 0, -torch.inf)
        else:
            scaled = logits_BV.double() / self.config.temperature
        scaled = scaled.log_softmax(-1)
        if self.greedy:
            drawn = scaled.argmax(-1, keepdim=True)
        else:
            probs = scaled.exp().float()
            if self.config.top_p < 1.0:
                probs = _nucleus(probs, self.config.top_p)
            if probs.device.type == "cpu":
                drawn = torch.multinomial(probs, 1, generator=self.generator)
            else:  # one number for each row crosses over, not a vocabulary
                uniform = torch.rand(len(probs), 1, generator=self.generator, dtype=torch.float64)
                drawn = _inverse(probs, uniform.to(probs.device))
        tokens = ids_BC.gather(-1, drawn) if ids_BC.numel() else drawn
        return tokens[:, 0], scaled.gather(-1, drawn)[:, 0]


def _children(nodes: Sequence[Node | None]) -> torch.Tensor:
    """Ids of the children (B, C), padded with -1; (B, 0) when the choice is free."""
    children = [list(node or ()) for node in nodes]
    width = max(map(len, children))
    return torch.tensor([ids + [-1] * (width - len(ids)) for ids in children], dtype=torch.long)


def _inverse(probs_BV: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """Draws (B, 1) by inverting the cumulated probabilities at numbers in [0, 1). What has
    probability 0 is never drawn."""
    cumulated_BV = probs_BV.double().cumsum(-1)
    drawn_B1 = torch.searchsorted(cumulated_BV, uniform_B1 * cumulated_BV[:, -1:], right=True)
    last_B1 = (probs_BV > 0).double().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(drawn_B1, last_B1)


def _nucleus(probs_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero out everything beyond the smallest set with mass `top_p` (Holtzman et al., 2020)."""
    ordered, order = probs_BV.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    kept = ordered.masked_fill(outside, 0.0)
    return torch.zeros_like(probs_BV).scatter(-1, order, kept)
