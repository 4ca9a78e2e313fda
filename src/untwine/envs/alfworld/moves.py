"""Which moves are possible in a state, how they are spelled, and which move a command means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from untwine.envs.alfworld.game import Game, State


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
