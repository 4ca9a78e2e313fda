"""Games and walks for the tests of the ALFWorld engine.

`data/games.json` holds one small game of each task type in the official format; domain and grammar,
which are those of alfworld 0.4.2 (MIT licence), are kept once. `scrambled` makes any number of
other games of them: other places, shared locations, doors open at the start, things that are hot or
held or lie elsewhere than they are said to be. They need not make sense, only be equal on both
engines.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from untwine.envs.alfworld.engine import Engine

DATA = Path(__file__).parent / "data"
KINDS = ("random", "eager", "adversarial")


@cache
def fixtures() -> dict[str, Any]:
    return json.loads((DATA / "games.json").read_text(encoding="utf-8"))


def task_types() -> tuple[str, ...]:
    return tuple(fixtures()["games"])


def game_tree(task_type: str) -> dict[str, Any]:
    """The content of the game.tw-pddl of a fixture."""
    tree = fixtures()
    entry = tree["games"][task_type]
    return {
        "pddl_domain": tree["pddl_domain"],
        "grammar": tree["grammar"].replace("UNKNOWN GOAL", entry["task"]),
        "pddl_problem": entry["pddl_problem"],
        "solvable": True,
        "walkthrough": entry["walkthrough"],
    }


def write_game(
    folder: Path, tree: dict[str, Any], trajectory: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "game.tw-pddl"
    path.write_text(json.dumps(tree), encoding="utf-8")
    if trajectory is not None:
        (folder / "traj_data.json").write_text(json.dumps(trajectory), encoding="utf-8")
    return path


def write_fixture(folder: Path, task_type: str) -> Path:
    trajectory = fixtures()["games"][task_type]["traj_data"]
    return write_game(folder, game_tree(task_type), trajectory)


def older(tree: dict[str, Any], inline_help: bool) -> dict[str, Any]:
    """The same game as older files have it: without `help`, or with its text in the action."""
    grammar = tree["grammar"].replace("You arrive at {r.name}.", "You arrive at {lend.name}.")
    grammar = grammar.replace("move {o} to {r}", "put {o} in/on {r}")
    grammar = grammar.replace(
        "You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."
    )
    start = grammar.index("action help")
    text = json.loads("{" + re.search(r'"rhs": "(\\nAvailable.*?)"', grammar[start:]).group() + "}")
    grammar = grammar[:start]
    domain = tree["pddl_domain"]
    if inline_help:
        inline = text["rhs"].replace("\n", "\\n")
        grammar += f'action help {{\n    template :: "help";\n    feedback :: "{inline}";\n}}\n'
    else:
        domain = domain[: domain.index("(:action help")] + ")"
    return {**tree, "grammar": grammar, "pddl_domain": domain}


def scrambled(task_type: str, seed: int) -> dict[str, Any]:
    """A game like the fixture, with other facts, made of `seed`."""
    rng = random.Random(f"{task_type}/{seed}")
    tree = game_tree(task_type)
    problem = tree["pddl_problem"]
    start, end = problem.index("(:init"), problem.index("(:goal")
    facts = [tuple(x.split()) for x in re.findall(r"\(([^()]*)\)", problem[start + 6 : end])]
    kept = [f for f in facts if f[0] not in _MOVED]
    things = sorted(f[1] for f in facts if f[0] == "objectType")
    receptacles = sorted(f[1] for f in facts if f[0] == "receptacleType")
    locations = sorted(f[2] for f in facts if f[0] == "receptacleAtLocation")
    start_at = next(f[2] for f in facts if f[0] == "atLocation")
    places = {r: rng.choice(locations[: max(3, len(locations) - 3)]) for r in receptacles}
    kept += [("receptacleAtLocation", r, place) for r, place in places.items()]
    agent_at = start_at if rng.random() < 0.6 else rng.choice(locations)
    kept.append(("atLocation", "agent1", agent_at))
    kept += [("opened", f[1]) for f in facts if f[0] == "openable" and rng.random() < 0.3]
    for thing in things:
        home = rng.choice(receptacles)
        kept.append(("inReceptacle", thing, home))
        if rng.random() < 0.05:
            kept.append(("inReceptacle", thing, rng.choice(receptacles)))
        near = places[home] if rng.random() < 0.8 else rng.choice(locations)
        kept.append(("objectAtLocation", thing, near))
        kept += [(name, thing) for name in _CONDITIONS if rng.random() < 0.1]
        kept += [(name, thing) for name in _ABILITIES if rng.random() < 0.15]
    for inner, outer in itertools.pairwise(things):
        if rng.random() < 0.1:
            kept += [("isReceptacleObject", outer), ("inReceptacleObject", inner, outer)]
    knives = [t for t in things if "knife" in t.lower()]
    if rng.random() < 0.2:
        kept += [("holds", "agent1", rng.choice(knives or things)), ("holdsAny", "agent1")]
    rng.shuffle(kept)
    init = "\n".join("(" + " ".join(fact) + ")" for fact in kept)
    tree["pddl_problem"] = f"{problem[:start]}(:init\n{init}\n)\n\n{problem[end:]}"
    return older(tree, inline_help=rng.random() < 0.5) if rng.random() < 0.2 else tree


_MOVED = {"inReceptacle", "objectAtLocation", "receptacleAtLocation", "atLocation", "opened"}
_CONDITIONS = ("isClean", "isHot", "isCool", "isSliced", "isToggled", "isOn")
_ABILITIES = ("toggleable", "sliceable", "cleanable", "heatable", "coolable")


def next_command(engine: Engine, kind: str, rng: random.Random, before: str) -> str:
    """A command for the state of `engine`.

    random       any admissible one, and now and then one that is not
    eager        one that changes something when there is one; prefers the rarer verbs
    adversarial  mostly spoiled: case, spacing, cut, repeated, words swapped, other names
    """
    commands = engine.admissible()
    if kind == "eager" and rng.random() < 0.85:
        rare = [c for c in commands if c.split()[0] in _RARE]
        active = [c for c in commands if c.split()[0] not in _IDLE]
        commands = (rare if rng.random() < 0.5 else active) or active or commands
    command = rng.choice(commands)
    if rng.random() < {"random": 0.08, "eager": 0.05, "adversarial": 0.7}[kind]:
        return _spoiled(command, engine, rng, before)
    return command


_RARE = ("clean", "heat", "cool", "use", "slice", "take", "move", "put")
_IDLE = ("go", "look", "help", "inventory", "examine")


def _spoiled(command: str, engine: Engine, rng: random.Random, before: str) -> str:
    game = engine.game
    names = (*game.things, *game.receptacles, *game.locations, "agent1")
    verbs = ("take", "move", "put", "use", "open", "close", "examine", "slice", "heat", "goto")
    joints = (" from ", " to ", " in/on ", " with ", " into ", " ")
    return rng.choice(
        (
            command.upper(),
            command.capitalize(),
            f"  {command}\t\n",
            f"\u00a0{command}\u2003",
            command.replace(" ", "  ", 1),
            command.replace(" ", "\t"),
            command[: rng.randrange(len(command) + 1)],
            command + rng.choice((".", "0", " 1", " now", "\x00")),
            command.replace("1", "2"),
            f"{command} and look",
            before,
            before,
            "",
            " ".join(command.split()[::-1]),
            f"{rng.choice(verbs)} {rng.choice(names)}",
            f"{rng.choice(verbs)} {rng.choice(names)}{rng.choice(joints)}{rng.choice(names)}",
            f"take {rng.choice(names)} from {rng.choice(names)}",
            f"go to {rng.choice(names)}",
            f"examine {rng.choice(names)}",
            "{r.name}",
            "#intro#",
            "__import__('os')",
        )
    )


def walk(engine: Engine, kind: str, seed: int, length: int) -> Iterator[str]:
    """The commands of a walk; `engine` must be stepped with each before the next is taken."""
    rng = random.Random(f"{kind}/{seed}")
    before = "look"
    for _ in range(length):
        before = next_command(engine, kind, rng, before)
        yield before
