"""Which sentences a game file speaks: reads its `grammar` and `pddl_domain` fields.

The real engine runs both; here nothing is run. They are compared, rule by rule, with the ones of
alfworld 0.4.2 that `engine.py` was written after, and with the known differences of older files:

* "put O in/on R" instead of "move O to R",
* "You arrive at loc 12." instead of "You arrive at fridge 1.",
* no `help`, or a `help` whose text stands in the action itself (and then shows `\\n` as written).

A file with any other rule would be played wrongly, so it is refused by name of that rule. Only the
task sentence may be anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from untwine.envs.alfworld.game import Phrases
from untwine.envs.alfworld.problem import Node, read_tree
from untwine.errors import EnvError

_MARKUP = re.compile(r'[;|"<>\[\]{}#\x00-\x1f\\]')
_WORD = re.compile(r'\s+|#[^\n]*|"""(?:.|\n)*?"""|"[^"]*"|::|[;{}]|[\w/-]+')
_TASK = "Your task is to: "
_HELP = "\nAvailable commands:\n"
USE_STOCK = "play it with the real engine (option engine: textworld)"

# Rules of the grammar -> checksum of their JSON; what other rules say is never shown.
_RULES = {
    "intro": "216083ba7c5c",
    "OpenObject.feedback": "1af5096c7414",
    "CloseObject.feedback": "01cf143fb27b",
    "PickupObject.feedback": "4dec34b29b1d",
    "inventory.feedback": "10a90af74fc8",
    "examineReceptacle.feedback": "5c4c29e437a7",
    "examineObject.feedback": "384fc0bd21d3",
    "toggleObject.feedback": "0e3fc274298a",
    "heatObject.feedback": "962b9db41402",
    "cleanObject.feedback": "bce25485bf56",
    "coolObject.feedback": "ac06d1cdd7c7",
    "sliceObject.feedback": "ffa03a313409",
    "look.feedback": "be96fdf33fd3",
    "look-variations": "51d6e0d6b4cf",
    "list_objects_on_the_floor": "1debc78e9c97",
    "list_appliances": "0db854d4c8d9",
    "overview(o)": "4195965f71b2",
    "overview(r)": "44373d352162",
    "list_empty": "d4ca4eae8944",
    "list_separator": "85e97985e64c",
    "list_last_separator": "2585510d29cd",
}
# Actions -> checksum of (template, feedback).
_ACTIONS = {
    "GotoLocation": "b0bb439d3454",
    "OpenObject": "9f24a628707d",
    "CloseObject": "f01a17be1e7e",
    "PickupObject": "1c8ba2cc81d2",
    "inventory": "83ac3a1ab6e5",
    "examineReceptacle": "1c99ffa91550",
    "examineObject": "5a9db45e78b4",
    "ToggleObject": "43b166ae7d88",
    "HeatObject": "c7f480bfe25b",
    "CleanObject": "c085f3b554a3",
    "CoolObject": "b433fe144134",
    "SliceObject": "c586e9e8ddb4",
    "look": "bdb56f2a8d80",
}
# Actions of the domain -> checksum of their words.
_DOMAIN = {
    ":types": "ab6bfd756e74",
    "look": "b6ca43dfd34f",
    "inventory": "ff816fb95122",
    "examinereceptacle": "c73ba804fb51",
    "examineobject": "9c1be0aa8327",
    "gotolocation": "e777b2750c3a",
    "openobject": "61d04984da17",
    "closeobject": "23b628b39809",
    "pickupobject": "48d0b896b3e9",
    "putobject": "0054a6e29759",
    "cleanobject": "b5aa3c7e43c2",
    "heatobject": "daa7cf4642e9",
    "coolobject": "9ac583f790dd",
    "toggleobject": "2ef90177af7a",
    "sliceobject": "6b594c857718",
    "help": "28cc3ac35e1b",
}
_VARIANTS = {
    "GotoLocation.feedback": {
        "You arrive at {r.name}. #examineReceptacle.feedback#": False,
        "You arrive at {lend.name}. #examineReceptacle.feedback#": True,
    },
    "PutObject.feedback": {
        "You move the {o.name} to the {r.name}.": False,
        "You put the {o.name} in/on the {r.name}.": True,
    },
    "PutObject": {"move {o} to {r}": False, "put {o} in/on {r}": True},
}
# Whole files of alfworld 0.4.2, so that the usual case costs no parsing. Their help text is in the
# rule; all else follows from the checksums above.
_SAME_DOMAIN = "f1473041ed01da514de1f87adfd7ef08"
_SAME_GRAMMAR = "c5b22f0f73309a7fd7c8e5b71de42ad4"
_TASK_RULE = re.compile(r'"rhs": "(Your task is to: [^"\n]*)"')
_HELP_RULE = re.compile(r'"rhs": ("\\nAvailable commands:[^"]*")')
Rules = dict[str, Any]
Actions = dict[str, tuple[str, str]]  # name -> template, feedback


def checksum(value: object) -> str:
    """Short checksum of anything JSON can hold, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_phrases(grammar: str, domain: str, where: str) -> Phrases:
    """The sentences of a game. EnvError when grammar or domain are not ones this engine knows."""
    usual = _usual(grammar, domain)
    if usual is not None:
        task, help_text = usual
        return Phrases(_plain(task, where), False, False, help_text)
    rules, actions = parse_grammar(grammar, where)
    for name, known in _RULES.items():
        if checksum(rules.get(name)) != known:
            raise _unknown(where, f"rule {name!r} of its grammar")
    for name, known in _ACTIONS.items():
        if checksum(actions.get(name)) != known:
            raise _unknown(where, f"action {name!r} of its grammar")
    old_put = _variant("PutObject.feedback", _only(rules, "PutObject.feedback"), where)
    template, put_feedback = actions.get("PutObject", ("", ""))
    if old_put != _variant("PutObject", template, where) or put_feedback != "#PutObject.feedback#":
        raise _unknown(where, "action 'PutObject' of its grammar")
    old_goto = _variant("GotoLocation.feedback", _only(rules, "GotoLocation.feedback"), where)
    has_help = check_domain(domain, where)
    return Phrases(
        task=_task(rules, where),
        old_put=old_put,
        old_goto=old_goto,
        help_text=_help(rules, actions, where) if has_help else None,
    )


def _usual(grammar: str, domain: str) -> tuple[str, str] | None:
    """The task and the help text, when both are the files of alfworld 0.4.2 to the letter."""
    task, answer = _TASK_RULE.search(grammar), _HELP_RULE.search(grammar)
    if task is None or answer is None or _digest(domain) != _SAME_DOMAIN:
        return None
    start, end = task.span(1)
    if _digest(f"{grammar[:start]}{_TASK}UNKNOWN GOAL.{grammar[end:]}") != _SAME_GRAMMAR:
        return None
    return task.group(1), json.loads(answer.group(1)).removeprefix("\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]


def _unknown(where: str, what: str) -> EnvError:
    return EnvError(f"{where}: {what} is missing or of an unknown version; {USE_STOCK}")


def _only(rules: Rules, name: str) -> str:
    """The text of a rule with one production, or an empty string."""
    found = rules.get(name)
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict):
        text = found[0].get("rhs")
        if isinstance(text, str) and set(found[0]) == {"rhs"}:
            return text
    return ""


def _variant(name: str, text: str, where: str) -> bool:
    if text not in _VARIANTS[name]:
        raise _unknown(where, f"the text of {name!r} in its grammar")
    return _VARIANTS[name][text]


def _task(rules: Rules, where: str) -> str:
    return _plain(_only(rules, "task"), where)


def _plain(text: str, where: str) -> str:
    """The task of a task sentence, which must have no markup."""
    if not text.startswith(_TASK):
        raise EnvError(f"{where}: the grammar has no task sentence beginning with '{_TASK}'")
    if _MARKUP.search(text):
        raise EnvError(
            f"{where}: the task sentence has markup or control characters, which the real engine "
            "would run as a program; write it in plain words"
        )
    return text.removeprefix(_TASK)


def _help(rules: Rules, actions: Actions, where: str) -> str:
    template, answer = actions.get("help", ("", ""))
    text = _only(rules, "help.feedback") if answer == "#help.feedback#" else answer
    known = text.replace("\\n", "\n").startswith(_HELP) and not re.search(r'[|"<>\[\]{}#]', text)
    if template != "help" or not known:
        raise _unknown(where, "action 'help' of its grammar")
    return text.removeprefix("\n")


def parse_grammar(text: str, where: str) -> tuple[Rules, Actions]:
    """Rules by name, and (template, feedback) of each action, of a `.twl2` text."""
    rules: Rules = {}
    actions: Actions = {}
    words = _words(text, where)
    for word in words:
        if word == "grammar":
            rules.update(_block(words, where))
        elif word == "action":
            name = next(words, "")
            fields = dict(_fields(words, rules, where))
            actions[name] = (fields.get("template", ""), fields.get("feedback", ""))
        else:
            raise EnvError(f"{where}: {word[:40]!r} stands where an action of the grammar belongs")
    return rules, actions


def _words(text: str, where: str) -> Iterator[str]:
    place = 0
    while place < len(text):
        match = _WORD.match(text, place)
        if match is None:
            piece = text[place : place + 40]
            raise EnvError(f"{where}: the grammar cannot be read at {piece!r}")
        place = match.end()
        if not (match.group()[0].isspace() or match.group().startswith("#")):
            yield match.group()


def _fields(words: Iterator[str], rules: Rules, where: str) -> Iterator[tuple[str, str]]:
    _expect(words, "{", where)
    for word in words:
        if word == "}":
            return
        if word == "grammar":
            rules.update(_block(words, where))
            continue
        _expect(words, "::", where)
        yield word, next(words, "")[1:-1]
        _expect(words, ";", where)
    raise EnvError(f"{where}: the grammar ends within an action: the file looks truncated")


def _block(words: Iterator[str], where: str) -> Rules:
    _expect(words, "::", where)
    block = next(words, "")
    _expect(words, ";", where)
    lines = [x for x in block[3:-3].split("\n") if not x.lstrip().startswith("#")]
    try:
        found = json.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
        raise EnvError(f"{where}: a block of the grammar is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise EnvError(f"{where}: a block of the grammar is not a JSON object")
    return found


def _expect(words: Iterator[str], wanted: str, where: str) -> None:
    word = next(words, "the end")
    if word != wanted:
        raise EnvError(f"{where}: {word[:40]!r} stands in the grammar where {wanted!r} belongs")


def check_domain(text: str, where: str) -> bool:
    """Whether the domain knows `help`. EnvError unless all else is as in alfworld 0.4.2."""
    found = domain_checksums(text, where)
    for name, known in _DOMAIN.items():
        if found.get(name) != known and not (name == "help" and name not in found):
            raise _unknown(where, f"{name!r} of its PDDL domain")
    for name in found:
        if name not in _DOMAIN:
            raise _unknown(where, f"{name[:40]!r} of its PDDL domain")
    return "help" in found


def domain_checksums(text: str, where: str) -> dict[str, str]:
    """Checksums of the types and of each action of a PDDL domain; comments do not count."""
    tree = read_tree(text, f"{where}, pddl_domain")
    found: dict[str, str] = {}
    if tree[:2] != ["define", ["domain", "alfred"]]:
        raise EnvError(f"{where}: the PDDL domain is not alfred; {USE_STOCK}")
    for part in tree[2:]:
        if isinstance(part, list) and part and isinstance(part[0], str):
            name = _key(part)
            if name not in (":requirements", ":predicates", ":functions"):
                found[name] = checksum(part)
    return found


def _key(part: list[Node]) -> str:
    if part[0] == ":action" and len(part) > 1 and isinstance(part[1], str):
        return part[1]
    return str(part[0])
