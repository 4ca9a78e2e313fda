"""What a recipe puts together."""

from __future__ import annotations

from collections import Counter

from untwine.config import EnvConfig, Recipe
from untwine.envs.splits import load_splits
from untwine.progress import Display
from untwine.workshop import Workshop, training_refs


def transcripts_of(episodes: int, noise: float) -> list[tuple[str, tuple[str, ...]]]:
    recipe = Recipe.model_validate(
        {
            "env": {"name": "rooms", "tasks": ["fetch"], "variations": 3, "max_steps": 20},
            "policy": {
                "model": "tiny",
                "tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2},
            },
            "cold_start": {"episodes": episodes, "noise": noise},
        }
    )
    with Workshop(recipe, Display(quiet=True)) as workshop:
        return [
            (str(t.ref), tuple(move.command.text for move in t.moves)) for t in workshop.transcripts
        ]


def test_reinforcement_may_play_fewer_variations_than_the_cold_start() -> None:
    splits = load_splits("rooms", "default", {}, None)

    def numbers(env: int, rl: int) -> list[int]:
        config = EnvConfig(name="rooms", tasks=["fetch"], variations=env)
        return [ref.variation for ref in training_refs(config, splits, rl)]

    everything = numbers(0, 0)
    assert numbers(0, 5) == numbers(5, 0) == numbers(9, 5) == numbers(5, 9) == everything[:5]
    assert len(everything) > 9


def test_more_demonstrations_than_instances_are_played_with_other_errors() -> None:
    found = transcripts_of(8, 0.5)
    assert sorted(Counter(ref for ref, _ in found).values()) == [2, 3, 3]
    assert len(set(found)) > 5
    assert found == transcripts_of(8, 0.5)


def test_the_same_faultless_demonstration_is_not_played_twice() -> None:
    assert len(transcripts_of(8, 0.0)) == 3
