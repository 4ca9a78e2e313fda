"""Three sentences about a run: how well it does, what it does wrong, what to look at first.

They are computed from the numbers by fixed rules, so the same run always gives the same words, and
a claim of change is only made where the intervals support it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Numbers = Mapping[str, Any]

TRUSTED = 0.95
"""Correlation of predicted with measured change that coupling has when its first order holds."""
MOVES = 0.1
"""Share of what the policy's own step does to acting from which on judging is said to move it."""
OTHER_POLICY = 0.1
"""Mean |log pi - recorded log pi| in nats from which on it is another policy."""

_UNFINISHED = {
    "failed": "the run failed",
    "interrupted": "the run was interrupted",
    "running": "the run is still going on",
}


def percent(value: float) -> str:
    return f"{100 * value:.0f} %" if abs(value) >= 0.0995 or value == 0 else f"{100 * value:.1f} %"


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def phase_name(phase: str) -> str:
    """A phase as people read it."""
    return {"cold_start": "cold start", "rl": "RL"}.get(phase, phase.replace("_", " "))


def first_look(run: Numbers) -> list[str]:
    """The sentences for one run (numbers as `report_numbers` makes them)."""
    return [_result(run), _flaws(run), _attention(run)]


def compare_runs(runs: Sequence[Numbers]) -> str | None:
    """One sentence on several runs: who leads on the evaluation, and whether that is certain."""
    if len(runs) < 2:
        return None
    last = [{r["set"]: r for r in _played(run)} for run in runs]
    common = [name for name in last[0] if all(name in results for results in last)]
    common = [s for s in common if all(r[s]["success_rate"] is not None for r in last)]
    if not common:
        return "The runs have no evaluation set in common, so only their curves can be compared."
    name = common[-1]
    ranked = sorted(
        zip(runs, (results[name] for results in last), strict=True),
        key=lambda pair: -pair[1]["success_rate"],
    )
    (best, first), (second_run, second) = ranked[:2]
    if first["success_rate"] == second["success_rate"]:
        level = [run["label"] for run, r in ranked if r["success_rate"] == first["success_rate"]]
        names = f"{', '.join(level[:-1])} and {level[-1]}"
        return f"On {name}, {names} are level with a success rate of {_rate(first)}."
    verdict = _certainty(second, first)
    return (
        f"On {name}, {best['label']} leads with a success rate of {_rate(first)}, "
        f"before {second_run['label']} with {_rate(second)}; {verdict}."
    )


def _played(run: Numbers) -> list[Numbers]:
    """The evaluations of a run, and those `untwine evaluate` made later on sets of their own."""
    own = list(run["results"])
    sets = {result["set"] for result in own}
    later = [r for r in run["evaluated"] if r["decoding"] == "sampled" and not r["overrides"]]
    return [r for r in later if r["set"] not in sets] + own


def _rate(result: Numbers) -> str:
    text = percent(result["success_rate"])
    if result["success_interval"]:
        low, high = result["success_interval"]
        text += f" [{100 * low:.0f}, {100 * high:.0f}]"
    return text


def _certainty(before: Numbers, after: Numbers) -> str:
    a, b = before["success_interval"], after["success_interval"]
    if not a or not b:
        return "no intervals were recorded"
    if a[1] < b[0] or b[1] < a[0]:
        return "the intervals do not overlap"
    return "the intervals overlap, so the difference is not certain"


def _result(run: Numbers) -> str:
    results = [r for r in _played(run) if r["success_rate"] is not None]
    if results:
        after = results[-1]
        before = next((r for r in results if r["set"] == after["set"]), after)
        if before is after:
            return (
                f"On {after['set']}, {_rate(after)} of the episodes succeed "
                f"(after {phase_name(after['phase'])})."
            )
        return (
            f"On {after['set']}, success went from {_rate(before)} "
            f"after {phase_name(before['phase'])} to {_rate(after)} "
            f"after {phase_name(after['phase'])}; {_certainty(before, after)}."
        )
    for key, what in (("success_rate", "success"), ("outcome_mean", "the mean outcome")):
        if trend := run["trends"].get(key):
            form = percent if key == "success_rate" else _plain
            return (
                f"In training, {what} went from {form(trend['first'])} to {form(trend['last'])} "
                f"({_window(trend)}); no evaluation was recorded."
            )
    return "Neither an evaluation nor an RL iteration was recorded yet."


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _window(trend: Numbers) -> str:
    width = int(trend["window"])
    if width == 1:
        return "first and last iteration"
    return f"means of the first and last {width} iterations"


def _flaws(run: Numbers) -> str:
    """What goes wrong, judged by the truth where it was measured, by labels elsewhere."""
    found = run.get("microscope")
    return (_judged(found["key_numbers"]) if found else "") or _labelled(run)


def _judged(key: Numbers) -> str:
    """What the truth says of steps and of credit; empty where it was not measured."""
    truth, credit = key["truth"], key["credit"]
    parts = []
    if truth:
        parts.append(
            f"Of {truth['steps']} steps judged by branching, {truth['flawed']} are flawed "
            f"(chance alone: at most {truth['by_chance']:.1f})"
        )
    if credit and credit["flawed_mean"] and credit["good_mean"]:
        against = "" if credit["source"] == "truth" else f", by `{credit['source']}` labels,"
        parts.append(
            f"{credit['method']}{against} gives flawed steps {_mean(credit['flawed_mean'])} on "
            f"average and good ones {_mean(credit['good_mean'])}, {_direction(credit)}"
        )
        if credit["miscalibration"]:
            parts.append(
                f"the advantage is positive in {percent(credit['miscalibration']['value'])} of "
                "the flawed ones"
            )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _mean(found: Numbers) -> str:
    text = signed(found["value"])
    if found["interval"]:
        low, high = found["interval"]
        text += f" [{signed(low)}, {signed(high)}]"
    return text


def _direction(credit: Numbers) -> str:
    difference = credit["difference"]
    if not difference or not difference["interval"]:
        return "without an interval of the difference"
    low, high = difference["interval"]
    if low > 0:
        return "so it points the right way"
    return "so it points the wrong way" if high < 0 else "and does not surely tell them apart"


def _labelled(run: Numbers) -> str:
    flawed = run["trends"].get("flawed_rate")
    if not flawed:
        return "No share of flawed steps was recorded."
    if _untrained(run):
        return f"Flawed steps were {percent(flawed['last'])} of all steps."
    first, last = flawed["first"], flawed["last"]
    verb = "fell" if last < 0.9 * first else "rose" if last > 1.1 * first else "stayed"
    change = (
        f"stayed at about {percent(last)}"
        if verb == "stayed"
        else f"{verb} from {percent(first)} to {percent(last)}"
    )
    sentence = f"Flawed steps {change} of all steps"
    if kinds := run["flawed_kinds"]:
        kind = max(kinds, key=lambda name: kinds[name]["last"])
        if kinds[kind]["last"] > 0:
            sentence += f", the most common kind now being “{kind}”"
    bad, good = (run["trends"].get(f"advantage_{kind}") for kind in ("flawed", "good"))
    if bad and good:
        right = bad["last"] < good["last"]
        sentence += (
            f"; their mean advantage is {signed(bad['last'])} against {signed(good['last'])} for "
            f"good steps, so the credit points the {'right' if right else 'wrong'} way"
        )
    return sentence + "."


def _untrained(run: Numbers) -> bool:
    """Whether the iterations took no step of the optimizer."""
    steps = run["trends"].get("optimizer_steps")
    return bool(steps) and steps["last"] == 0


def _attention(run: Numbers) -> str:
    key = run["microscope"]["key_numbers"] if run.get("microscope") else None
    warnings = _warnings(run) + (_measured_warnings(key) if key else [])
    if warnings:
        return "Look first at this: " + "; ".join(warnings[:2]) + "."
    if not run["trends"]:
        return "There are no RL iterations to judge for stability."
    trends = run["trends"]
    known = [
        f"{name} {form(trends[key]['last'])}"
        for key, name, form in (
            ("entropy", "entropy", _plain),
            ("kl", "KL", _plain),
            ("clip_fraction", "clip fraction", percent),
        )
        if key in trends
    ]
    tail = f" ({', '.join(known)} at the end)" if known else ""
    coupled = "".join(f"; {text}" for text in _calm(key)) if key else ""
    return f"Nothing stands out as unstable{tail}{coupled}."


def _warnings(run: Numbers) -> list[str]:
    """What needs a look, the most serious first."""
    trends, found = run["trends"], []
    done, planned = run["iterations"], run["planned_iterations"]
    if state := _UNFINISHED.get(run["status"] or ""):
        of = f" of {planned}" if planned else ""
        found.append(f"{state}, with {done}{of} iterations recorded")

    if _untrained(run):
        found.append(
            "nothing was trained: no iteration took a step of the optimizer, as where all episodes "
            "of each group have the same return"
        )

    def ends(key: str) -> tuple[float, float]:
        trend = trends.get(key)
        return (trend["first"], trend["last"]) if trend else (0.0, 0.0)

    first, last = ends("entropy")
    if first > 0 and last < 0.2 * first:
        found.append(f"entropy fell from {_plain(first)} to {_plain(last)}, close to a collapse")
    if ends("ratio_max")[1] > 20:
        found.append(f"the largest probability ratio is {_plain(ends('ratio_max')[1])}")
    if ends("clip_fraction")[1] > 0.3:
        found.append(f"{percent(ends('clip_fraction')[1])} of the tokens are clipped")
    if ends("kl")[1] > 1:
        found.append(f"the policy is {_plain(ends('kl')[1])} nats of KL away from its start")
    if ends("invalid_rate")[1] > 0.3:
        found.append(f"{percent(ends('invalid_rate')[1])} of the actions are invalid")
    if lost := run["totals"].get("episodes_lost"):
        found.append(f"{lost:.0f} episodes were lost")
    return found


def _measured_warnings(key: Numbers) -> list[str]:
    """What the microscope found that needs a look, what makes it untrustworthy first."""
    found = []
    honesty, reinforced, credit = key["honesty"], key["reinforced"], key["credit"]
    if honesty and (honesty["correlation"] or 0.0) < TRUSTED:
        found.append(
            "the pushes that coupling predicts do not come true (correlation with the measured "
            f"change {_number(honesty['correlation'])})"
        )
    if (key["drift"] or 0.0) > OTHER_POLICY:
        found.append("coupling was measured with another policy than the one that played")
    if key["truth"] and (key["truth"]["policy_gap"] or 0.0) > OTHER_POLICY / 2:
        found.append("the truth was measured with another policy than the one that played")
    if credit and (mean := credit["flawed_mean"]) and mean["interval"] and mean["interval"][0] > 0:
        found.append(f"{credit['method']} gives flawed steps a positive advantage on average")
    if reinforced and reinforced["interval"] and reinforced["share"] > reinforced["interval"][1]:
        low, high = reinforced["interval"]
        found.append(
            f"{percent(reinforced['share'])} of the flawed samples are pushed up, more than with "
            f"permuted weights ({percent(reinforced['null'])} [{100 * low:.0f}, {100 * high:.0f}])"
        )
    return found


def _calm(key: Numbers) -> list[str]:
    """What the microscope found where nothing in it is alarming."""
    found = []
    reinforced, judging, probe = key["reinforced"], key["judging"], key["probe"]
    if reinforced and reinforced["share"] is not None and reinforced["null"] is not None:
        found.append(
            f"one step pushes up {percent(reinforced['share'])} of the flawed samples "
            f"(permuted weights: {percent(reinforced['null'])})"
        )
    if judging and judging["permuted"]:  # without them nothing says what is nothing
        low, high = judging["permuted"]
        least = MOVES * abs(judging["policy"])
        helps = judging["verdict"] > max(high, least)
        hurts = judging["verdict"] < min(low, -least)
        does = "helps" if helps else "hurts" if hurts else "does not move"
        found.append(
            f"learning to judge {does} acting (good minus flawed {signed(judging['verdict'])}, "
            f"with permuted labels {signed(low)} to {signed(high)}, by the policy's own step "
            f"{signed(judging['policy'])})"
        )
    if probe and probe["balanced"] <= 0.5:
        found.append(
            "hidden states do not tell good from flawed (balanced accuracy "
            f"{percent(probe['balanced'])} at best, chance 50 %)"
        )
    elif probe:
        found.append(
            f"hidden states tell good from flawed best at layer {probe['layer']} (balanced "
            f"accuracy {percent(probe['balanced'])}, chance 50 %)"
        )
    return found


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}".replace("-", "−")
