"""Batched sampling with kept keys and values.

Every slot of a rollout owns one row of the cache. A call gives each slot its whole prompt; the
sampler finds how much of it the row already holds (all of the past for `append` prompts, the fixed
head for `window` prompts) and computes only the rest. Sampled ids and their log-probabilities are
returned as they were drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from untwine.config import SamplingConfig
from untwine.policy.choices import Node
from untwine.policy.loading import Policy


@dataclass(frozen=True, slots=True)
class Sample:
    """A reply: sampled ids (end token included if drawn) and the log-probability of each one under
    the temperature-scaled distribution, before any truncation.

    allowed   for each id the ids it was chosen from, over which its log-probability is normalised;
              None when the whole vocabulary was open
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    allowed: tuple[tuple[int, ...], ...] | None = None


@dataclass(slots=True)
class _Draft:
    """A reply under way.

    node   where it stands in the trie of choices; None when the whole vocabulary is open
    fed    how many of its ids the model has read
    """

    node: Node | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    allowed: list[tuple[int, ...]] = field(default_factory=list)
    over: bool = False
    fed: int = 0

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

    def unread(self) -> list[int]:
        """The ids that the model has not read; from now on it has."""
        first, self.fed = self.fed, len(self.ids)
        return self.ids[first:]

    def sample(self) -> Sample:
        allowed = tuple(self.allowed) if self.node is not None else None
        return Sample(tuple(self.ids), tuple(self.logprobs), allowed)

    def _append(self, token: int, logprob: float) -> None:
        if self.node is not None:
            self.allowed.append(tuple(self.node))
            self.node = self.node[token]
        self.ids.append(token)
        self.logprobs.append(logprob)


class RowCache:
    """Keys and values of many rows, each as long as it is; dead positions are masked away.

    Stands where transformers expects a `Cache`: attention layers call `update`. Shapes:
    key and value buffers (rows, kv heads, capacity, head size), one pair per layer.
    """

    is_compileable = False

    def __init__(self) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self.rows = torch.empty(0, dtype=torch.long)
        self.row_of_new = self.column_of_new = self.position_of_new = self.rows
        self.upto = 0
        self.capacity = 0
        self.row_count = 0

    def plan(self, rows: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor) -> None:
        """Announce a forward pass: cache rows (B,), which of its tokens are real (B, M), and their
        positions (B, M)."""
        self.rows = rows
        self.row_of_new, self.column_of_new = valid.nonzero(as_tuple=True)
        self.position_of_new = positions[self.row_of_new, self.column_of_new]
        self.upto = int(self.position_of_new.max()) + 1
        self.row_count = max(self.row_count, int(rows.max()) + 1)
        if self.upto > self.capacity:
            self.capacity = max(self.upto + 64, int(self.capacity * 1.5))

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values (B, H, M, D) and return those of all live positions."""
        if layer == len(self._keys):
            self._keys.append(key.new_zeros(0))
            self._values.append(value.new_zeros(0))
        self._keys[layer] = self._fit(self._keys[layer], key)
        self._values[layer] = self._fit(self._values[layer], value)
        keys, values = self._keys[layer], self._values[layer]
        target = (self.rows[self.row_of_new], slice(None), self.position_of_new)
        keys[target] = key[self.row_of_new, :, self.column_of_new]
        values[target] = value[self.row_of_new, :, self.column_of_new]
        return self._view(keys), self._view(values)

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def _fit(self, buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        rows, capacity = self.row_count, self.capacity
        if buffer.dim() == 4 and buffer.shape[0] >= rows and buffer.shape[2] >= capacity:
            return buffer
        grown = like.new_zeros(rows, like.shape[1], capacity, like.shape[3])
        if buffer.dim() == 4:
            grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
        return grown

    def _view(self, buffer: torch.Tensor) -> torch.Tensor:
        n = self.rows.shape[0]
        live = buffer[:, :, : self.upto]
        if n == buffer.shape[0] and bool(
            (self.rows == torch.arange(n, device=self.rows.device)).all()
        ):
            return live
        return live[self.rows]


class Sampler:
    """Samples replies for the slots of one rollout.

    Make a new one for every rollout: kept keys and values belong to the weights of their time.
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
        self._cache = RowCache()
        self._held: dict[int, list[int]] = {}  # row -> token ids whose keys and values are kept
        self.prompt_tokens = 0
        self.computed_tokens = 0

    @torch.no_grad()
    def sample(
        self,
        prompts: Mapping[int, Sequence[int]],
        choices: Mapping[int, Node] | None = None,
    ) -> dict[int, Sample]:
        """One reply for each slot. Slots are small integers; a slot is also its cache row.

        choices   for each slot the trie of the replies it may give (policy/choices.py); they end
                  where the trie does, whatever `max_new_tokens`
        """
        drafts = {slot: _Draft(choices[slot] if choices else None) for slot in sorted(prompts)}
        for draft in drafts.values():
            draft.force()
        live = [slot for slot, draft in drafts.items() if not draft.over]
        if live:
            logits = self._prefill({s: [*prompts[s], *drafts[s].unread()] for s in live})
        while live:
            tokens, logprobs = self._draw(logits, [drafts[slot].node for slot in live])
            for slot, token, logprob in zip(live, tokens.tolist(), logprobs.tolist(), strict=True):
                drafts[slot].take(token, logprob)
                drafts[slot].over |= choices is None and self._ends(drafts[slot])
            still = [slot for slot in live if not drafts[slot].over]
            if still:
                logits = self._continue(live, still, drafts)
            live = still
        return {slot: draft.sample() for slot, draft in drafts.items()}

    def _ends(self, draft: _Draft) -> bool:
        full = len(draft.ids) >= self.config.max_new_tokens
        return full or draft.ids[-1] in self.policy.chat.end_ids

    def forget(self, slot: int) -> None:
        """The slot's episode is over; its row may be overwritten."""
        self._held.pop(slot, None)

    @torch.no_grad()
    def logits_piecewise(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after `ids`, computed in three pieces with the kept cache (for the exactness
        check of a freshly loaded model). Two rows of unequal length, as in a real rollout."""
        cut = len(ids) // 2
        self._extend({0: list(ids[:cut]), 1: list(ids[: cut // 2])})
        self._extend({0: list(ids[cut:-1]), 1: list(ids[cut // 2 : cut])})
        return self._extend({0: list(ids[-1:])})[0]

    def _prefill(self, prompts: Mapping[int, list[int]]) -> torch.Tensor:
        fresh: dict[int, list[int]] = {}
        for slot, prompt in prompts.items():
            kept = _common_prefix(self._held.get(slot, []), prompt)
            kept = min(kept, len(prompt) - 1)  # the last token is always computed: it gives logits
            self._held[slot] = prompt[:kept]
            fresh[slot] = prompt[kept:]
            self.prompt_tokens += len(prompt)
            self.computed_tokens += len(fresh[slot])
        return self._extend(fresh)

    def _continue(
        self, live: Sequence[int], still: Sequence[int], drafts: Mapping[int, _Draft]
    ) -> torch.Tensor:
        """Read what was drawn; logits of the slots in `still`.

        Taking rows out of the cache copies them, so ended rows ride along (they read some token
        and forget it) until fewer than half are left.
        """
        going = set(still)
        riding = live if 2 * len(still) > len(live) else still
        logits = self._extend({s: drafts[s].unread() if s in going else [0] for s in riding})
        for slot in set(riding) - going:
            self._held[slot].pop()
        return logits[[i for i, slot in enumerate(riding) if slot in going]]

    def _extend(self, fresh: Mapping[int, list[int]]) -> torch.Tensor:
        """Append tokens to rows; logits (B, V) after the last token of each, in slot order."""
        device = self.policy.device
        slots = sorted(fresh)
        width = max(len(fresh[slot]) for slot in slots)
        ids_BM = torch.zeros(len(slots), width, dtype=torch.long)
        valid_BM = torch.zeros(len(slots), width, dtype=torch.bool)
        positions_BM = torch.zeros(len(slots), width, dtype=torch.long)
        for b, slot in enumerate(slots):
            new = fresh[slot]
            start = len(self._held.setdefault(slot, []))
            ids_BM[b, width - len(new) :] = torch.tensor(new)
            valid_BM[b, width - len(new) :] = True
            positions_BM[b, width - len(new) :] = torch.arange(start, start + len(new))
            self._held[slot].extend(new)
        longest = int(positions_BM.max()) + 1
        mask = (torch.arange(longest)[None, None] <= positions_BM[:, :, None])[:, None]
        self._cache.plan(
            torch.tensor(slots, device=device), valid_BM.to(device), positions_BM.to(device)
        )
        with self.policy.autocast():
            hidden = self.policy.hidden_states(
                ids_BM.to(device),
                attention_mask=mask.to(device),
                position_ids=positions_BM.to(device),
                past_key_values=self._cache,
                use_cache=True,
            )
            return self.policy.project(hidden[:, -1])

    def _draw(
        self, logits_BV: torch.Tensor, nodes: Sequence[Node | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token (B,) and its log-probability (B,). `nodes` restrict the choice, all or none."""
        scaled = logits_BV / self.config.temperature
        ids_BC = _children(nodes).to(scaled.device)
        if ids_BC.numel():
            scaled = scaled.gather(-1, ids_BC.clamp_min(0)).masked_fill(ids_BC < 0, -torch.inf)
        scaled = scaled.log_softmax(-1)
        if self.greedy:
            drawn = scaled.argmax(-1, keepdim=True)
        else:
            probs = scaled.exp().cpu()
            if self.config.top_p < 1.0:
                probs = _nucleus(probs, self.config.top_p)
            drawn = torch.multinomial(probs, 1, generator=self.generator).to(scaled.device)
        tokens = ids_BC.gather(-1, drawn) if ids_BC.numel() else drawn
        return tokens[:, 0], scaled.gather(-1, drawn)[:, 0]


def _children(nodes: Sequence[Node | None]) -> torch.Tensor:
    """Ids of the children (B, C), padded with -1; (B, 0) when the choice is free."""
    children = [list(node or ()) for node in nodes]
    width = max(map(len, children))
    return torch.tensor([ids + [-1] * (width - len(ids)) for ids in children], dtype=torch.long)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _nucleus(probs_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero out everything beyond the smallest set with mass `top_p` (Holtzman et al., 2020)."""
    ordered, order = probs_BV.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    kept = ordered.masked_fill(outside, 0.0)
    return torch.zeros_like(probs_BV).scatter(-1, order, kept)
