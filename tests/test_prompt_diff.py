"""Two prompts beside each other: nothing is lost, and what is equal is cut."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from untwine.prompt_diff import prompt_diff


def sides(pieces: Sequence[tuple[str, str]]) -> tuple[str, str]:
    first = "".join(text for kind, text in pieces if kind in ("same", "first"))
    return first, "".join(text for kind, text in pieces if kind in ("same", "second"))


TEXTS = st.text(st.sampled_from("ab \n.\u2028é"), max_size=60)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_a_diff_holds_both_prompts(first: str, second: str) -> None:
    pieces = prompt_diff(first, second)
    assert sides(pieces) == (first, second)
    assert all(text for _, text in pieces)


def test_a_diff_shows_words_and_cuts_what_is_equal() -> None:
    same = "x" * 1000
    pieces = prompt_diff(
        f"{same}\nGo to the kitchen.\n{same}", f"{same}\nGo to a big hall.\n{same}"
    )
    assert pieces == [
        ("cut", "847 equal characters"),
        ("same", "x" * 153 + "\nGo to "),
        ("first", "the kitchen"),
        ("second", "a big hall"),
        ("same", ".\n" + "x" * 158),
        ("cut", "842 equal characters"),
    ]
    assert prompt_diff("equal", "equal") == [("same", "equal")]


def test_a_diff_is_bounded() -> None:
    pieces = prompt_diff("a" * 5000, "b" * 5000, longest=6000)
    assert pieces == [
        ("first", "a" * 5000), ("second", "b" * 1000), ("cut", "4000 more characters"),
    ]  # fmt: skip
