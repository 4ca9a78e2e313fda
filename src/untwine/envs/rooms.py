"""A small house of rooms: the built-in text environment.

It needs no download and no second process, answers in microseconds, and is exactly repeatable, so
smoke tests, the exact-resume test and the example run on it. It still has what makes agentic tasks
hard: you see only the room you are in, doors are closed, hands are full after two things, and many
commands are understood but change nothing.

Tasks: `fetch` (bring a thing to a room), `unlock` (find the key of a colour and open the chest of
that colour) and `tidy` (two things into two rooms; meant as the held-out task type).

Commands: `go north`, `open north door`, `take apple`, `drop apple`, `open red chest`, `look`.
A command in any other form, or with a word that no house knows, is `unknown_command`. A command
that is understood but cannot take effect is valid, and says why it did nothing.

Houses are drawn from (task, variation, options) alone. Variations of the train and dev splits live
in houses that are trees of rooms; those of the test split have other room names and contain a
loop, so that no test house can be one seen in training.

The score is a function of the state: 100 when solved; before that, 30 for holding what is needed
(`tidy`: 15 for each thing held, 50 for each in its room), or 0 with `partial_scores: false`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from untwine.envs.protocol import EnvFamily, EnvInfo, Reset, Split
from untwine.errors import EnvError, nearest
from untwine.records import Observation

TASKS = ("fetch", "unlock", "tidy")
SPLIT_RANGES: dict[Split, range] = {
    "train": range(0, 1000),
    "dev": range(1000, 1100),
    "test": range(1100, 1200),
}
VARIATIONS = 1200

STEPS = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
OPPOSITE = {"north": "south", "east": "west", "south": "north", "west": "east"}
ROOM_NAMES = (
    "kitchen", "hall", "bedroom", "bathroom", "study", "cellar", "pantry", "lounge", "nursery",
)  # fmt: skip
TEST_ROOM_NAMES = (
    "attic", "library", "garage", "workshop", "gallery", "laundry", "office", "stable", "chapel",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow")
OBJECTS = (
    "apple", "book", "cup", "lamp", "towel", "brush", "shoe", "spoon", "coat", "plate", "ball",
    "hat",
)  # fmt: skip
KEYS = tuple(f"{colour} key" for colour in COLOURS)
CHESTS = tuple(f"{colour} chest" for colour in COLOURS)

CARRIED = -1  # the place of a thing that is in your hands
HANDS = 2  # how many things you can carry
DOOR_SHARE = 0.3  # share of passages with a closed door

INFO = EnvInfo(
    name="rooms",
    deterministic=True,
    snapshots=True,
    lists_commands=True,
    has_expert=True,
    inspecting=("look",),
)


class State(NamedTuple):
    """Everything that can change. Places and opened things are in the order of the house."""

    room: int
    places: tuple[int, ...]  # for each thing of the house: its room, or CARRIED
    open_doors: tuple[bool, ...]
    open_chests: tuple[bool, ...]


class Exit(NamedTuple):
    room: int
    door: int | None  # index into State.open_doors


@dataclass(frozen=True, slots=True)
class House:
    """Everything that stays: the map, the names and the goal of one task instance.

    wanted  for `fetch` and `tidy`: thing -> room; for `unlock`: key -> CARRIED
    chest   for `unlock`: the chest to open
    """

    goal: str
    rooms: tuple[str, ...]
    exits: tuple[Mapping[str, Exit], ...]
    things: tuple[str, ...]
    chests: tuple[tuple[str, int], ...]
    wanted: Mapping[int, int]
    chest: int | None
    start: State


def draw_house(task: str, variation: int, rooms: int, distractors: int) -> House:
    """The house of one task instance; the same arguments always give the same house."""
    rng = random.Random(f"rooms/{task}/{variation}/{rooms}/{distractors}")
    test = variation in SPLIT_RANGES["test"]
    count = rooms or rng.randint(4, 6)
    exits, doors = _draw_map(rng, count, loop=test)
    names = tuple(rng.sample(TEST_ROOM_NAMES if test else ROOM_NAMES, count))

    colours = rng.sample(COLOURS, 2) if task == "unlock" else []
    objects = rng.sample(OBJECTS, distractors + {"fetch": 1, "tidy": 2, "unlock": 0}[task])
    things = tuple([f"{colour} key" for colour in colours] + objects)
    places = [rng.randrange(count) for _ in things]
    chests = tuple((f"{colour} chest", rng.randrange(count)) for colour in colours)

    if task == "unlock":
        wanted, chest = {0: CARRIED}, 0
        goal = f"open the {chests[0][0]}"
    else:
        # A thing never starts in the room it belongs to.
        needed = 1 if task == "fetch" else 2
        elsewhere = [[r for r in range(count) if r != places[i]] for i in range(needed)]
        wanted, chest = {i: rng.choice(elsewhere[i]) for i in range(needed)}, None
        parts = [f"the {things[i]} to the {names[room]}" for i, room in wanted.items()]
        goal = "bring " + " and ".join(parts)
    start = State(rng.randrange(count), tuple(places), (False,) * doors, (False,) * len(chests))
    return House(goal, names, exits, things, chests, wanted, chest, start)


def _draw_map(
    rng: random.Random, count: int, loop: bool
) -> tuple[tuple[dict[str, Exit], ...], int]:
    """Rooms on a grid: a random tree, or (`loop`) one that grows from a square of four rooms."""
    cells = [(0, 0), (0, 1), (1, 1), (1, 0)] if loop else [(0, 0)]
    passages = [(0, "north", 1), (1, "east", 2), (2, "south", 3), (3, "west", 0)] if loop else []
    while len(cells) < count:
        room, direction = rng.randrange(len(cells)), rng.choice(tuple(STEPS))
        (x, y), (dx, dy) = cells[room], STEPS[direction]
        if (x + dx, y + dy) not in cells:
            passages.append((room, direction, len(cells)))
            cells.append((x + dx, y + dy))
    exits: list[dict[str, Exit]] = [{} for _ in cells]
    doors = 0
    for room, direction, other in passages:
        door = doors if rng.random() < DOOR_SHARE else None
        doors += door is not None
        exits[room][direction] = Exit(other, door)
        exits[other][OPPOSITE[direction]] = Exit(room, door)
    return tuple({d: e[d] for d in STEPS if d in e} for e in exits), doors


def effects(house: House, state: State, relevant_only: bool = False) -> dict[str, State]:
    """Every command that changes the state, with the state it leads to.

    `relevant_only` leaves out things the goal does not name: no shortest solution touches them.
    """
    room, places, doors, chests = state
    found: dict[str, State] = {}
    for direction, (other, door) in house.exits[room].items():
        if door is None or doors[door]:
            found[f"go {direction}"] = State(other, places, doors, chests)
        else:
            opened = (*doors[:door], True, *doors[door + 1 :])
            found[f"open {direction} door"] = State(room, places, opened, chests)
    hands_free = places.count(CARRIED) < HANDS
    for i in house.wanted if relevant_only else range(len(places)):
        if places[i] == CARRIED:
            moved = (*places[:i], room, *places[i + 1 :])
            found[f"drop {house.things[i]}"] = State(room, moved, doors, chests)
        elif places[i] == room and hands_free:
            moved = (*places[:i], CARRIED, *places[i + 1 :])
            found[f"take {house.things[i]}"] = State(room, moved, doors, chests)
    for i, (chest, where) in enumerate(house.chests):
        # The keys are the first things of a house, in the order of its chests.
        if where == room and not chests[i] and places[i] == CARRIED:
            opened = (*chests[:i], True, *chests[i + 1 :])
            found[f"open {chest}"] = State(room, places, doors, opened)
    return found


def score_of(house: House, state: State, partial: bool = True) -> float:
    """Score of a state in [0, 100], see the top of this file."""
    if house.chest is not None and state.open_chests[house.chest]:
        return 100.0
    share = 0.0
    for thing, room in house.wanted.items():
        if state.places[thing] == CARRIED:
            share += 0.3
        elif state.places[thing] == room:
            share += 1.0
    score = 100.0 * share / len(house.wanted)
    return score if partial or score == 100.0 else 0.0


def shortest_plan(house: House) -> tuple[str, ...]:
    """A shortest list of commands that solves the house, by breadth-first search."""
    came_from: dict[State, tuple[State, str] | None] = {house.start: None}
    queue = deque([house.start])
    while queue:
        state = queue.popleft()
        if score_of(house, state) == 100.0:
            plan = []
            while (step := came_from[state]) is not None:
                state, command = step
                plan.append(command)
            return tuple(reversed(plan))
        for command, following in effects(house, state, relevant_only=True).items():
            if following not in came_from:
                came_from[following] = (state, command)
                queue.append(following)
    raise AssertionError("every house has a solution")


def state_key(house: House, state: State) -> str:
    """A readable key: equal if and only if the states (of one house) are equal."""
    places = ",".join("you" if p == CARRIED else house.rooms[p] for p in state.places)
    opened = "".join("01"[flag] for flag in (*state.open_doors, *state.open_chests))
    return f"{house.rooms[state.room]}|{places}|{opened}"


def describe(house: House, state: State) -> str:
    """What you see: this room only."""
    here = [
        thing
        for thing, place in zip(house.things, state.places, strict=True)
        if place == state.room
    ]
    for (chest, where), is_open in zip(house.chests, state.open_chests, strict=True):
        if where == state.room:
            here.append(f"{chest} ({'open' if is_open else 'locked'})")
    exits = []
    for direction, (_, door) in house.exits[state.room].items():
        closed = door is not None and not state.open_doors[door]
        exits.append(f"{direction} (closed door)" if closed else direction)
    held = [t for t, place in zip(house.things, state.places, strict=True) if place == CARRIED]
    return (
        f"You are in the {house.rooms[state.room]}. You see: {', '.join(here) or 'nothing'}. "
        f"Exits: {', '.join(exits)}. You carry: {', '.join(held) or 'nothing'}."
    )


def _done_sentence(command: str) -> str:
    verb, _, what = command.partition(" ")
    return f"You go {what}." if verb == "go" else f"You {verb} the {what}."


def _refusal(house: House, state: State, command: str) -> tuple[str, str | None]:
    """Why a command did nothing: a sentence, and the reason it is invalid or None."""
    verb, _, what = command.partition(" ")
    noun = what.removesuffix(" door")
    if verb == "go" and what in STEPS:
        known = house.exits[state.room].get(what)
        return (f"The {what} door is closed." if known else "You can't go that way."), None
    if verb == "open" and noun in STEPS and what == f"{noun} door":
        way = house.exits[state.room].get(noun)
        if way is None or way.door is None:
            return f"There is no door to the {noun}.", None
        return f"The {what} is already open.", None
    if verb == "open" and what in CHESTS:
        for (chest, where), is_open in zip(house.chests, state.open_chests, strict=True):
            if chest == what and where == state.room:
                key = what.replace("chest", "key")
                reason = "already open" if is_open else f"locked and you do not carry the {key}"
                return f"The {what} is {reason}.", None
        return f"There is no {what} here.", None
    if verb in ("take", "drop") and (what in OBJECTS or what in KEYS):
        place = state.places[house.things.index(what)] if what in house.things else None
        if verb == "drop":
            return f"You are not carrying the {what}.", None
        if place == CARRIED:
            return f"You are already carrying the {what}.", None
        if place == state.room:
            return "Your hands are full.", None
        return f"There is no {what} here.", None
    return "I don't understand that command.", "unknown_command"


class Catalogue:
    """The task instances of the family, by formula."""

    info = INFO
    held_out_tasks = ("tidy",)

    def tasks(self) -> tuple[str, ...]:
        return TASKS

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        if task not in TASKS:
            known = ", ".join(TASKS)
            raise EnvError(f"rooms has no task {task!r}; known are {known}.{nearest(task, TASKS)}")
        return tuple(range(VARIATIONS) if split is None else SPLIT_RANGES[split])


class RoomsEnv:
    """One house at a time. Options are explained in `make`."""

    def __init__(self, rooms: int, distractors: int, partial_scores: bool) -> None:
        self._rooms, self._distractors, self._partial = rooms, distractors, partial_scores
        self._house: House | None = None
        self._state: State | None = None

    def reset(self, task: str, variation: int) -> Reset:
        self._check(task, variation)
        self._house = draw_house(task, variation, self._rooms, self._distractors)
        self._state = self._house.start
        return Reset(self._house.goal, self._observe())

    def step(self, command: str) -> Observation:
        house, state = self._need()
        command = " ".join(command.lower().split())
        if score_of(house, state) == 100.0:
            return self._observe("The task is already done.")
        if command == "look":
            return self._observe()
        following = effects(house, state).get(command)
        if following is None:
            return self._observe(*_refusal(house, state, command))
        self._state = following
        return self._observe(_done_sentence(command))

    def admissible(self) -> tuple[str, ...]:
        """The commands that change something now, and `look`; none once the task is done."""
        house, state = self._need()
        return _admissible(house, state)

    def snapshot(self) -> tuple[House, State]:
        return self._need()

    def restore(self, snapshot: tuple[House, State]) -> Observation:
        self._house, self._state = snapshot
        return self._observe()

    def expert(self, task: str, variation: int) -> tuple[str, ...]:
        self._check(task, variation)
        return shortest_plan(draw_house(task, variation, self._rooms, self._distractors))

    def close(self) -> None:
        self._house = self._state = None

    def _need(self) -> tuple[House, State]:
        if self._house is None or self._state is None:
            raise EnvError("rooms: call reset(task, variation) before anything else")
        return self._house, self._state

    @staticmethod
    def _check(task: str, variation: int) -> None:
        if variation not in CATALOGUE.variations(task):
            raise EnvError(f"rooms/{task} has no variation {variation}; use 0 to {VARIATIONS - 1}")

    def _observe(self, message: str = "", invalid: str | None = None) -> Observation:
        house, state = self._need()
        score = score_of(house, state, self._partial)
        solved = score == 100.0
        return Observation(
            text=f"{message} {describe(house, state)}".strip(),
            state_key=state_key(house, state),
            score=score,
            outcome=score / 100.0,
            done=solved,
            success=solved,
            invalid=invalid,
            admissible=_admissible(house, state),
        )


def _admissible(house: House, state: State) -> tuple[str, ...]:
    if score_of(house, state) == 100.0:
        return ()
    return (*effects(house, state), "look")


def make(options: Mapping[str, Any]) -> RoomsEnv:
    """An environment. Options:

    rooms           rooms of every house, 4 to 9; 0 draws 4 to 6
    distractors     things the goal does not name, 0 to 8
    partial_scores  whether holding the right thing scores already
    """
    rooms = options.get("rooms", 0)
    distractors = options.get("distractors", 2)
    partial = options.get("partial_scores", True)
    if type(rooms) is not int or rooms not in (0, *range(4, 10)):
        raise EnvError(f"rooms: option rooms must be 0 or 4 to 9, not {rooms!r}")
    if type(distractors) is not int or not 0 <= distractors <= 8:
        raise EnvError(f"rooms: option distractors must be 0 to 8, not {distractors!r}")
    if type(partial) is not bool:
        raise EnvError(f"rooms: option partial_scores must be true or false, not {partial!r}")
    return RoomsEnv(rooms, distractors, partial)


CATALOGUE = Catalogue()
FAMILY = EnvFamily(CATALOGUE, make, ("rooms", "distractors", "partial_scores"))
