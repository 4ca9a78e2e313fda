"""Batched sampling with kept keys and values.

Every slot of a rollout owns one row of the cache. A call gives each slot its whole prompt; the
sampler finds how much of it the row already holds (all of the past for `append` prompts, the fixed
head for `window` prompts) and computes only the rest. Sampled ids and their log-probabilities are
returned as they were drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from untwine.config import SamplingConfig
from untwine.policy.loading import Policy


@dataclass(frozen=True, slots=True)
class Sample:
    """A reply: sampled ids (end token included if drawn) and the log-probability of each one
    under the temperature-scaled, untruncated distribution."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


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
    def sample(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, Sample]:
        """One reply for each slot. Slots are small integers; a slot is also its cache row."""
        slots = sorted(prompts)
        logits = self._prefill(slots, prompts)
        ids: list[list[int]] = [[] for _ in slots]
        logprobs: list[list[float]] = [[] for _ in slots]
        live = list(range(len(slots)))
        for drawn in range(self.config.max_new_tokens):
            tokens, chosen = self._draw(logits)
            still: list[int] = []
            for row, token, logprob in zip(live, tokens.tolist(), chosen.tolist(), strict=True):
                ids[row].append(token)
                logprobs[row].append(logprob)
                if token not in self.policy.chat.end_ids:
                    still.append(row)
            if not still or drawn + 1 == self.config.max_new_tokens:
                break
            logits, live = self._continue(slots, live, still, ids)
        return {
            slot: Sample(tuple(i), tuple(p))
            for slot, i, p in zip(slots, ids, logprobs, strict=True)
        }

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

    def _prefill(self, slots: list[int], prompts: Mapping[int, Sequence[int]]) -> torch.Tensor:
        fresh: dict[int, list[int]] = {}
        for slot in slots:
            prompt = list(prompts[slot])
            kept = _common_prefix(self._held.get(slot, []), prompt)
            kept = min(kept, len(prompt) - 1)  # the last token is always computed: it gives logits
            self._held[slot] = prompt[:kept]
            fresh[slot] = prompt[kept:]
            self.prompt_tokens += len(prompt)
            self.computed_tokens += len(fresh[slot])
        return self._extend(fresh)

    def _continue(
        self, slots: list[int], live: list[int], still: list[int], ids: list[list[int]]
    ) -> tuple[torch.Tensor, list[int]]:
        """One more position for the rows in `still`: (their logits, themselves).

        Taking rows out of the cache copies them, so ended rows ride along (their result is
        dropped) until fewer than half are left.
        """
        riding = live if 2 * len(still) > len(live) else still
        logits = self._extend({slots[row]: ids[row][-1:] for row in riding})
        for row in set(riding) - set(still):
            self._held[slots[row]].pop()
        keep = [i for i, row in enumerate(riding) if row in set(still)]
        return logits[keep], still

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

    def _draw(self, logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token (B,) and its log-probability (B,)."""
        scaled = torch.log_softmax(logits_BV / self.config.temperature, dim=-1)
        if self.greedy:
            tokens = scaled.argmax(-1)
        else:
            probs = scaled.exp().cpu()
            if self.config.top_p < 1.0:
                probs = _nucleus(probs, self.config.top_p)
            tokens = torch.multinomial(probs, 1, generator=self.generator)[:, 0].to(scaled.device)
        return tokens, scaled.gather(-1, tokens[:, None])[:, 0]


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
