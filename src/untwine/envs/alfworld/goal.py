"""Goals of ALFWorld games: quantifiers are written out once, then a test takes microseconds.

`ground` replaces each quantifier by the cases that the unchanging facts leave open. For "some hot
apple in some fridge" with two apples and one fridge there remain two cases, each of two facts that
can change. The result is a `Goal`, a tree of tuples that `is_true` walks through.

Meaning, as in the planner behind the real engine: a variable of type `object` ranges over every
declared name, of another type over the names of this type; different variables may stand for the
same name unless the goal forbids it; a fact that was not given is false.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from untwine.envs.alfworld.problem import Atom, Condition, Junction, Not, Problem, Quantified
from untwine.errors import EnvError

if TYPE_CHECKING:
    from untwine.envs.alfworld.game import State

MAX_CASES = 50_000  # substitutions tried while a goal is written out

# predicates that actions change -> fields of State
_BITS = {
    "isclean": "clean",
    "ishot": "hot",
    "iscool": "cool",
    "issliced": "sliced",
    "istoggled": "toggled",
    "ison": "on",
}
CHANGING = frozenset(
    (*_BITS, "opened", "atlocation", "objectatlocation", "inreceptacle", "holds", "holdsany")
) | {"checked"}

# ("true",), ("false",), ("checked", id), ("not", goal), ("and", goals), ("or", goals),
# ("fact", predicate, number of the first argument, number of the second or 0)
Goal: TypeAlias = tuple[Any, ...]
TRUE: Goal = ("true",)
FALSE: Goal = ("false",)


class Numbering(NamedTuple):
    """Numbers of the ids that occur in facts."""

    things: Mapping[str, int]
    receptacles: Mapping[str, int]
    locations: Mapping[str, int]


def ground(problem: Problem, numbers: Numbering, agent: str, where: str) -> tuple[Goal, bool]:
    """The goal written out, and whether it asks what was `checked`.

    EnvError when more than MAX_CASES substitutions would be needed.
    """
    return _Grounder(problem, numbers, agent, where).run()


def is_true(goal: Goal, state: State) -> bool:
    """Whether a goal holds in a state."""
    kind = goal[0]
    if kind == "checked":
        return goal[1] in state.checked
    if kind == "fact":
        return _fact_holds(goal[1], goal[2], goal[3], state)
    if kind == "and":
        return all(is_true(part, state) for part in goal[1])
    if kind == "or":
        return any(is_true(part, state) for part in goal[1])
    if kind == "not":
        return not is_true(goal[1], state)
    return goal == TRUE


def _fact_holds(predicate: str, first: int, second: int, state: State) -> bool:
    if predicate == "inreceptacle":
        return first in state.contents[second]
    if predicate == "holds":
        return first in state.held
    if predicate in _BITS:
        return bool(getattr(state, _BITS[predicate]) >> first & 1)
    if predicate == "atlocation":
        return state.location == first
    if predicate == "opened":
        return bool(state.opened >> first & 1)
    if predicate == "objectatlocation":
        return first in state.near[second]
    return state.full  # holdsany


class _Grounder:
    def __init__(self, problem: Problem, numbers: Numbering, agent: str, where: str) -> None:
        self._facts, self._numbers, self._agent = problem.facts, numbers, agent
        self._goal, self._where, self._cases = problem.goal, where, 0
        self._tracks_checked = False
        self._domains: dict[str, list[str]] = {"object": list(problem.objects)}
        for name, kind in problem.objects.items():
            if kind != "object":
                self._domains.setdefault(kind, []).append(name)

    def run(self) -> tuple[Goal, bool]:
        goal = self._walk(self._goal, {})
        return goal, self._tracks_checked

    def _walk(self, condition: Condition, scope: dict[str, str]) -> Goal:
        if isinstance(condition, Atom):
            return self._atom(condition, scope)
        if isinstance(condition, Not):
            return _negated(self._walk(condition.part, scope))
        if isinstance(condition, Junction):
            parts = (self._walk(part, scope) for part in _plain_first(condition.parts))
            return _joined(condition.kind, parts)
        # forall x: p is not exists x: not p
        negate = condition.kind == "forall"
        part: Condition = Not(condition.part) if negate else condition.part
        found = _joined("or", self._cases_of(condition.variables, part, scope))
        return _negated(found) if negate else found

    def _cases_of(
        self, variables: tuple[tuple[str, str], ...], part: Condition, scope: dict[str, str]
    ) -> Iterator[Goal]:
        if not variables:
            yield self._walk(part, scope)
            return
        (name, kind), rest = variables[0], variables[1:]
        hidden = {variable for variable, _ in rest}
        for value in self._domains.get(kind, ()):
            self._cases += 1
            if self._cases > MAX_CASES:
                raise EnvError(f"{self._where}: the goal has too many variables to be written out")
            inner = {**{k: v for k, v in scope.items() if k not in hidden}, name: value}
            if not self._impossible(part, inner):
                yield from self._cases_of(rest, part, inner)

    def _impossible(self, part: Condition, scope: Mapping[str, str]) -> bool:
        """Whether a conjunct that cannot change already fails, with the variables known so far."""
        if isinstance(part, Junction) and part.kind == "and":
            return any(self._impossible(inner, scope) for inner in part.parts)
        if isinstance(part, Quantified) and part.kind == "exists":
            hidden = {variable for variable, _ in part.variables}
            outer = {k: v for k, v in scope.items() if k not in hidden}
            return bool(part.variables) and self._impossible(part.part, outer)
        if not isinstance(part, Atom):
            return False
        if part.predicate in CHANGING or part.predicate == "=":
            return False
        if any(x.startswith("?") and x not in scope for x in part.arguments):
            return False
        return (part.predicate, *(scope.get(x, x) for x in part.arguments)) not in self._facts

    def _atom(self, atom: Atom, scope: Mapping[str, str]) -> Goal:
        arguments = tuple(scope.get(x, x) for x in atom.arguments)
        predicate = atom.predicate
        if predicate == "=":
            return TRUE if arguments[0] == arguments[1] else FALSE
        if predicate not in CHANGING:
            return TRUE if (predicate, *arguments) in self._facts else FALSE
        if predicate == "checked":
            self._tracks_checked = True
            return ("checked", arguments[0])
        numbers = self._numbered(predicate, arguments)
        return FALSE if numbers is None else ("fact", predicate, *numbers)

    def _numbered(self, predicate: str, arguments: tuple[str, ...]) -> tuple[int, int] | None:
        """Numbers of the arguments; None when the fact can never hold."""
        things, receptacles, locations = self._numbers
        if predicate in ("atlocation", "holds", "holdsany") and arguments[0] != self._agent:
            return None
        if predicate == "holdsany":
            return 0, 0
        if predicate == "atlocation":
            return _numbers((locations, arguments[1]))
        if predicate == "holds":
            return _numbers((things, arguments[1]))
        if predicate == "opened":
            return _numbers((receptacles, arguments[0]))
        if predicate == "inreceptacle":
            return _numbers((things, arguments[0]), (receptacles, arguments[1]))
        if predicate == "objectatlocation":
            return _numbers((things, arguments[0]), (locations, arguments[1]))
        return _numbers((things, arguments[0]))


def _numbers(*pairs: tuple[Mapping[str, int], str]) -> tuple[int, int] | None:
    found = [table.get(name) for table, name in pairs]
    if found[0] is None or found[-1] is None:
        return None
    return found[0], found[1] or 0 if len(found) > 1 else 0


def _plain_first(parts: tuple[Condition, ...]) -> list[Condition]:
    """Atoms before the rest: they decide at once whether the rest is worth walking through."""
    return sorted(parts, key=lambda part: not isinstance(part, Atom))


def _negated(goal: Goal) -> Goal:
    if goal in (TRUE, FALSE):
        return FALSE if goal == TRUE else TRUE
    return goal[1] if goal[0] == "not" else ("not", goal)


def _joined(kind: str, parts: Iterator[Goal]) -> Goal:
    """`and` or `or` of the parts, without what is true or false anyway and without doubles."""
    neutral, deciding = (TRUE, FALSE) if kind == "and" else (FALSE, TRUE)
    found: dict[Goal, None] = {}
    for part in parts:
        if part == deciding:
            return deciding
        if part[0] == kind:
            found.update(dict.fromkeys(part[1]))
        elif part != neutral:
            found[part] = None
    if not found:
        return neutral
    # Facts that seldom hold come first, so that a test usually ends at once.
    ordered = sorted(found, key=_seldom) if kind == "and" else list(found)
    return ordered[0] if len(ordered) == 1 else (kind, tuple(ordered))


def _seldom(goal: Goal) -> int:
    order = ("holds", "ishot", "iscool", "isclean", "issliced", "istoggled", "atlocation")
    return order.index(goal[1]) if goal[0] == "fact" and goal[1] in order else len(order)
