"""What the agent sees, in words, and what its commands do.

The view is that of minigrid: a square in front of the agent, who stands in the middle of its near
edge; walls and closed doors hide what is behind them. Things are told with the steps it takes to
reach their cell: `a red ball 2 steps left and 1 step forward`; what is `1 step forward` is right in
front. Of the walls, only those straight ahead, left and right are told.
"""

from __future__ import annotations

from typing import Any

from untwine.envs.babyai.level import DIRECTIONS, Level

COMMANDS = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle")
STATES = ("open", "closed", "locked")  # of doors, in minigrid's numbers


def describe(level: Level) -> str:
    """Direction, what is seen (nearest first) and what is carried."""
    seen = [f"{name} {_way(side, ahead)}" for side, ahead, name in visible_things(level)]
    seen += [f"a wall {_way(side, ahead)}" for side, ahead in visible_walls(level)]
    return (
        f"You face {DIRECTIONS[level.agent_dir]}. You see {', '.join(seen) or 'nothing'}. "
        f"You carry {thing_name(level.carrying)}."
    )


def thing_name(thing: Any) -> str:
    """`a red ball`, `an open blue door`, `a wall`; `nothing` for None."""
    if thing is None:
        return "nothing"
    words = f"{thing.color} {thing.type}"
    if thing.type == "wall":
        words = "wall"
    elif thing.type == "door":
        words = f"{STATES[thing.encode()[2]]} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def visible_things(level: Level) -> list[tuple[int, int, str]]:
    """(steps to the right, steps ahead, name) of each thing in view but walls.

    Nearest first; of two that are as near, the one further ahead, then the one further left.
    """
    grid, mask = level.gen_obs_grid()
    middle, bottom = grid.width // 2, grid.height - 1
    found = []
    for x in range(grid.width):
        for y in range(grid.height):
            cell, here = grid.get(x, y), (x, y) == (middle, bottom)
            if cell is not None and cell.type != "wall" and mask[x, y] and not here:
                found.append((x - middle, bottom - y, thing_name(cell)))
    return sorted(found, key=lambda thing: (abs(thing[0]) + thing[1], -thing[1], thing[0]))


def visible_walls(level: Level) -> list[tuple[int, int]]:
    """(steps to the right, steps ahead) of the first wall straight ahead, left and right."""
    grid, mask = level.gen_obs_grid()
    middle, bottom = grid.width // 2, grid.height - 1
    walls = []
    for side, ahead in ((0, 1), (-1, 0), (1, 0)):
        x, y = middle + side, bottom - ahead
        while 0 <= x < grid.width and y >= 0 and mask[x, y]:
            cell = grid.get(x, y)
            if cell is not None and cell.type == "wall":
                walls.append((x - middle, bottom - y))
                break
            x, y = x + side, y - ahead
    return walls


def _way(side: int, ahead: int) -> str:
    parts = []
    if side:
        parts.append(f"{_steps(abs(side))} {'right' if side > 0 else 'left'}")
    if ahead:
        parts.append(f"{_steps(ahead)} forward")
    return " and ".join(parts)


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def front(level: Level) -> Any:
    """The thing in the cell ahead, or None."""
    x, y = level.front_pos
    return level.grid.get(int(x), int(y))


def refusal(level: Level, command: str) -> str | None:
    """Why a command would change nothing now, or None when it would change something."""
    ahead, hand = front(level), level.carrying
    if command == "go forward" and ahead is not None and not ahead.can_overlap():
        return f"You can't go forward: {thing_name(ahead)} is in the way."
    if command == "pick up":
        if ahead is None:
            return "There is nothing in front of you to pick up."
        if not ahead.can_pickup():
            return f"You can't pick up {thing_name(ahead)}."
        return None if hand is None else "Your hands are full."
    if command == "drop":
        if hand is None:
            return "You carry nothing to drop."
        return None if ahead is None else f"You can't drop it here: {thing_name(ahead)} is there."
    if command == "toggle":
        return _toggle_refusal(ahead, hand)
    return None


def _toggle_refusal(ahead: Any, hand: Any) -> str | None:
    if ahead is None:
        return "There is nothing in front of you to toggle."
    if ahead.type == "door":
        key_fits = hand is not None and (hand.type, hand.color) == ("key", ahead.color)
        if ahead.is_locked and not key_fits:
            return f"The {ahead.color} door is locked; it needs a {ahead.color} key."
        return None
    return None if ahead.type == "box" else f"You can't toggle {thing_name(ahead)}."


def effect(level: Level, command: str) -> str:
    """What a command that `refusal` lets pass is about to do, in one sentence."""
    ahead = front(level)
    if command == "pick up":
        return f"You pick up the {ahead.color} {ahead.type}."
    if command == "drop":
        return f"You drop the {level.carrying.color} {level.carrying.type}."
    if command == "toggle" and ahead.type == "box":
        return f"You open the {ahead.color} box, and it falls apart."
    if command == "toggle":
        verb = "close" if ahead.is_open else "unlock and open" if ahead.is_locked else "open"
        return f"You {verb} the {ahead.color} door."
    return f"You {command}."
