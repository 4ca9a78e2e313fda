"""A strict reader of the PDDL problems that ALFWorld games are made of.

`read_problem(text, where)` turns the `pddl_problem` field of a game file into a `Problem`: typed
objects, the facts that hold at the start, and the goal as a tree of conditions. Nothing of the
text is ever executed. Only what the ALFRED domain knows is accepted: its types, its predicates
with the right number and types of arguments, and goals of and, or, not, imply, exists, forall and
equality. Everything else is an `EnvError` of one sentence that names `where` (the file) and the
fault.

As in the planner behind the real engine, names are folded to lower case, `;` starts a comment,
numeric assignments (distances, costs) have no influence, and a fact may be given twice. The type
`object` is the type of things and also, in a quantifier, the type of everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from untwine.errors import EnvError, nearest

MAX_DEPTH = 60  # of parentheses; games of all six task types need 9
MAX_TOKENS = 2_000_000
TYPES = ("agent", "location", "receptacle", "object", "rtype", "otype")

# predicate -> types of its arguments; "*" is any type
PREDICATES: dict[str, tuple[str, ...]] = {
    "atlocation": ("agent", "location"),
    "receptacleatlocation": ("receptacle", "location"),
    "objectatlocation": ("object", "location"),
    "openable": ("receptacle",),
    "opened": ("receptacle",),
    "inreceptacle": ("object", "receptacle"),
    "isreceptacleobject": ("object",),
    "inreceptacleobject": ("object", "object"),
    "isreceptacleobjectfull": ("object",),
    "wasinreceptacle": ("object", "receptacle"),
    "checked": ("*",),
    "examined": ("location",),
    "receptacletype": ("receptacle", "rtype"),
    "cancontain": ("rtype", "otype"),
    "objecttype": ("object", "otype"),
    "holds": ("agent", "object"),
    "holdsany": ("agent",),
    "holdsanyreceptacleobject": ("agent",),
    "full": ("receptacle",),
    "isclean": ("object",),
    "cleanable": ("object",),
    "ishot": ("object",),
    "heatable": ("object",),
    "iscool": ("object",),
    "coolable": ("object",),
    "pickupable": ("object",),
    "moveable": ("object",),
    "toggleable": ("object",),
    "ison": ("object",),
    "istoggled": ("object",),
    "sliceable": ("object",),
    "issliced": ("object",),
}

Fact: TypeAlias = tuple[str, ...]  # predicate, then its arguments
Node: TypeAlias = "str | list[Node]"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_ALSO = ("objectatlocation", "receptacle")
_TOKEN = re.compile(r"[()]|[^\s()]+")


@dataclass(frozen=True, slots=True)
class Atom:
    """A predicate (or `=`) of names and variables; variables start with `?`."""

    predicate: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: Condition


@dataclass(frozen=True, slots=True)
class Junction:
    """All of the parts, or at least one of them. `imply` is read as `or` with a `not`."""

    kind: Literal["and", "or"]
    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Quantified:
    """variables: (name with `?`, type) each."""

    kind: Literal["exists", "forall"]
    variables: tuple[tuple[str, str], ...]
    part: Condition


Condition: TypeAlias = Atom | Not | Junction | Quantified


@dataclass(frozen=True, slots=True)
class Problem:
    """A PDDL problem of the ALFRED domain, all names in lower case.

    name     of the problem, e.g. `plan_trial_T20190906_190733_107998` in lower case
    objects  every declared name with its type, in the order of the text
    facts    what holds at the start
    goal     the condition to bring about
    """

    name: str
    objects: Mapping[str, str]
    facts: frozenset[Fact]
    goal: Condition


def read_problem(text: str, where: str) -> Problem:
    """Read a PDDL problem. `where` names its file in errors. EnvError for any fault."""
    tree = read_tree(text, where)
    name, sections = _sections(tree, where)
    objects = _objects(sections[":objects"], where)
    facts = frozenset(_facts(sections[":init"], objects, where))
    _check_containment(facts, where)
    _check_agent(objects, facts, where)
    goal_parts = sections[":goal"]
    if len(goal_parts) != 1:
        raise EnvError(f"{where}: the goal must be one condition, not {len(goal_parts)}")
    goal = _Goal(objects, where).read(goal_parts[0], {})
    return Problem(name, objects, facts, goal)


def read_tree(text: str, where: str) -> list[Node]:
    """The nested lists of one parenthesised PDDL text, in lower case, without comments."""
    stack: list[list[Node]] = []
    whole: list[Node] | None = None
    for number, token in enumerate(_tokens(text, where)):
        if number > MAX_TOKENS:
            raise EnvError(f"{where}: the PDDL text has more than {MAX_TOKENS} words")
        if whole is not None:
            raise EnvError(f"{where}: there is text after the last ')' of the PDDL text")
        if token == "(":
            if len(stack) >= MAX_DEPTH:
                raise EnvError(f"{where}: parentheses are nested deeper than {MAX_DEPTH}")
            stack.append([])
        elif not stack:
            raise EnvError(f"{where}: the PDDL text must begin with '(', not {_short(token)}")
        elif token == ")":
            closed = stack.pop()
            if stack:
                stack[-1].append(closed)
            else:
                whole = closed
        else:
            stack[-1].append(token)
    if whole is None:
        raise EnvError(f"{where}: the PDDL text ends before its last ')': the file looks truncated")
    return whole


def _tokens(text: str, where: str) -> Iterator[str]:
    for line in text.split("\n"):
        line = line.partition(";")[0]
        if not line.isascii():
            raise EnvError(f"{where}: the PDDL text has a character that is not ASCII")
        for match in _TOKEN.finditer(line.replace("?", " ?").lower()):
            yield match.group()


def _short(node: Node) -> str:
    """A piece of the file for an error message: short, on one line, printable."""
    text = node if isinstance(node, str) else "(" + " ".join(map(_short, node[:3])) + ")"
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _sections(tree: list[Node], where: str) -> tuple[str, dict[str, list[Node]]]:
    """The name of the problem, and its sections by their keyword."""
    if len(tree) < 2 or tree[0] != "define":
        raise EnvError(f"{where}: not a PDDL problem: it must begin with (define (problem ...)")
    head = tree[1]
    if not isinstance(head, list) or len(head) != 2 or head[0] != "problem":
        raise EnvError(f"{where}: not a PDDL problem: it must begin with (define (problem ...)")
    if not isinstance(head[1], str):
        raise EnvError(f"{where}: the problem has no name")
    sections: dict[str, list[Node]] = {}
    for part in tree[2:]:
        key = part[0] if isinstance(part, list) and part else part
        known = (":domain", ":requirements", ":objects", ":init", ":goal", ":metric")
        if not isinstance(key, str) or not isinstance(part, list) or key not in known:
            raise EnvError(f"{where}: unknown section {_short(key)} in the PDDL problem")
        if key in sections:
            raise EnvError(f"{where}: the PDDL problem has the section {key} twice")
        sections[key] = part[1:]
    for key in (":domain", ":objects", ":init", ":goal"):
        if key not in sections:
            raise EnvError(f"{where}: the PDDL problem lacks the section {key}")
    if sections[":domain"] != ["alfred"]:
        raise EnvError(f"{where}: a problem of another domain than alfred")
    return head[1], sections


def _objects(words: list[Node], where: str) -> dict[str, str]:
    objects: dict[str, str] = {}
    for name, kind in _typed(words, where):
        if not _NAME.fullmatch(name):
            raise EnvError(
                f"{where}: object name {_short(name)} has characters other than letters, digits, "
                "'_' and '-'"
            )
        if name in objects:
            raise EnvError(f"{where}: object {_short(name)} is declared twice")
        objects[name] = kind
    return objects


def _typed(words: list[Node], where: str) -> Iterator[tuple[str, str]]:
    """(name, type) of a typed list `a b - type c - type`."""
    waiting: list[str] = []
    rest = iter(words)
    for word in rest:
        if not isinstance(word, str):
            raise EnvError(f"{where}: {_short(word)} stands where a name belongs")
        if word != "-":
            waiting.append(word)
            continue
        kind = next(rest, None)
        if not isinstance(kind, str) or kind not in TYPES:
            hint = nearest(kind, TYPES) if isinstance(kind, str) else ""
            raise EnvError(
                f"{where}: unknown type {_short(kind if kind is not None else 'nothing')}; "
                f"types of ALFRED are {', '.join(TYPES)}.{hint}"
            )
        for name in waiting:
            yield name, kind
        waiting = []
    if waiting:
        raise EnvError(f"{where}: {_short(waiting[0])} has no type; write NAME - TYPE")


def _facts(entries: list[Node], objects: Mapping[str, str], where: str) -> Iterator[Fact]:
    denied: set[Fact] = set()
    given: set[Fact] = set()
    for entry in entries:
        if not isinstance(entry, list) or not entry:
            raise EnvError(f"{where}: {_short(entry)} stands where a fact of :init belongs")
        if entry[0] == "=":
            _check_assignment(entry, where)
            continue
        negated = entry[0] == "not" and len(entry) == 2
        fact = _fact(entry[1] if negated else entry, objects, where)
        (denied if negated else given).add(fact)
        if fact in denied and fact in given:
            raise EnvError(f"{where}: fact {_short(list(fact))} is both true and false in :init")
        if not negated:
            yield fact


def _check_assignment(entry: list[Node], where: str) -> None:
    """Distances and costs have no influence, but they must look like it."""
    value = entry[2] if len(entry) == 3 else None
    if not isinstance(value, str) or not value.replace(".", "", 1).isdigit():
        raise EnvError(f"{where}: {_short(entry)} in :init is not an assignment of a number")


def _fact(entry: Node, objects: Mapping[str, str], where: str) -> Fact:
    if not isinstance(entry, list) or not entry or not all(isinstance(x, str) for x in entry):
        raise EnvError(f"{where}: {_short(entry)} stands where a fact belongs")
    predicate, *arguments = (str(x) for x in entry)
    _check_predicate(predicate, len(arguments), where)
    for argument, wanted in zip(arguments, PREDICATES[predicate], strict=True):
        kind = objects.get(argument)
        if kind is None:
            raise EnvError(
                f"{where}: {_short(argument)} in ({predicate} ...) is not among the :objects"
            )
        # Some games also say where receptacles are with (objectAtLocation ...); nothing reads it.
        known = ("*", kind, "object" if (predicate, kind) == _ALSO else kind)
        if wanted not in known:
            raise EnvError(
                f"{where}: {_short(argument)} in ({predicate} ...) is of type {kind}, "
                f"but must be of type {wanted}"
            )
    return (predicate, *arguments)


def _check_predicate(predicate: str, count: int, where: str) -> None:
    if predicate not in PREDICATES:
        hint = nearest(predicate, PREDICATES)
        raise EnvError(f"{where}: unknown predicate {_short(predicate)}.{hint}")
    wanted = len(PREDICATES[predicate])
    if count != wanted:
        raise EnvError(f"{where}: ({predicate} ...) takes {wanted} arguments, not {count}")


def _check_containment(facts: frozenset[Fact], where: str) -> None:
    """Nothing may be inside itself, at any depth."""
    inside: dict[str, list[str]] = {}
    for fact in facts:
        if fact[0] in ("inreceptacleobject", "inreceptacle"):
            inside.setdefault(fact[1], []).append(fact[2])
    state: dict[str, int] = {}  # 1: being walked, 2: done
    for start in sorted(inside):
        path = [start] if start not in state else []
        while path:
            name = path[-1]
            state[name] = 1
            following = next((x for x in inside.get(name, ()) if state.get(x) != 2), None)
            if following is None:
                state[name] = 2
                path.pop()
            elif state.get(following) == 1:
                raise EnvError(f"{where}: cyclic containment: {_short(following)} is inside itself")
            else:
                path.append(following)


def _check_agent(objects: Mapping[str, str], facts: frozenset[Fact], where: str) -> None:
    agents = [name for name, kind in objects.items() if kind == "agent"]
    if len(agents) != 1:
        raise EnvError(f"{where}: a game must have exactly one agent, not {len(agents)}")
    places = sum(fact[0] == "atlocation" for fact in facts)
    if places != 1:
        raise EnvError(f"{where}: the agent must be at exactly one location, not at {places}")


class _Goal:
    """Reads a goal condition; `scope` holds the variables that are bound."""

    def __init__(self, objects: Mapping[str, str], where: str) -> None:
        self._objects, self._where = objects, where

    def read(self, node: Node, scope: Mapping[str, str]) -> Condition:
        if not isinstance(node, list) or not node or not isinstance(node[0], str):
            raise EnvError(f"{self._where}: {_short(node)} stands where a condition belongs")
        tag, parts = node[0], node[1:]
        if tag in ("and", "or"):
            kind: Literal["and", "or"] = "and" if tag == "and" else "or"
            return Junction(kind, tuple(self.read(part, scope) for part in parts))
        if tag == "not":
            self._count(tag, parts, 1)
            return Not(self.read(parts[0], scope))
        if tag == "imply":
            self._count(tag, parts, 2)
            return Junction("or", (Not(self.read(parts[0], scope)), self.read(parts[1], scope)))
        if tag in ("exists", "forall"):
            return self._quantified("exists" if tag == "exists" else "forall", parts, scope)
        return self._atom(tag, parts, scope)

    def _count(self, tag: str, parts: list[Node], wanted: int) -> None:
        if len(parts) != wanted:
            raise EnvError(f"{self._where}: ({tag} ...) takes {wanted} parts, not {len(parts)}")

    def _quantified(
        self, kind: Literal["exists", "forall"], parts: list[Node], scope: Mapping[str, str]
    ) -> Quantified:
        self._count(kind, parts, 2)
        if not isinstance(parts[0], list):
            raise EnvError(f"{self._where}: ({kind} ...) must begin with a list of variables")
        variables = tuple(_typed(parts[0], self._where))
        for name, _ in variables:
            if not name.startswith("?") or len(name) == 1:
                raise EnvError(f"{self._where}: {_short(name)} is not a variable; write ?NAME")
        return Quantified(kind, variables, self.read(parts[1], {**scope, **dict(variables)}))

    def _atom(self, tag: str, parts: list[Node], scope: Mapping[str, str]) -> Atom:
        if tag == "=":
            self._count(tag, parts, 2)
        else:
            _check_predicate(tag, len(parts), self._where)
        for part in parts:
            if not isinstance(part, str):
                raise EnvError(f"{self._where}: {_short(part)} stands where a name belongs")
            if part not in (scope if part.startswith("?") else self._objects):
                raise EnvError(f"{self._where}: {_short(part)} in the goal is not declared")
        return Atom(tag, tuple(str(part) for part in parts))
