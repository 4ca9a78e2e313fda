"""The ALFWorld engine in plain Python: what the real engine says, in microseconds.

Functions over a `Game` (what stays) and a `State` (what changes, immutable):

    move = parse(game, state, "take apple 1 from fridge 1")   # None: nothing happens
    after = apply(game, state, move)
    text = feedback(game, after, move)

`Engine` wraps them as one live game with `reset`, `step`, `admissible`, `snapshot`, `restore`.

Rules and sentences are those of `alfred.pddl` and `alfred.twl2` of alfworld 0.4.2, played by
textworld 1.7.0, including what looks odd there:

* A command counts only in its exact spelling; white space around it is all that is forgiven.
* `go to` is not offered for receptacles at the agent's own location, though there may be several.
* `look` in the middle of the room sees nothing, except in the intro, which lists everything.
* `examine` is offered for things in the hands only, as the planner reads the type `location,`
  (with a comma) in the domain, which nothing has.
* Clean, heat, cool, use and slice do not ask whether a door is open; slice reaches into closed
  receptacles. What was used once is on for ever; heat ends cool and the other way round.
* What was taken from one of several receptacles at a location and put into another one of them is
  seen both in its receptacle and on the floor by `look`.
* The game goes on after it is won, and undoing the goal takes the victory back.
* For a receptacle at several locations, which no official game has, the real engine goes to any
  of them, depending on the hash seed of the process; here it is the first in order.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

from untwine.envs.alfworld.game import Game, State
from untwine.envs.alfworld.goal import is_true
from untwine.envs.alfworld.moves import Move, admissible, command_of, moves, parse
from untwine.envs.alfworld.text import NOTHING, feedback, intro, look_text, opening

__all__ = [
    "Engine", "Move", "State", "Turn", "admissible", "apply", "command_of", "feedback", "intro",
    "moves", "opening", "parse", "state_key", "won",
]  # fmt: skip


def apply(game: Game, state: State, move: Move) -> State:
    """The state after a possible move (deletions first, then additions)."""
    effect = _EFFECTS.get(move.verb)
    after = effect(game, state, move.first, move.second) if effect else state
    return _checked(game, after, move) if game.tracks_checked else after


def _go(game: Game, state: State, receptacle: int, _: int) -> State:
    target = next(place for place in game.places[receptacle] if place != state.location)
    return state._replace(location=target)


def _open(game: Game, state: State, receptacle: int, _: int) -> State:
    return state._replace(opened=state.opened | 1 << receptacle)


def _close(game: Game, state: State, receptacle: int, _: int) -> State:
    return state._replace(opened=state.opened & ~(1 << receptacle))


def _take(game: Game, state: State, thing: int, receptacle: int) -> State:
    removed = state.removed
    if game.tracked >> receptacle & 1:
        removed = tuple(sorted({*removed, (thing, receptacle)}))
    return state._replace(
        contents=_changed(state.contents, receptacle, _without(state.contents[receptacle], thing)),
        held=_with(state.held, thing),
        full=True,
        near=_changed(state.near, state.location, _without(state.near[state.location], thing)),
        removed=removed,
    )


def _put(game: Game, state: State, thing: int, receptacle: int) -> State:
    removed = state.removed
    if (thing, receptacle) in removed:
        removed = tuple(pair for pair in removed if pair != (thing, receptacle))
    return state._replace(
        contents=_changed(state.contents, receptacle, _with(state.contents[receptacle], thing)),
        held=_without(state.held, thing),
        full=False,
        near=_changed(state.near, state.location, _with(state.near[state.location], thing)),
        removed=removed,
    )


def _clean(game: Game, state: State, thing: int, _: int) -> State:
    return state._replace(clean=state.clean | 1 << thing)


def _heat(game: Game, state: State, thing: int, _: int) -> State:
    return state._replace(hot=state.hot | 1 << thing, cool=state.cool & ~(1 << thing))


def _cool(game: Game, state: State, thing: int, _: int) -> State:
    return state._replace(cool=state.cool | 1 << thing, hot=state.hot & ~(1 << thing))


def _use(game: Game, state: State, thing: int, _: int) -> State:
    return state._replace(on=state.on ^ 1 << thing, toggled=state.toggled | 1 << thing)


def _slice(game: Game, state: State, thing: int, _: int) -> State:
    return state._replace(sliced=state.sliced | 1 << thing)


_EFFECTS: dict[str, Callable[[Game, State, int, int], State]] = {
    "go": _go,
    "open": _open,
    "close": _close,
    "take": _take,
    "put": _put,
    "clean": _clean,
    "heat": _heat,
    "cool": _cool,
    "use": _use,
    "slice": _slice,
}


def _checked(game: Game, state: State, move: Move) -> State:
    verb, first, _ = move
    if verb == "look":
        name = game.location_ids[state.location]
    elif verb in ("inventory", "help"):
        name = game.agent_id
    elif verb in ("open", "examine_receptacle"):
        name = game.receptacle_ids[first]
    elif verb == "examine_thing":
        name = game.thing_ids[first]
    else:
        return state
    return state._replace(checked=tuple(sorted({*state.checked, name})))


def _with(numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
    if number in numbers:
        return numbers
    found = list(numbers)
    insort(found, number)
    return tuple(found)


def _without(numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
    return tuple(x for x in numbers if x != number)


def _changed(
    rows: tuple[tuple[int, ...], ...], index: int, row: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    return (*rows[:index], row, *rows[index + 1 :])


def won(game: Game, state: State) -> bool:
    """Whether the goal holds."""
    return is_true(game.goal, state)


def state_key(game: Game, state: State) -> str:
    """A canonical key: equal exactly when the states (of one game) are equal.

    Only what differs from the start is written: rows of `contents` and `near` as numbers.
    """
    start = game.start
    contents = _differences(state.contents, start.contents)
    near = _differences(state.near, start.near)
    removed = ",".join(f"{a}<{b}" for a, b in state.removed)
    held = ",".join(map(str, state.held))
    bits = ".".join(f"{x:x}" for x in state[6:13])
    return (
        f"{state.location}|{held}{'+' if state.full else ''}|{contents}|{near}|{removed}|{bits}"
        + (f"|{','.join(state.checked)}" if state.checked else "")
    )


def _differences(rows: Sequence[tuple[int, ...]], start: Sequence[tuple[int, ...]]) -> str:
    return ";".join(
        f"{i}:{','.join(map(str, row))}"
        for i, (row, old) in enumerate(zip(rows, start, strict=True))
        if row is not old and row != old
    )


class Turn(NamedTuple):
    """What the engine says after `reset` or `step`; `valid` is False when nothing happened."""

    text: str
    score: int
    won: bool
    valid: bool


class Engine:
    """One live game. Cheap to make: everything that does not change is in the shared `Game`."""

    __slots__ = ("_admissible", "game", "state", "won")

    def __init__(self, game: Game) -> None:
        self.game = game
        self._admissible: tuple[str, ...] | None = None
        self._set(game.start)

    def reset(self) -> Turn:
        """Back to the start; the text is the intro, with the task."""
        self._set(self.game.start)
        return Turn(intro(self.game), int(self.won), self.won, True)

    def step(self, command: str) -> Turn:
        """Send one command. One that is not possible now changes nothing."""
        game, state = self.game, self.state
        move = parse(game, state, command)
        if move is None:
            return Turn(NOTHING, int(self.won), self.won, False)
        after = apply(game, state, move)
        if after is not state:
            self._set(after)
        return Turn(feedback(game, after, move), int(self.won), self.won, True)

    def admissible(self) -> tuple[str, ...]:
        """The commands that are possible now; computed when first asked for."""
        if self._admissible is None:
            self._admissible = admissible(self.game, self.state)
        return self._admissible

    def key(self) -> str:
        return state_key(self.game, self.state)

    def snapshot(self) -> State:
        return self.state

    def restore(self, snapshot: State) -> Turn:
        """Return to a snapshot of the same game; the text is what `look` says there."""
        self._set(snapshot)
        return Turn(look_text(self.game, snapshot, "nothing"), int(self.won), self.won, True)

    def _set(self, state: State) -> None:
        self.state = state
        self.won = won(self.game, state)
        self._admissible = None
