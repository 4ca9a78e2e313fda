"""Shortest plans for ALFWorld games, by search over the engine's own states.

    plan = shortest_plan(game)      # ("go to fridge 1", "open fridge 1", ...)

The goal is split into its cases ("apple 2 in the fridge, hot"). A case is searched breadth first,
over those moves only that can bring it about: go, open, take, put with the things it names and the
receptacles that hold or may take them, the appliances and lamps it needs. This keeps plans
shortest, because every walk takes one step whatever the distance, hands hold one thing, and
nothing else stands in the way. Cases that differ in names only are searched once.

A goal of another kind (with negations, or what was looked at), and a game in which a receptacle
has several locations, is searched over all moves, up to MAX_STATES states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from untwine.envs.alfworld.engine import apply, won
from untwine.envs.alfworld.game import Game, State
from untwine.envs.alfworld.goal import FALSE, TRUE, Goal, is_true
from untwine.envs.alfworld.moves import Move, command_of, moves
from untwine.errors import EnvError

MAX_CASES = 20_000  # cases of a goal; official games have less than 200
MAX_STATES = 50_000  # states of one search; a case of an official goal needs less than 2000

Case: TypeAlias = tuple[Goal, ...]  # facts that must all hold
Moves: TypeAlias = Callable[[State, bool], Iterator[Move]]


class Unreachable(EnvError):
    """The goal cannot be brought about from the start."""


def shortest_plan(game: Game, where: str = "game") -> tuple[str, ...]:
    """The commands of a shortest plan, none when the goal holds at the start.

    Of several, always the same one. Unreachable, with the reason, when there is no plan; another
    EnvError when the search would be too long.
    """
    if won(game, game.start):
        return ()
    cases = _cases(game.goal, where)
    if cases is None or any(len(places) > 1 for places in game.places):
        plan = _search(game, lambda state, _: moves(game, state), game.goal, None, where)
        if plan is None:
            raise Unreachable(f"{where}: no sequence of commands reaches the goal")
    else:
        plan = _best(game, cases, where)
    return tuple(command_of(game, move) for move in plan)


def _best(game: Game, cases: list[Case], where: str) -> tuple[Move, ...]:
    best: tuple[Move, ...] | None = None
    fault, seen = "", set()
    for case in cases:
        impossible = next(filter(None, (_why_not(game, fact) for fact in case)), "")
        if impossible:
            fault = fault or impossible
            continue
        focus = _Focus(game, case)
        signature = focus.signature()
        if signature in seen:
            continue
        seen.add(signature)
        longest = None if best is None else len(best) - 1
        best = _search(game, focus.moves, ("and", case), longest, where) or best
    if best is None:
        fault = fault or "what it asks for cannot be brought together"
        raise Unreachable(f"{where}: the goal cannot be reached: {fault}")
    return best


def _search(
    game: Game, possible: Moves, goal: Goal, longest: int | None, where: str
) -> tuple[Move, ...] | None:
    """A shortest sequence of moves to the goal; None when there is none of at most `longest`."""
    came: dict[State, tuple[State, Move] | None] = {game.start: None}
    front, depth = [(game.start, False)], 0
    while front and (longest is None or depth < longest):
        depth += 1
        later = []
        for state, went in front:
            for move in possible(state, went):
                after = apply(game, state, move)
                if after in came:
                    continue
                came[after] = (state, move)
                if is_true(goal, after):
                    return _way(came, after)
                later.append((after, move.verb == "go"))
        if len(came) > MAX_STATES:
            raise EnvError(f"{where}: no plan within {MAX_STATES} states")
        front = later
    return None


def _way(came: dict[State, tuple[State, Move] | None], state: State) -> tuple[Move, ...]:
    found = []
    step = came[state]
    while step is not None:
        state, move = step
        found.append(move)
        step = came[state]
    return tuple(reversed(found))


def _cases(goal: Goal, where: str) -> list[Case] | None:
    """The goal as a choice of cases; None when it asks for more than facts that can be made."""
    kind = goal[0]
    if kind == "fact":
        return None if goal[1] == "holdsany" else [(goal,)]
    if goal in (TRUE, FALSE):
        return [()] if goal == TRUE else []
    if kind not in ("and", "or"):
        return None
    parts = [_cases(part, where) for part in goal[1]]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if kind == "or":
        found = [case for part in known for case in part]
    else:
        found = [()]
        for part in known:
            if len(found) * len(part) > MAX_CASES:
                raise EnvError(f"{where}: the goal has more than {MAX_CASES} cases")
            found = [tuple(dict.fromkeys((*a, *b))) for a in found for b in part]
    return list({frozenset(case): case for case in reversed(found)}.values())[::-1]


# condition -> (its name, field of Game with the things that can get it, field with the appliances)
_MADE = {
    "isclean": ("clean", "cleanable", "sinks"),
    "ishot": ("hot", "heatable", "microwaves"),
    "iscool": ("cool", "coolable", "fridges"),
}
_VERBS = {"isclean": "clean", "ishot": "heat", "iscool": "cool"}


def _why_not(game: Game, fact: Goal) -> str:
    """Why a fact can never hold, or an empty string when nothing speaks against it."""
    _, predicate, first, second = fact
    start = game.start
    if is_true(fact, start):
        return ""
    if predicate in ("atlocation", "opened"):
        return ""
    name = game.things[first]
    if predicate in _MADE:
        word, able, appliances = _MADE[predicate]
        if not getattr(game, able) >> first & 1:
            return f"{name} cannot be made {word}"
        return "" if getattr(game, appliances) else f"nothing here makes {name} {word}"
    if predicate == "issliced":
        possible = game.sliceable >> first & 1 and game.knives
        return "" if possible else f"{name} cannot be sliced"
    if predicate in ("istoggled", "ison"):
        possible = game.toggleable >> first & 1
        return "" if possible else f"{name} cannot be switched on"
    if first not in start.held and not (
        game.pickupable >> first & 1 and any(first in row for row in start.contents)
    ):
        return f"{name} cannot be taken"
    if predicate == "inreceptacle" and not game.accepts[second] >> first & 1:
        return f"{game.receptacles[second]} does not take {name}"
    return ""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a case names: things to carry, conditions to give them, receptacles to use."""

    things: tuple[int, ...]
    made: frozenset[tuple[str, int]]
    used: frozenset[int]
    sliced: frozenset[int]
    receptacles: tuple[int, ...]
    doors: frozenset[int]  # of these the door may be worth opening


class _Focus:
    """The moves that can serve one case."""

    def __init__(self, game: Game, case: Case) -> None:
        self._game, self._case = game, case
        self._wanted = wanted = _wanted_of(game, case)
        self._here: dict[int, list[int]] = {}
        for receptacle in wanted.receptacles:
            for location in game.places[receptacle]:
                self._here.setdefault(location, []).append(receptacle)

    def moves(self, state: State, went: bool) -> Iterator[Move]:
        """Moves worth trying; after a walk no second one, as it could have been the first."""
        here, wanted, game = state.location, self._wanted, self._game
        if not went:
            for location, found in self._here.items():
                if location != here:
                    yield Move("go", found[0])
        for receptacle in self._here.get(here, ()):
            yield from self._moves_at(state, receptacle)
        for thing in wanted.sliced:
            if thing in state.near[here]:
                for knife in state.held:
                    if game.knives >> knife & 1:
                        yield Move("slice", thing, knife)

    def _moves_at(self, state: State, receptacle: int) -> Iterator[Move]:
        game, wanted = self._game, self._wanted
        contents = state.contents[receptacle]
        if game.openable & ~state.opened & 1 << receptacle:
            if receptacle in wanted.doors:
                yield Move("open", receptacle)
        else:
            if not state.full:
                for thing in wanted.things:
                    if thing in contents and game.pickupable >> thing & 1:
                        yield Move("take", thing, receptacle)
            for thing in state.held:
                if game.accepts[receptacle] >> thing & 1:
                    yield Move("put", thing, receptacle)
        for thing in state.held:
            for predicate, verb in _VERBS.items():
                _, able, appliances = _MADE[predicate]
                if (predicate, thing) in wanted.made and (
                    getattr(game, appliances) >> receptacle & getattr(game, able) >> thing & 1
                ):
                    yield Move(verb, thing, receptacle)
        for thing in wanted.used:
            if thing in contents and game.toggleable >> thing & 1:
                yield Move("use", thing)

    def signature(self) -> tuple[Any, ...]:
        """Equal for cases that differ in names only: the same plan, renamed, solves both."""
        game, start, wanted = self._game, self._game.start, self._wanted
        thing = {name: i for i, name in enumerate(wanted.things)}
        for other in (*wanted.used, *wanted.sliced):
            thing.setdefault(other, len(thing))
        receptacle = {name: i for i, name in enumerate(wanted.receptacles)}
        place = {start.location: 0}
        for number in wanted.receptacles:
            for location in game.places[number]:
                place.setdefault(location, len(place))
        bits = (*start[7:13], game.pickupable, game.cleanable, game.heatable, game.coolable,
                game.toggleable, game.sliceable, game.knives)  # fmt: skip
        doors = (game.openable, start.opened, game.sinks, game.microwaves, game.fridges)
        return (
            tuple((*(b >> t & 1 for b in bits), t in start.held) for t in thing),
            tuple(
                (
                    *(b >> r & 1 for b in doors),
                    r in wanted.doors,
                    tuple(place[x] for x in game.places[r]),
                    tuple(game.accepts[r] >> t & 1 for t in thing),
                    tuple(t in start.contents[r] for t in thing),
                )
                for r in receptacle
            ),
            tuple(tuple(t in start.near[x] for t in thing) for x in place),
            tuple(_renamed(fact, thing, receptacle, place) for fact in self._case),
        )


def _renamed(
    fact: Goal, thing: dict[int, int], receptacle: dict[int, int], place: dict[int, int]
) -> Goal:
    _, predicate, first, second = fact
    if predicate == "atlocation":
        return (predicate, place.get(first, ~first))
    if predicate == "opened":
        return (predicate, receptacle[first])
    if predicate == "inreceptacle":
        return (predicate, thing[first], receptacle[second])
    if predicate == "objectatlocation":
        return (predicate, thing[first], place.get(second, ~second))
    return (predicate, thing[first])


def _wanted_of(game: Game, case: Case) -> _Wanted:
    start = game.start
    things: dict[int, None] = {}
    used, sliced, made = set(), set(), set()
    targets: dict[int, None] = {}
    appliances: dict[int, None] = {}
    doors = set()
    for _, predicate, first, second in case:
        if predicate == "opened":
            targets[first] = None
            doors.add(first)
        elif predicate == "atlocation":
            targets.update(dict.fromkeys(game.residents[first]))
        elif predicate in ("istoggled", "ison"):
            used.add(first)
        else:
            things[first] = None
            if predicate == "inreceptacle":
                targets[second] = None
            elif predicate == "objectatlocation":
                targets.update(dict.fromkeys(game.residents[second]))
            elif predicate == "issliced":
                sliced.add(first)
            elif predicate in _MADE:
                made.add((predicate, first))
                mask = getattr(game, _MADE[predicate][2])
                appliances.update(
                    dict.fromkeys(r for r in range(len(game.places)) if mask >> r & 1)
                )
    if sliced:
        things.update(dict.fromkeys(_numbers(game.knives)))
        for location, near in enumerate(start.near):
            if sliced & set(near):
                appliances.update(dict.fromkeys(game.residents[location]))
    holding = {
        thing: [r for r, row in enumerate(start.contents) if thing in row]
        for thing in (*things, *sorted(used))
    }
    sources = [r for found in holding.values() for r in found]
    found = dict.fromkeys((*targets, *sources, *appliances))
    doors.update(targets, (r for thing in things for r in holding[thing]))
    if start.held:
        rests = _rests(game, found)
        found.update(dict.fromkeys(rests))
        doors.update(rests)
    things.update(dict.fromkeys(start.held))
    return _Wanted(
        tuple(things), frozenset(made), frozenset(used), frozenset(sliced), tuple(found),
        frozenset(doors),
    )  # fmt: skip


def _rests(game: Game, known: dict[int, None]) -> list[int]:
    """Where what the hands hold at the start may be put down without a detour, or nearest to one:
    at the start, where one goes anyway, and elsewhere one without and one with a closed door."""
    start = game.start
    visited = {start.location, *(x for r in known for x in game.places[r])}
    found = []
    for thing in start.held:
        takers = [r for r, mask in enumerate(game.accepts) if mask >> thing & 1 and game.places[r]]
        found += [r for r in takers if visited & set(game.places[r])]
        closed = game.openable & ~start.opened
        for shut in (0, 1):
            found += [r for r in takers if closed >> r & 1 == shut][:1]
    return found


def _numbers(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]
