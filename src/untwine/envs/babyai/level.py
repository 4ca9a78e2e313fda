"""The levels of minigrid: drawing a world, and a canonical key of everything in it.

minigrid is imported when the first level is made, so that the catalogue works without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from untwine.envs.babyai.catalogue import LEVELS, VARIATIONS, class_of, wanted_classes
from untwine.errors import EnvError, install

DIRECTIONS = ("east", "south", "west", "north")  # minigrid's numbers 0 to 3
MAX_DRAWS = 5000
FOREVER = 10**9
"""Steps: the limit is the recipe's. Beyond its own, minigrid rewards success with less than 0."""

Level = Any  # a minigrid RoomGridLevel


def new_level(task: str, view: int) -> Level:
    """An empty level, to be filled by `draw`. EnvError when minigrid is not installed.

    view  cells across the square that the agent sees, odd
    """
    try:
        import gymnasium
        import minigrid  # noqa: F401  (registers the levels)
        from minigrid.envs.babyai.core import roomgrid_level, verifier
    except ImportError as error:
        raise EnvError(f"babyai needs minigrid ({error}): {install('babyai')}") from error
    roomgrid_level.print = lambda *_: None  # it tells of every rejected draw
    verifier.use_done_actions = False  # else $BABYAI_DONE_ACTIONS would change what is success
    level = gymnasium.make(LEVELS[task], disable_env_checker=True).unwrapped
    level.agent_view_size = view
    return level


def draw(level: Level, variation: int) -> None:
    """Fill the level with the world of a variation, see catalogue.py."""
    classes = wanted_classes(variation)
    for turn in range(MAX_DRAWS):
        level.reset(seed=variation + turn * VARIATIONS)
        if class_of(f"{level.mission}|{world_key(level)}") in classes:
            level.max_steps = FOREVER
            return
    raise AssertionError(f"no world of class {classes} in {MAX_DRAWS} draws of {level}")


def world_key(level: Level) -> str:
    """Equal for two states of one level if and only if they are the same situation.

    Position and direction of the agent, what it carries, every thing with its place and state, and
    how far the verifier of the mission is. Things that look the same are told apart only where the
    mission does (`the ball on your left`): each carries the marks of the descriptions it answers.
    """
    parts = tuple(_parts(level.instrs))
    descriptions = [d for part in parts for d in _descriptions(part)]
    things = []
    for index, cell in enumerate(level.grid.grid):
        if cell is not None and cell.type != "wall":
            x, y = index % level.grid.width, index // level.grid.width
            things.append(f"{_token(cell, descriptions)}@{x},{y}")
    x, y = level.agent_pos
    return "|".join(
        (
            f"{x},{y} {DIRECTIONS[level.agent_dir]}",
            f"hand:{_token(level.carrying, descriptions)}",
            " ".join(things),
            ";".join(_progress(part, descriptions) for part in parts),
        )
    )


def _parts(instruction: Any) -> Iterator[Any]:
    """An instruction of the mission and all that it is made of."""
    yield instruction
    for name in ("instr_a", "instr_b"):
        if hasattr(instruction, name):
            yield from _parts(getattr(instruction, name))


def _descriptions(instruction: Any) -> list[Any]:
    names = ("desc", "desc_move", "desc_fixed")
    return [getattr(instruction, name) for name in names if hasattr(instruction, name)]


def _token(thing: Any, descriptions: list[Any]) -> str:
    if thing is None:
        return "-"
    state = thing.encode()[2]
    marks = [str(i) for i, d in enumerate(descriptions) if any(o is thing for o in d.obj_set)]
    inside = "" if thing.contains is None else f"({_token(thing.contains, descriptions)})"
    return f"{thing.color}-{thing.type}{state or ''}{inside}" + "".join(f"*{m}" for m in marks)


def _progress(instruction: Any, descriptions: list[Any]) -> str:
    """What the verifier remembers: parts done, positions it believes in, what was carried."""
    done = "".join(
        "01"[getattr(instruction, name) == "success"]
        for name in ("a_done", "b_done")
        if hasattr(instruction, name)
    )
    places = "/".join(
        ",".join(f"{int(x)}.{int(y)}" for x, y in sorted(map(tuple, d.obj_poss)))
        for d in _descriptions(instruction)
    )
    before = _token(getattr(instruction, "preCarrying", None), descriptions)
    return f"{done}:{places}:{before}"
