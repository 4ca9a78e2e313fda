"""What the game says: intro, and the answer to every move, as in `alfred.twl2`."""

from __future__ import annotations

from collections.abc import Sequence

from untwine.envs.alfworld.game import Game, State
from untwine.envs.alfworld.moves import Move

NOTHING = "Nothing happens."
WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
GOAL_PREFIX = "Your task is to: "


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
        return look_text(game, state, "nothing")
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
    return f"{WELCOME}\n\n{look_text(game, game.start, _listed(order))}"


def look_text(game: Game, state: State, around: str = "nothing") -> str:
    """What `look` says; `around` is what is seen from the middle of the room."""
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
