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
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from untwine.envs.alfworld.game import Game, State
from untwine.envs.alfworld.goal import is_true

NOTHING = "Nothing happens."
WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
GOAL_PREFIX = "Your task is to: "


class Move(NamedTuple):
    """One action with numbers of its things and receptacles.

    verb                                    first        second
    look, inventory, help
    go, open, close, examine_receptacle     receptacle
    examine_thing, use                      thing
    take, put, clean, heat, cool            thing        receptacle
    slice                                   thing        knife (a thing)
    """

    verb: str
    first: int = 0
    second: int = 0


# Commands and moves


def moves(game: Game, state: State) -> Iterator[Move]:
    """Every move that is possible now, in no particular order; a move may come twice."""
    yield Move("look")
    yield Move("inventory")
    if game.phrases.help_text is not None:
        yield Move("help")
    here = state.location
    for receptacle, places in enumerate(game.places):
        if places and (len(places) > 1 or places[0] != here):
            yield Move("go", receptacle)
    for thing in state.held:
        yield Move("examine_thing", thing)
    for receptacle in game.residents[here]:
        yield from _moves_at(game, state, receptacle)
    for knife in state.held:
        if game.knives >> knife & 1:
            for thing in state.near[here]:
                if game.sliceable >> thing & 1:
                    yield Move("slice", thing, knife)


def _moves_at(game: Game, state: State, receptacle: int) -> Iterator[Move]:
    yield Move("examine_receptacle", receptacle)
    if game.openable >> receptacle & 1:
        yield Move("close" if state.opened >> receptacle & 1 else "open", receptacle)
    if _reachable(game, state, receptacle):
        if not state.full:
            for thing in state.contents[receptacle]:
                if game.pickupable >> thing & 1:
                    yield Move("take", thing, receptacle)
        for thing in state.held:
            if game.accepts[receptacle] >> thing & 1:
                yield Move("put", thing, receptacle)
    for thing in state.held:
        if game.sinks >> receptacle & game.cleanable >> thing & 1:
            yield Move("clean", thing, receptacle)
        if game.microwaves >> receptacle & game.heatable >> thing & 1:
            yield Move("heat", thing, receptacle)
        if game.fridges >> receptacle & game.coolable >> thing & 1:
            yield Move("cool", thing, receptacle)
    for thing in state.contents[receptacle]:
        if game.toggleable >> thing & 1:
            yield Move("use", thing)


def _reachable(game: Game, state: State, receptacle: int) -> bool:
    """Whether one can reach into it: it has no door, or the door is open."""
    return bool((~game.openable | state.opened) >> receptacle & 1)


def command_of(game: Game, move: Move) -> str:
    """The command for a move, exactly as the game spells it."""
    verb, first, second = move
    if verb == "go":
        return f"go to {game.receptacles[first]}"
    if verb in ("open", "close"):
        return f"{verb} {game.receptacles[first]}"
    if verb == "take":
        return f"take {game.things[first]} from {game.receptacles[second]}"
    if verb == "put":
        words = ("put", "in/on") if game.phrases.old_put else ("move", "to")
        return f"{words[0]} {game.things[first]} {words[1]} {game.receptacles[second]}"
    if verb == "examine_receptacle":
        return f"examine {game.receptacles[first]}"
    if verb == "examine_thing":
        return f"examine {game.things[first]}"
    if verb == "use":
        return f"use {game.things[first]}"
    if verb == "slice":
        return f"slice {game.things[first]} with {game.things[second]}"
    if verb in ("clean", "heat", "cool"):
        return f"{verb} {game.things[first]} with {game.receptacles[second]}"
    return verb


def admissible(game: Game, state: State) -> tuple[str, ...]:
    """The commands that are possible now, each once, sorted as strings."""
    return tuple(sorted({command_of(game, move) for move in moves(game, state)}))


def parse(game: Game, state: State, command: str) -> Move | None:
    """The move that a command means now; None when nothing would happen."""
    verb, _, rest = command.strip().partition(" ")
    reader = _READERS.get(verb)
    move = reader(game, verb, rest) if reader else None
    return move if move is not None and _possible(game, state, move) else None


def _read_bare(game: Game, verb: str, rest: str) -> Move | None:
    # "look " cannot come here, since the command was stripped
    return None if rest else Move(verb)


def _read_go(game: Game, verb: str, rest: str) -> Move | None:
    receptacle = game.receptacle_of.get(rest[3:]) if rest.startswith("to ") else None
    return None if receptacle is None else Move("go", receptacle)


def _read_door(game: Game, verb: str, rest: str) -> Move | None:
    receptacle = game.receptacle_of.get(rest)
    return None if receptacle is None else Move(verb, receptacle)


def _read_examine(game: Game, verb: str, rest: str) -> Move | None:
    receptacle = game.receptacle_of.get(rest)
    if receptacle is not None:
        return Move("examine_receptacle", receptacle)
    thing = game.thing_of.get(rest)
    return None if thing is None else Move("examine_thing", thing)


def _read_use(game: Game, verb: str, rest: str) -> Move | None:
    thing = game.thing_of.get(rest)
    return None if thing is None else Move("use", thing)


def _read_take(game: Game, verb: str, rest: str) -> Move | None:
    return _read_pair(game, verb, rest, " from ", game.receptacle_of)


def _read_put(game: Game, verb: str, rest: str) -> Move | None:
    if (verb == "put") != game.phrases.old_put:
        return None
    return _read_pair(game, "put", rest, " in/on " if verb == "put" else " to ", game.receptacle_of)


def _read_device(game: Game, verb: str, rest: str) -> Move | None:
    return _read_pair(game, verb, rest, " with ", game.receptacle_of)


def _read_slice(game: Game, verb: str, rest: str) -> Move | None:
    return _read_pair(game, verb, rest, " with ", game.thing_of)


def _read_pair(game: Game, verb: str, rest: str, word: str, other: dict[str, int]) -> Move | None:
    left, _, right = rest.partition(word)
    first, second = game.thing_of.get(left), other.get(right)
    return None if first is None or second is None else Move(verb, first, second)


_READERS: dict[str, Callable[[Game, str, str], Move | None]] = {
    "look": _read_bare,
    "inventory": _read_bare,
    "help": _read_bare,
    "go": _read_go,
    "open": _read_door,
    "close": _read_door,
    "examine": _read_examine,
    "use": _read_use,
    "take": _read_take,
    "move": _read_put,
    "put": _read_put,
    "clean": _read_device,
    "heat": _read_device,
    "cool": _read_device,
    "slice": _read_slice,
}


def _possible(game: Game, state: State, move: Move) -> bool:
    verb, first, second = move
    if verb in ("look", "inventory"):
        return True
    if verb == "help":
        return game.phrases.help_text is not None
    if verb == "go":
        places = game.places[first]
        return bool(places) and (len(places) > 1 or places[0] != state.location)
    if verb == "examine_thing":
        return first in state.held
    if verb == "slice":
        return bool(game.sliceable >> first & game.knives >> second & 1) and (
            second in state.held and first in state.near[state.location]
        )
    if verb == "use":
        return bool(game.toggleable >> first & 1) and any(
            first in state.contents[receptacle] for receptacle in game.residents[state.location]
        )
    receptacle = first if verb in ("open", "close", "examine_receptacle") else second
    if receptacle not in game.residents[state.location]:
        return False
    return verb == "examine_receptacle" or move in _moves_at(game, state, receptacle)


# What a move does


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


# What the game says


def feedback(game: Game, state: State, move: Move) -> str:
    """The answer to a move, in the state after it."""
    verb, first, second = move
    if verb == "go":
        place = game.locations[state.location] if game.phrases.old_goto else game.receptacles[first]
        return f"You arrive at {place}. {_contents(game, state, first)}"
    if verb == "take":
        return f"You pick up the {game.things[first]} from the {game.receptacles[second]}."
    if verb == "put":
        thing, receptacle = game.things[first], game.receptacles[second]
        if game.phrases.old_put:
            return f"You put the {thing} in/on the {receptacle}."
        return f"You move the {thing} to the {receptacle}."
    if verb == "examine_receptacle":
        return _contents(game, state, first)
    if verb == "open":
        return f"You open the {game.receptacles[first]}. {_contents(game, state, first)}"
    if verb == "close":
        return f"You close the {game.receptacles[first]}."
    if verb in ("clean", "heat", "cool"):
        return f"You {verb} the {game.things[first]} using the {game.receptacles[second]}."
    if verb == "use":
        return f"You turn on the {game.things[first]}."
    if verb == "slice":
        return f"You sliced the {game.things[first]} with the {game.things[second]}."
    if verb == "look":
        return _look(game, state, "nothing")
    if verb == "inventory":
        return _inventory(game, state)
    if verb == "examine_thing":
        return _condition(game, state, first)
    return game.phrases.help_text or ""


def intro(game: Game) -> str:
    """What the game says at the start, the task included."""
    return f"{opening(game)}\n\n{GOAL_PREFIX}{game.phrases.task}"


def opening(game: Game) -> str:
    """What the game says at the start, without the task."""
    order = [
        name for name, places in zip(game.receptacles, game.places, strict=True) for _ in places
    ]
    return f"{WELCOME}\n\n{_look(game, game.start, _listed(order))}"


def _look(game: Game, state: State, around: str) -> str:
    here = game.residents[state.location]
    if not here:
        return f"You are in the middle of a room. Looking quickly around you, you see {around}."
    facing = _joined([game.receptacles[receptacle] for receptacle in here])
    floor = [
        game.things[thing]
        for thing in state.near[state.location]
        for receptacle in here
        if (thing, receptacle) in state.removed
    ]
    return f"You are facing the {facing}. Next to it, you see {_listed(floor)}."


def _contents(game: Game, state: State, receptacle: int) -> str:
    name = game.receptacles[receptacle]
    seen = [game.things[thing] for thing in state.contents[receptacle]]
    if not game.openable >> receptacle & 1:
        return f"On the {name}, you see {_listed(seen)}."
    if state.opened >> receptacle & 1:
        return f"The {name} is open. In it, you see {_listed(seen)}."
    return f"The {name} is closed."


def _inventory(game: Game, state: State) -> str:
    if not state.full:
        return "You are not carrying anything."
    return f"You are carrying: {_listed([game.things[thing] for thing in state.held])}."


def _condition(game: Game, state: State, thing: int) -> str:
    name = game.things[thing]
    if game.vessels >> thing & 1:
        inside = [game.things[x] for x in game.inside[thing]]
        return f"This is a normal {name}. In it, you see {_listed(inside)}."
    clean, sliced = state.clean >> thing & 1, state.sliced >> thing & 1
    hot, cool = state.hot >> thing & 1, state.cool >> thing & 1
    if clean and (hot or cool):
        return f"This is a {'hot' if hot else 'cool'} and clean {'sliced ' * sliced}{name}."
    if sliced and (clean or hot or cool):
        return f"This is a {'clean' if clean else 'hot' if hot else 'cool'} sliced {name}."
    if hot or clean or cool:
        return f"This is a {'hot' if hot else 'clean' if clean else 'cold'} {name}."
    if (game.toggleable & state.toggled) >> thing & 1:
        return f"This {name} is on."
    if game.sliceable >> thing & sliced:
        return f"This is a sliced {name}."
    return f"There's nothing special about {name}."


def _listed(names: Sequence[str]) -> str:
    return _joined([f"a {name}" for name in names]) if names else "nothing"


def _joined(parts: Sequence[str]) -> str:
    """`x`, `x, and y`, `x, y, and z`."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"


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

    __slots__ = ("_admissible", "_won", "game", "state")

    def __init__(self, game: Game) -> None:
        self.game = game
        self._set(game.start)

    def reset(self) -> Turn:
        """Back to the start; the text is the intro, with the task."""
        self._set(self.game.start)
        return Turn(intro(self.game), int(self._won), self._won, True)

    def step(self, command: str) -> Turn:
        """Send one command. One that is not possible now changes nothing."""
        game, state = self.game, self.state
        move = parse(game, state, command)
        if move is None:
            return Turn(NOTHING, int(self._won), self._won, False)
        after = apply(game, state, move)
        if after is not state:
            self._set(after)
        return Turn(feedback(game, after, move), int(self._won), self._won, True)

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
        return Turn(_look(self.game, snapshot, "nothing"), int(self._won), self._won, True)

    def _set(self, state: State) -> None:
        self.state = state
        self._won = won(self.game, state)
        self._admissible: tuple[str, ...] | None = None
