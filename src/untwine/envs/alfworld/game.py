"""What never changes in an ALFWorld game, as compact tables shared by all its live environments.

Build one with `build_game(problem, phrases)`; `engine.py` plays it. A `Game` is immutable, holds
no open file and may be pickled and used by many threads.

Numbers. Things (`object` in PDDL), receptacles and locations are numbered 0, 1, ... in the order of
their PDDL ids as strings. This is also the order in which the real engine lists them, because it
walks through facts in sorted order.

Names. As the real engine's demangler gives them: the class is what stands before the first
`_bar_` (with `basin` added when the id has `basin` in it), and of the n ids of a class the first
in order is called `n`, the last `1`. An id without `_bar_` is its own name, with a space behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from untwine.envs.alfworld.goal import Goal, Numbering, ground
from untwine.envs.alfworld.problem import Fact, Problem

KNIFE_TYPES = ("knifetype", "butterknifetype")


@dataclass(frozen=True, slots=True)
class Phrases:
    """What differs between the texts of official files of different age.

    task       the sentence after "Your task is to: ", with its final stop
    old_put    "put O in/on R" (json_2.1.1 as first published) instead of "move O to R"
    old_goto   "You arrive at loc 12." instead of "You arrive at fridge 1."
    help_text  answer to `help`; None where the game does not know this command
    """

    task: str
    old_put: bool
    old_goto: bool
    help_text: str | None


class State(NamedTuple):
    """Everything that can change in a game; immutable, so that a snapshot is the state itself.

    location   where the agent is
    held       things in the agent's hands, rising; one at most unless the game starts otherwise
    full       the agent's hands are taken (`holdsAny`)
    contents   for each receptacle, the things in it, rising
    near       for each location, the things said to be at it (`objectAtLocation`), rising
    removed    (thing, receptacle) taken out and not put back, rising; only for receptacles that
               share a location, as nothing depends on it elsewhere
    opened     receptacles that are open, one bit each
    clean, hot, cool, sliced, toggled, on: things of which it is true, one bit each
    checked    ids of what was looked at, rising; only kept when the goal asks for it
    """

    location: int
    held: tuple[int, ...]
    full: bool
    contents: tuple[tuple[int, ...], ...]
    near: tuple[tuple[int, ...], ...]
    removed: tuple[tuple[int, int], ...]
    opened: int
    clean: int
    hot: int
    cool: int
    sliced: int
    toggled: int
    on: int
    checked: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Game:
    """One ALFWorld game. Sequences are indexed by the number of a thing, receptacle or location.

    thing_ids, receptacle_ids, location_ids   PDDL ids, lower case, sorted
    things, receptacles, locations   names as the player reads them ("apple 1", "loc 7")
    thing_of, receptacle_of          name -> number
    thing_types     types of each thing, e.g. ("appletype",); normally one
    receptacle_types  the same for receptacles, e.g. ("fridgetype",)
    places          for each receptacle, the locations it is at, rising; normally one
    residents       for each location, the receptacles there, rising
    accepts         for each receptacle, things that may be put there, one bit each (canContain)
    openable        receptacles, one bit each
    sinks, microwaves, fridges       receptacles that clean, heat and cool, one bit each
    pickupable, cleanable, heatable, coolable, toggleable, sliceable, knives, vessels
                    things, one bit each (vessels: isReceptacleObject)
    inside          for each thing, the things inside it (inReceptacleObject), rising
    tracked         receptacles for which State.removed is kept, one bit each
    start           the state at the start
    goal            the condition to bring about, grounded (goal.py)
    phrases         sentences that depend on the age of the file
    agent_id        PDDL id of the agent
    tracks_checked  whether State.checked is kept
    """

    thing_ids: tuple[str, ...]
    receptacle_ids: tuple[str, ...]
    location_ids: tuple[str, ...]
    things: tuple[str, ...]
    receptacles: tuple[str, ...]
    locations: tuple[str, ...]
    thing_types: tuple[tuple[str, ...], ...]
    receptacle_types: tuple[tuple[str, ...], ...]
    places: tuple[tuple[int, ...], ...]
    residents: tuple[tuple[int, ...], ...]
    accepts: tuple[int, ...]
    openable: int
    sinks: int
    microwaves: int
    fridges: int
    pickupable: int
    cleanable: int
    heatable: int
    coolable: int
    toggleable: int
    sliceable: int
    knives: int
    vessels: int
    inside: tuple[tuple[int, ...], ...]
    tracked: int
    start: State
    goal: Goal
    phrases: Phrases
    agent_id: str
    tracks_checked: bool
    thing_of: dict[str, int] = field(repr=False, compare=False)
    receptacle_of: dict[str, int] = field(repr=False, compare=False)


def display_names(ids: Iterable[str]) -> dict[str, str]:
    """id -> name, for all ids that occur in the facts of a game (alfworld's `Demangler`)."""
    ordered = sorted(set(ids))
    left = Counter(_class(name) for name in ordered if "_bar_" in name)
    names = {}
    for name in ordered:
        if "_bar_" not in name:
            names[name] = f"{_plain(name)} "
            continue
        kind = _class(name)
        names[name] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def _class(name: str) -> str:
    return name.partition("_bar_")[0] + ("basin" if "basin" in name else "")


def _plain(name: str) -> str:
    for written, meant in (("minus", "-"), ("plus", "+"), ("dot", "."), ("comma", ",")):
        name = name.replace(f"_{written}_", meant)
    return name


def build_game(problem: Problem, phrases: Phrases, where: str = "game") -> Game:
    """The tables of a problem. EnvError when its goal is too large to be written out."""
    return _Builder(problem, where).build(phrases)


class _Builder:
    def __init__(self, problem: Problem, where: str) -> None:
        self._problem, self._where = problem, where
        self._by_predicate: dict[str, list[Fact]] = {}
        for fact in sorted(problem.facts):
            self._by_predicate.setdefault(fact[0], []).append(fact)
        used = {name for fact in problem.facts for name in fact[1:]}
        self._names = display_names(used)
        self._thing_ids = self._of_type("object", used)
        self._receptacle_ids = self._of_type("receptacle", used)
        self._location_ids = self._of_type("location", used)
        self._thing = {name: i for i, name in enumerate(self._thing_ids)}
        self._receptacle = {name: i for i, name in enumerate(self._receptacle_ids)}
        self._location = {name: i for i, name in enumerate(self._location_ids)}
        self._agent = self._of_type("agent", set(problem.objects))[0]

    def _of_type(self, kind: str, used: set[str]) -> tuple[str, ...]:
        return tuple(sorted(x for x, t in self._problem.objects.items() if t == kind and x in used))

    def build(self, phrases: Phrases) -> Game:
        problem, numbering = self._problem, Numbering(self._thing, self._receptacle, self._location)
        goal, tracks_checked = ground(problem, numbering, self._agent, self._where)
        receptacles, things = self._receptacle, self._thing
        places = self._pairs("receptacleatlocation", receptacles, self._location)
        types = self._pairs_of_names("receptacletype", self._receptacle_ids)
        things_by_name = tuple(self._names[x] for x in self._thing_ids)
        receptacles_by_name = tuple(self._names[x] for x in self._receptacle_ids)
        tracked = self._tracked(places)
        return Game(
            thing_ids=self._thing_ids,
            receptacle_ids=self._receptacle_ids,
            location_ids=self._location_ids,
            things=things_by_name,
            receptacles=receptacles_by_name,
            locations=tuple(self._names[x] for x in self._location_ids),
            thing_types=self._pairs_of_names("objecttype", self._thing_ids),
            receptacle_types=types,
            places=places,
            residents=_inverted(places, len(self._location_ids)),
            accepts=self._accepts(types),
            openable=self._bits("openable", receptacles),
            sinks=_bits(i for i, t in enumerate(types) if "sinkbasintype" in t),
            microwaves=_bits(i for i, t in enumerate(types) if "microwavetype" in t),
            fridges=_bits(i for i, t in enumerate(types) if "fridgetype" in t),
            pickupable=self._bits("pickupable", things),
            cleanable=self._bits("cleanable", things),
            heatable=self._bits("heatable", things),
            coolable=self._bits("coolable", things),
            toggleable=self._bits("toggleable", things),
            sliceable=self._bits("sliceable", things),
            knives=_bits(
                things[fact[1]] for fact in self._facts("objecttype") if fact[2] in KNIFE_TYPES
            ),
            vessels=self._bits("isreceptacleobject", things),
            inside=_inverted(self._pairs("inreceptacleobject", things, things), len(things)),
            tracked=tracked,
            start=self._start(tracks_checked),
            goal=goal,
            phrases=phrases,
            agent_id=self._agent,
            tracks_checked=tracks_checked,
            thing_of={name: i for i, name in enumerate(things_by_name)},
            receptacle_of={name: i for i, name in enumerate(receptacles_by_name)},
        )

    def _facts(self, predicate: str) -> list[Fact]:
        return self._by_predicate.get(predicate, [])

    def _bits(self, predicate: str, numbers: dict[str, int]) -> int:
        return _bits(numbers[fact[1]] for fact in self._facts(predicate))

    def _pairs(
        self, predicate: str, first: dict[str, int], second: dict[str, int]
    ) -> tuple[tuple[int, ...], ...]:
        """For each number of the first argument, those of the second, rising."""
        found: list[set[int]] = [set() for _ in first]
        for _, a, b in self._facts(predicate):
            if a in first:
                found[first[a]].add(second[b])
        return tuple(tuple(sorted(x)) for x in found)

    def _pairs_of_names(self, predicate: str, ids: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        found: dict[str, list[str]] = {name: [] for name in ids}
        for _, a, b in self._facts(predicate):
            found[a].append(b)
        return tuple(tuple(sorted(found[name])) for name in ids)

    def _accepts(self, types: Sequence[tuple[str, ...]]) -> tuple[int, ...]:
        of_type: dict[str, int] = {}
        for _, thing, kind in self._facts("objecttype"):
            of_type[kind] = of_type.get(kind, 0) | 1 << self._thing[thing]
        holds: dict[str, int] = {}
        for _, kind, content in self._facts("cancontain"):
            holds[kind] = holds.get(kind, 0) | of_type.get(content, 0)
        found = []
        for kinds in types:
            mask = 0
            for kind in kinds:
                mask |= holds.get(kind, 0)
            found.append(mask)
        return tuple(found)

    @staticmethod
    def _tracked(places: Sequence[tuple[int, ...]]) -> int:
        count = Counter(location for found in places for location in found)
        return _bits(
            i
            for i, found in enumerate(places)
            if len(found) > 1 or any(count[location] > 1 for location in found)
        )

    def _start(self, tracks_checked: bool) -> State:
        things = self._thing
        contents = self._pairs("inreceptacle", things, self._receptacle)
        near = self._pairs("objectatlocation", things, self._location)
        return State(
            location=self._location[self._facts("atlocation")[0][2]],
            held=tuple(sorted(things[fact[2]] for fact in self._facts("holds"))),
            full=bool(self._facts("holdsany")),
            contents=_inverted(contents, len(self._receptacle_ids)),
            near=_inverted(near, len(self._location_ids)),
            removed=(),
            opened=self._bits("opened", self._receptacle),
            clean=self._bits("isclean", things),
            hot=self._bits("ishot", things),
            cool=self._bits("iscool", things),
            sliced=self._bits("issliced", things),
            toggled=self._bits("istoggled", things),
            on=self._bits("ison", things),
            checked=tuple(f[1] for f in self._facts("checked")) if tracks_checked else (),
        )


def _bits(numbers: Iterable[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def _inverted(pairs: Sequence[tuple[int, ...]], count: int) -> tuple[tuple[int, ...], ...]:
    """From "for each a, its b" to "for each of `count` b, its a", rising."""
    found: list[list[int]] = [[] for _ in range(count)]
    for a, several in enumerate(pairs):
        for b in several:
            found[b].append(a)
    return tuple(tuple(x) for x in found)
