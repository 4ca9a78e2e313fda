"""Makes ALFWorld games of all six task types: *synthetic* ones, in the official format.

    game = generate("pick_heat_then_place_in_recep", seed=7, split="train")
    path = game.write("games/train")      # game.tw-pddl and traj_data.json, as official ones

Rooms are the 120 of ALFRED, with the receptacles and kinds of things each of them has (scenes.json,
from alfworld 0.4.2, see NOTICE); things lie where ALFRED allows them to. What differs from official
games: receptacles whose place alfworld does not give (stove burners, coffee machines, ...) get one
that is made up, always the same in a room, and things are placed without physics. The same
arguments give the same game, on every machine and in every process.

As in ALFRED, `valid_unseen` plays in the first six rooms of each kind, all other splits in the
remaining 24. `generate` checks every game with the oracle; the walkthrough is its plan. `draw_game`
is one attempt without that check, which `pack.py` spares its games: they were checked when the pack
was built.
"""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from untwine.envs.alfworld.game import Game, build_game
from untwine.envs.alfworld.game_file import GAME_NAME, SPLITS, TASK_TYPES, TRAJECTORY_NAME
from untwine.envs.alfworld.grammar import read_phrases
from untwine.envs.alfworld.oracle import Unreachable, shortest_plan
from untwine.envs.alfworld.problem import Problem, read_problem
from untwine.envs.checksums import checksum_of, read_checked
from untwine.errors import EnvError, nearest

SCENES_FILE = Path(__file__).parent / "scenes.json"
ATTEMPTS = 50  # games drawn until one can be solved and is not solved at the start
UNSEEN_ROOMS = 6  # the first rooms of each kind
LAMP = "DeskLamp"
LAMP_STANDS = ("SideTable", "Desk", "Dresser", "DiningTable", "Shelf", "CoffeeTable")
ROOMS = {"Kitchen": 0, "LivingRoom": 200, "Bedroom": 300, "Bathroom": 400}
COUNTS = {"StoveBurner": 4, "Drawer": 2, "Shelf": 2}  # of receptacles without a given place
CONDITIONS = {
    "pick_clean_then_place_in_recep": ("cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("coolable", "Fridge"),
}
# part of the room, or of the lamp: nobody carries them
FIXED = frozenset(
    (
        *("Window", "Chair", "Sink", "Faucet", "StoveKnob", "LightSwitch", "Painting", "Poster"),
        *("Television", "Curtains", "Blinds", "Mirror", "Bathtub", "ShowerDoor", "ShowerGlass"),
        *("ShowerHead", "ShowerCurtain", "HousePlant", "Lamp", "LaundryHamperLid", "Footstool"),
        *("DeskLamp", "FloorLamp"),
    )
)

Spot = tuple[int, int, int, int]  # x, z in steps of 25 cm, direction, tilt of the head


@dataclass(frozen=True, slots=True)
class SyntheticGame:
    """A game and what it was made of. `obj`, `receptacle` and `lamp` are types, or empty."""

    task_type: str
    task_id: str
    scene: int
    obj: str
    receptacle: str
    lamp: str
    task: str
    problem: str
    walkthrough: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The type of receptacle or lamp that the task names."""
        return self.receptacle or self.lamp

    @property
    def digest(self) -> str:
        """Twelve hex digits that tell this game from all others."""
        return checksum_of(f"{self.problem}\n{self.task}".encode())[:12]

    def read(self) -> Problem:
        return read_problem(self.problem, f"synthetic game {self.task_id}")

    def build(self) -> Game:
        """The tables that `Engine` plays."""
        where = f"synthetic game {self.task_id}"
        phrases = read_phrases(self._grammar(), _data()["domain"], where)
        return build_game(self.read(), phrases, where)

    def path_in(self, folder: str | Path) -> Path:
        """Where `write` puts the game."""
        kind = f"{self.task_type}-{self.obj}-None-{self.target}-{self.scene}"
        return Path(folder) / kind / self.task_id / GAME_NAME

    def write(self, folder: str | Path) -> Path:
        """Write `game.tw-pddl` and `traj_data.json` into a folder of their own within `folder`.

        The game comes last and at once, so that where it is, both are complete.
        """
        path = self.path_in(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path.with_name(TRAJECTORY_NAME), self.trajectory())
        _write_json(path, self.game_tree())
        return path

    def game_tree(self) -> dict[str, Any]:
        return {
            "pddl_domain": _data()["domain"],
            "grammar": self._grammar(),
            "pddl_problem": self.problem,
            "solvable": True,
            "walkthrough": list(self.walkthrough),
        }

    def trajectory(self) -> dict[str, Any]:
        return {
            "task_type": self.task_type,
            "task_id": self.task_id,
            "scene": {"floor_plan": f"FloorPlan{self.scene}", "scene_num": self.scene},
            "pddl_params": {
                "object_target": self.obj,
                "parent_target": self.receptacle,
                "toggle_target": self.lamp,
                "mrecep_target": "",
                "object_sliced": False,
            },
            "turk_annotations": {"anns": [{"task_desc": self.task, "high_descs": []}]},
        }

    def _grammar(self) -> str:
        return str(_data()["grammar"]).replace("UNKNOWN GOAL", self.task)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(tree), encoding="utf-8")
    scratch.replace(path)


def generate(
    task_type: str, seed: int, split: str = "train", scene: int | None = None
) -> SyntheticGame:
    """The game of a seed, with its walkthrough: the first of its attempts that can be won.

    EnvError as in `draw_game`, and when no attempt can be won.
    """
    for attempt in range(ATTEMPTS):
        drawn = draw_game(task_type, split, seed * ATTEMPTS + attempt, scene)
        game = solved(drawn) if drawn else None
        if game is not None:
            return game
    raise EnvError(f"no {task_type} game of seed {seed} in room {scene}: nothing there fits")


def draw_game(
    task_type: str, split: str, seed: int, scene: int | None = None
) -> SyntheticGame | None:
    """One attempt at a game, not checked; None when nothing in the room fits the task.

    scene   number of the room; without it, one of the split is drawn

    EnvError for an unknown task type, split or room.
    """
    for what, given, known in (("task type", task_type, TASK_TYPES), ("split", split, SPLITS)):
        if given not in known:
            raise EnvError(
                f"no {what} {given!r}; known are {', '.join(known)}.{nearest(given, known)}"
            )
    rooms = scenes_of(task_type, split)
    if scene is not None and scene not in rooms:
        raise EnvError(f"{task_type} has no room {scene} in {split}")
    rng = random.Random(f"{task_type}/{split}/{seed}/{scene}")
    return _Drawer(rng, task_type, split, scene or rng.choice(rooms)).draw()


def solved(game: SyntheticGame) -> SyntheticGame | None:
    """The game with a shortest plan; None when it cannot be won, or is won at the start."""
    try:
        plan = shortest_plan(game.build(), f"synthetic game {game.task_id}")
    except Unreachable:
        return None
    return replace(game, walkthrough=plan) if plan else None


def scenes_of(task_type: str, split: str) -> tuple[int, ...]:
    """Rooms in which a task can be set, rising."""
    found = []
    for kind in _data()["rooms"][task_type]:
        numbers = range(1, UNSEEN_ROOMS + 1) if split == "valid_unseen" else range(7, 31)
        found += [ROOMS[kind] + number for number in numbers]
    if task_type == "look_at_obj_in_light":
        found = [scene for scene in found if LAMP in _data()["scenes"][str(scene)]["inventory"]]
    return tuple(sorted(found))


class _Room(NamedTuple):
    """receptacles: id -> where one stands before it; given: those whose place is known."""

    receptacles: dict[str, Spot]
    by_type: dict[str, list[str]]
    given: frozenset[str]
    inventory: tuple[str, ...]


@cache
def _data() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(read_checked(SCENES_FILE))
    return tree


@cache
def _room(scene: int) -> _Room:
    entry = _data()["scenes"][str(scene)]
    spots: dict[str, Spot] = {name: tuple(spot) for name, spot in entry["receptacles"].items()}
    given = frozenset(spots)
    rng = random.Random(f"room {scene}")
    xs, zs = [s[0] for s in spots.values()], [s[1] for s in spots.values()]
    known = {_type(name) for name in given}
    for kind in entry["inventory"]:
        if kind in known or kind not in _data()["receptacles"]:
            continue
        for _ in range(COUNTS.get(kind, 1)):
            x, z = rng.randint(min(xs), max(xs)), rng.randint(min(zs), max(zs))
            tail = f"|{kind}" if kind.endswith("Basin") else ""
            jitter = rng.uniform(-0.12, 0.12)
            name = f"{kind.removesuffix('Basin')}|{_coordinate(x / 4 + jitter)}|+00.90|"
            name += f"{_coordinate(z / 4 + jitter)}{tail}"
            spots[name] = (x, z, rng.randrange(4), rng.choice((0, 30, 45, 60)))
    by_type: dict[str, list[str]] = {}
    for name in sorted(spots):
        by_type.setdefault(_type(name), []).append(name)
    return _Room(spots, by_type, given, tuple(entry["inventory"]))


def _type(name: str) -> str:
    first, *_, last = name.split("|")
    return last if last.endswith("Basin") else first


def _coordinate(value: float) -> str:
    return f"{'-' if value < 0 else '+'}{abs(value):05.2f}"


class _Drawer:
    """Draws one game in one room."""

    def __init__(self, rng: random.Random, task_type: str, split: str, scene: int) -> None:
        self._rng, self._task_type, self._split, self._scene = rng, task_type, split, scene
        self._room = room = _room(scene)
        holds = _data()["holds"]
        self._holds = {kind: frozenset(holds.get(kind, ())) for kind in sorted(room.by_type)}
        self._things: dict[str, str] = {}  # id -> the receptacle it is in

    def draw(self) -> SyntheticGame | None:
        """None when nothing in the room fits the task."""
        rng, data = self._rng, _data()
        kinds = [
            kind
            for kind in self._room.inventory
            if kind in data["objects"] and kind not in data["receptacles"] and kind not in FIXED
            and any(kind in held for held in self._holds.values())
        ]  # fmt: skip
        choices = self._choices(kinds)
        if not choices:
            return None
        obj, receptacle = rng.choice(choices)
        lamp = LAMP if self._task_type == "look_at_obj_in_light" else ""
        two = self._task_type == "pick_two_obj_and_place"
        for kind in kinds:
            for _ in range(rng.randint(2 if two and kind == obj else 1, 3)):
                self._place(kind, receptacle if kind == obj else "")
        if LAMP in self._room.inventory:
            stands = [r for kind in LAMP_STANDS for r in self._room.by_type.get(kind, ())]
            if stands:
                self._put(LAMP, rng.choice(stands))
        task = rng.choice(data["templates"][self._task_type]).format(
            obj=obj.lower(), recep=receptacle.lower(), toggle=lamp.lower(), mrecep=""
        )
        task_id = f"synthetic_{self._split}_{self._scene}_{rng.getrandbits(40):010x}"
        problem = self._problem(task_id, obj, receptacle, lamp)
        return SyntheticGame(
            self._task_type, task_id, self._scene, obj, receptacle, lamp, task, problem
        )

    def _choices(self, kinds: list[str]) -> list[tuple[str, str]]:
        """(object, receptacle) types; the object must have another place to be at the start."""
        if self._task_type == "look_at_obj_in_light":
            return [(kind, "") for kind in kinds]
        ability, appliance = CONDITIONS.get(self._task_type, ("", ""))
        if appliance and appliance not in self._room.by_type:
            return []
        return [
            (kind, target)
            for kind in kinds
            if not ability or kind in _data()["abilities"][ability]
            for target, held in self._holds.items()
            if kind in held and target != appliance
            and any(kind in other for name, other in self._holds.items() if name != target)
        ]  # fmt: skip

    def _place(self, kind: str, banned: str) -> None:
        homes = [name for name, held in self._holds.items() if kind in held and name != banned]
        if homes:
            self._put(kind, self._rng.choice(self._room.by_type[self._rng.choice(homes)]))

    def _put(self, kind: str, receptacle: str) -> None:
        _, x, y, z = receptacle.split("|")[:4]
        while True:
            dx, dz = self._rng.uniform(-0.4, 0.4), self._rng.uniform(-0.4, 0.4)
            name = f"{kind}|{_coordinate(float(x) + dx)}|{_coordinate(float(y) + 0.04)}|"
            name += _coordinate(float(z) + dz)
            if name not in self._things:
                self._things[name] = receptacle
                return

    def _start(self) -> Spot:
        """Where nothing is, as in official games: otherwise the intro would list nothing."""
        taken = set(self._room.receptacles.values())
        xs, zs = [s[0] for s in taken], [s[1] for s in taken]
        while True:
            x = self._rng.randint(min(xs) - 2, max(xs) + 2)
            z = self._rng.randint(min(zs) - 2, max(zs) + 2)
            spot = (x, z, self._rng.randrange(4), 30)
            if spot not in taken:
                return spot

    def _problem(self, task_id: str, obj: str, receptacle: str, lamp: str) -> str:
        data, room, things = _data(), self._room, self._things
        kinds = {name: _type(name) for name in things}
        present = sorted(set(kinds.values()))
        start = self._start()
        # the domain names some types itself, so that they must be there
        thing_types = sorted({*present, obj, "Knife", "ButterKnife", *([lamp] if lamp else ())})
        place_types = sorted({*room.by_type, "SinkBasin", "Microwave", "Fridge"})
        declared = ["agent1 # agent", *(f"{name} # object" for name in things)]
        declared += [f"{kind}Type # otype" for kind in thing_types]
        declared += [f"{kind}Type # rtype" for kind in place_types]
        declared += [f"{name} # receptacle" for name in room.receptacles]
        declared += [f"{_spot(x)} # location" for x in sorted({*room.receptacles.values(), start})]
        facts = [f"receptacleType {name} {_type(name)}Type" for name in room.receptacles]
        facts += [f"objectType {name} {kind}Type" for name, kind in kinds.items()]
        facts += [
            f"canContain {kind}Type {held}Type"
            for kind, found in self._holds.items()
            for held in present
            if held in found
        ]
        facts += [f"pickupable {name}" for name, kind in kinds.items() if kind != LAMP]
        facts += [f"isReceptacleObject {name}" for name, k in kinds.items() if k in data["vessels"]]
        facts += [
            f"openable {name}"
            for name in room.receptacles
            if _type(name) in data["openable"] and name in room.given
        ]
        facts.append(f"atLocation agent1 {_spot(start)}")
        for ability, able in data["abilities"].items():
            facts += [f"{ability} {name}" for name, kind in kinds.items() if kind in able]
        for name, home in things.items():
            facts.append(f"inReceptacle {name} {home}")
            facts.append(f"objectAtLocation {name} {_spot(room.receptacles[home])}")
        facts += [
            f"receptacleAtLocation {name} {_spot(spot)}" for name, spot in room.receptacles.items()
        ]
        goal = data["goals"][self._task_type].format(
            obj=obj, recep=receptacle, toggle=lamp, mrecep=""
        )
        lines = "\n        ".join
        return (
            f"\n(define (problem plan_{task_id})\n(:domain alfred)\n(:objects\n        "
            f"{_escaped(lines(declared))}\n        )\n\n(:init\n        "
            f"{_escaped(lines(f'({fact})' for fact in facts))}\n        )\n\n{_escaped(goal)}"
        )


def _spot(spot: Spot) -> str:
    return "loc|{}|{}|{}|{}".format(*spot)


def _escaped(text: str) -> str:
    """Names as PDDL allows them; `#` stands for the hyphen before a type."""
    words = {"-": "_minus_", "#": "-", "|": "_bar_", "+": "_plus_", ".": "_dot_", ",": "_comma_"}
    return re.sub(r"[-#|+.,]", lambda found: words[found.group()], text)
