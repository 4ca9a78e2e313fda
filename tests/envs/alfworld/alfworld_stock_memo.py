"""Makes the real engine faster for long comparisons, without changing what it says.

Three pure functions are given a memory (parsing of grammar pieces, parsing of queries, translation
of a problem), the deep copies of the context, which nobody writes to, become shallow ones, and the
second translation, which only the planner's `replan` needs, is left out. The comparison runs on the
engine as it is when UNTWINE_STOCK_PLAIN is set.
"""

from __future__ import annotations

import functools
import pickle
from typing import Any


def install() -> None:
    import fast_downward
    from textworld import logic
    from textworld.envs.pddl import textgen

    parse = textgen._parse_and_convert

    @functools.lru_cache(20_000)
    def parsed(text: str, rule_name: str) -> bytes:
        return pickle.dumps(parse(text, rule_name=rule_name))

    def parse_from_memory(text: str, rule_name: str = "", trace: bool = False) -> Any:
        return pickle.loads(parsed(text, rule_name))  # a fresh copy, since symbols are written to

    textgen._parse_and_convert = parse_from_memory

    query = logic.Rule.parse_conjunctive_query.__func__
    remembered = functools.lru_cache(1000)(lambda text: query(logic.Rule, text))
    logic.Rule.parse_conjunctive_query = classmethod(lambda cls, text: remembered(text))

    def copy_context(context: dict[str, Any]) -> dict[str, Any]:
        return {
            **context,
            "variables": dict(context["variables"]),
            "mapping": dict(context["mapping"]),
        }

    textgen.copy_context = copy_context

    translate = fast_downward.pddl2sas
    last: dict[str, Any] = {}

    def translate_once(
        domain: str, problem: str, verbose: bool = False, optimize: bool = False
    ) -> Any:
        if last.get("of") != (domain, problem):
            last["result"] = translate(domain, problem, verbose=verbose, optimize=False)
            last["of"] = (domain, problem)
        return last["result"]

    fast_downward.pddl2sas = translate_once
