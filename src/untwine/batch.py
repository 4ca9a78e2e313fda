"""From episodes to the rows a model is trained on.

Consecutive steps whose prompt only continues the previous one (`append` layout) become one row;
other steps become rows of their own. What rows have in common is found again when they are scored
(scoring.py), so no token is computed twice. The loss does not depend on how steps were merged: each
trained token carries its own weight, with denominators taken over the whole batch, never over a
micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from untwine.policy.trie import cut_within, shared_lengths, sort_key
from untwine.records import Episode, Group, Step

LossMean = Literal["token", "step", "episode"]
Allowed = tuple[tuple[int, ...], ...] | None


@dataclass(frozen=True, slots=True)
class Row:
    """One token sequence and what is trained on it.

    ids           (L,) token ids
    targets       (N,) positions in `ids` of the tokens whose log-probability is trained; all > 0.
                  Tokens that were forced (`Step.allowed` of one id) are no targets
    weights       (N,) share of each target in the loss
    old_logprobs  (N,) log-probabilities under the sampling policy
    advantages    (N,) advantage of the step the token belongs to
    choices       (N, C) ids among which each target was chosen, filled up with -1 (a line of only
                  -1: the whole vocabulary); None when all were chosen from the whole vocabulary
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    choices: np.ndarray | None = None

    @property
    def length(self) -> int:
        return len(self.ids)


def policy_rows(groups: Sequence[Group], mean: LossMean) -> list[Row]:
    """Rows of all steps that carry an advantage, weighted so that the loss is a mean over the
    chosen unit. Steps without an advantage are context only."""
    episodes = [episode for group in groups for episode in group.episodes]
    unit_sizes = unit_weights(episodes, mean)
    rows = []
    for episode, step_weights in zip(episodes, unit_sizes, strict=True):
        rows += [row for row, _ in _episode_rows(episode, step_weights)]
    return rows


def imitation_rows(
    episode: Episode, text_weight: float = 0.0, step_weights: Sequence[float] | None = None
) -> list[tuple[Row, list[int]]]:
    """Rows for imitating the steps of one episode that carry an advantage, each with the numbers of
    its steps.

    Their tokens have the weight of their step, by default 1. With a `text_weight`, all other tokens
    are targets of that weight and advantage 0: the model also learns the environment's text, and to
    copy from it.
    """
    rows = _episode_rows(episode, step_weights or [1.0] * episode.length)
    if text_weight == 0:
        return rows
    return [(_with_text(row, text_weight), steps) for row, steps in rows]


def completion_row(prompt_ids: Sequence[int], completion_ids: Sequence[int], weight: float) -> Row:
    """A prompt and the completion trained on it, the weight shared by the completion's tokens."""
    n = len(completion_ids)
    return Row(
        ids=np.array([*prompt_ids, *completion_ids], dtype=np.int64),
        targets=np.arange(len(prompt_ids), len(prompt_ids) + n, dtype=np.int64),
        weights=np.full(n, weight / n, dtype=np.float32),
        old_logprobs=np.zeros(n, dtype=np.float32),
        advantages=np.zeros(n, dtype=np.float32),
    )


def halved(budget: int, batch: Sequence[Row]) -> int:
    """A budget of half of what these rows, which did not fit, have in distinct tokens."""
    return max(1, min(budget, distinct_tokens(batch)) // 2)


def split_again(waiting: Sequence[Sequence[Row]], budget: int) -> list[list[Row]]:
    """Micro-batches that are still to be done, by another budget."""
    return list(microbatches([row for batch in waiting for row in batch], budget))


def microbatches(rows: Sequence[Row], budget: int) -> Iterator[list[Row]]:
    """Rows in the order of their trie, at most `budget` distinct tokens at a time (a longer row
    stands alone). A beginning that rows of two micro-batches share is computed in both."""
    ordered = in_trie_order(rows)
    for part in cut_within([row.ids for row in ordered], budget):
        yield ordered[part]


def distinct_tokens(rows: Sequence[Row]) -> int:
    """Tokens of the rows, common beginnings counted once."""
    ordered = [row.ids for row in in_trie_order(rows)]
    return sum(map(len, ordered)) - int(shared_lengths(ordered).sum())


def in_trie_order(rows: Sequence[Row]) -> list[Row]:
    """Rows with common beginnings beside each other."""
    return sorted(rows, key=lambda row: sort_key(row.ids))


def stacked_choices(rows: Sequence[Row]) -> np.ndarray | None:
    """`Row.choices` of all targets of the rows, (N, C); None when no choice was restricted."""
    if all(row.choices is None for row in rows):
        return None
    return _stacked([_choices_or_open(row) for row in rows])


def _choices_or_open(row: Row) -> np.ndarray:
    if row.choices is not None:
        return row.choices
    return np.full((len(row.targets), 1), -1, dtype=np.int64)


def _stacked(choices: Sequence[np.ndarray]) -> np.ndarray:
    """Choices of several rows, one below the other, filled up to the same width with -1."""
    width = max(c.shape[1] for c in choices)
    return np.concatenate(
        [np.pad(c, ((0, 0), (0, width - c.shape[1])), constant_values=-1) for c in choices]
    )


def _with_text(row: Row, text_weight: float) -> Row:
    weights = np.full(row.length, text_weight, dtype=np.float32)
    advantages = np.zeros(row.length, dtype=np.float32)
    weights[row.targets] = row.weights
    advantages[row.targets] = row.advantages
    choices = None
    if row.choices is not None:
        choices = np.full((row.length, row.choices.shape[1]), -1, dtype=np.int64)
        choices[row.targets] = row.choices
    return Row(
        ids=row.ids,
        targets=np.arange(1, row.length, dtype=np.int64),
        weights=weights[1:],
        old_logprobs=np.zeros(row.length - 1, dtype=np.float32),
        advantages=advantages[1:],
        choices=None if choices is None else choices[1:],
    )


def unit_weights(episodes: Sequence[Episode], mean: LossMean) -> list[list[float]]:
    """Weight of each token of each step such that all weights sum to 1. Steps and episodes in which
    no token was chosen, since all were forced, do not count."""
    chosen = [[len(chosen_places(s.allowed, len(s.action_ids))) for s in e.steps] for e in episodes]
    trained = [
        [n for n, s in zip(counts, e.steps, strict=True) if n and s.advantage is not None]
        for counts, e in zip(chosen, episodes, strict=True)
    ]
    tokens = sum(map(sum, trained))
    steps_in_all = sum(map(len, trained))
    episodes_in_all = sum(map(bool, trained))
    weights = []
    for counts, own in zip(chosen, trained, strict=True):
        own_tokens = sum(own)
        per_token = {
            "token": 1.0 / max(tokens, 1),
            "episode": 1.0 / max(episodes_in_all * own_tokens, 1),
        }
        weights.append(
            [
                1.0 / (steps_in_all * max(n, 1)) if mean == "step" else per_token[mean]
                for n in counts
            ]
            if own
            else [0.0] * len(counts)
        )
    return weights


def _episode_rows(episode: Episode, step_weights: Sequence[float]) -> list[tuple[Row, list[int]]]:
    """Rows, each with the numbers of the steps that are trained in it."""
    found = []
    for run in _runs(episode):
        trained = [t for t in run if episode.steps[t].advantage is not None]
        for row in _run_row([(episode.steps[t], step_weights[t]) for t in run]):
            found.append((row, trained))
    return found


def _runs(episode: Episode) -> list[list[int]]:
    """Numbers of steps, in runs of which each prompt continues the one before."""
    runs: list[list[int]] = []
    for t, step in enumerate(episode.steps):
        if t and _continues(episode.steps[t - 1], step):
            runs[-1].append(t)
        else:
            runs.append([t])
    return runs


def _continues(before: Step, after: Step) -> bool:
    """Whether the prompt of `after` starts with everything `before` read and wrote."""
    head = before.prompt_ids + before.action_ids
    return after.prompt_ids[: len(head)] == head


def _run_row(run: Sequence[tuple[Step, float]]) -> list[Row]:
    trained = [(s, w) for s, w in run if s.advantage is not None]
    if not trained:
        return []
    last = trained[-1][0]
    targets, weights, old, advantages, choices = [], [], [], [], []
    for step, weight in trained:
        chosen = chosen_places(step.allowed, len(step.action_ids))
        n = len(chosen)
        targets.append(len(step.prompt_ids) + chosen)
        weights.append(np.full(n, weight, dtype=np.float32))
        old.append(np.array(step.logprobs, dtype=np.float32)[chosen])
        advantages.append(np.full(n, step.advantage, dtype=np.float32))
        choices.append(choice_lines(step.allowed, chosen))
    if not sum(map(len, targets)):
        return []
    constrained = any(step.allowed is not None for step, _ in trained)
    return [
        Row(
            ids=np.array(last.prompt_ids + last.action_ids, dtype=np.int64),
            targets=np.concatenate(targets),
            weights=np.concatenate(weights),
            old_logprobs=np.concatenate(old),
            advantages=np.concatenate(advantages),
            choices=_stacked(choices) if constrained else None,
        )
    ]


def chosen_places(allowed: Allowed, tokens: int) -> np.ndarray:
    """Places of the tokens of a reply that were chosen, not forced; `allowed` as in `Step`."""
    if allowed is None:
        return np.arange(tokens, dtype=np.int64)
    return np.array([i for i, ids in enumerate(allowed) if len(ids) != 1], dtype=np.int64)


def choice_lines(allowed: Allowed, chosen: np.ndarray) -> np.ndarray:
    """Ids among which each chosen token was chosen, (n, C), filled up with -1."""
    sets = [allowed[i] if allowed else () for i in chosen]
    width = max([1, *map(len, sets)])
    lines = [[*ids, *[-1] * (width - len(ids))] for ids in sets]
    return np.array(lines, dtype=np.int64).reshape(len(chosen), width)
