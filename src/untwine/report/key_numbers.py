"""The few numbers that stand for everything the microscope measured: for sentences and for runs
side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Numbers = Mapping[str, Any]

LABELLED, BELOW_ZERO = "labelled flawed", "advantage below 0"


def key_numbers(found: Numbers, method: str) -> dict[str, Any]:
    """None under a key whose measurement is missing.

    truth       of the last judged iteration: steps, flawed, flawed_share, by_chance, policy_gap
    credit      measures of the run's own credit method, and whose verdicts they are taken against
    reinforced  share of flawed samples with a push upwards, beside permuted weights
    mean_push   the same for the mean over batches
    honesty     correlation and slope of measured against predicted change
    drift       mean |log pi - recorded log pi| of the policy that coupling was measured with, nats
    judging     good minus flawed: change by a step down the verdict loss, range with permuted
                labels, and change by the policy's own step
    probe       layer whose probe is best, with its balanced accuracy
    """
    coupling = found["coupling"] or {}
    return {
        "truth": _truth(found),
        "credit": _credit(found["calibration"], method),
        "reinforced": _reinforced(coupling),
        "mean_push": _mean_push(coupling),
        "honesty": coupling.get("honesty")
        and {key: coupling["honesty"][key] for key in ("correlation", "slope")},
        "drift": coupling["drift"]["mean"] if coupling else None,
        "judging": _judging(found["judging"]),
        "probe": _probe(found["separation"]),
    }


def _truth(found: Numbers) -> dict[str, Any] | None:
    if not found["truth"]:
        return None
    last = found["truth"][-1]
    flawed = last["labels"].get("flawed", {"steps": 0, "share": 0.0})
    return {
        "iteration": last["iteration"],
        "steps": last["steps"],
        "flawed": flawed["steps"],
        "flawed_share": flawed["share"],
        "by_chance": last["flawed_by_chance"],
        "policy_gap": last["policy_gap"],
    }


def _credit(calibration: Numbers | None, method: str) -> dict[str, Any] | None:
    own = calibration["methods"].get(method) if calibration else None
    if calibration is None or own is None or own["all"] is None:
        return None
    keys = (
        "steps", "flawed", "good", "flawed_mean", "good_mean", "difference", "miscalibration",
        "sign_agreement", "rank_correlation",
    )  # fmt: skip
    return {
        "method": method,
        "source": calibration["source"],
        **{key: own["all"][key] for key in keys},
    }


def _reinforced(coupling: Numbers) -> dict[str, Any] | None:
    tables = coupling.get("reinforced", {})
    for name in (LABELLED, BELOW_ZERO):
        rate = tables.get(name, {}).get("all")
        if rate and rate["flawed"]:
            return {"meaning": name, **rate}
    return None


def _mean_push(coupling: Numbers) -> dict[str, Any] | None:
    push = coupling.get("mean_push")
    rate = push["rates"].get("all") if push else None
    return {"batches": push["batches"], **rate} if push and rate and rate["flawed"] else None


def _judging(judging: Numbers | None) -> dict[str, Any] | None:
    if not judging:
        return None
    permuted = [change["difference"] for change in judging["permuted"]]
    return {
        "verdict": judging["verdict"]["difference"],
        "permuted": [min(permuted), max(permuted)] if permuted else None,
        "policy": judging["policy"]["difference"],
    }


def _probe(separation: Numbers | None) -> dict[str, Any] | None:
    layers = [row for row in (separation or {}).get("layers", []) if row["balanced"] is not None]
    if not layers:
        return None
    best = max(layers, key=lambda row: row["balanced"])
    return {"layer": best["layer"], "balanced": best["balanced"], "of": len(layers)}
