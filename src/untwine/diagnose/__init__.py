"""The microscope: why a flawed action survives training. Works on any Hugging Face causal LM.

Everything here takes plain lists, tensors and token ids, and knows no run, recipe or environment
(docs/diagnose/your-own-runs.md shows all of it):

    truth        true_advantages (settings: BranchSettings)
    calibration  Judged, calibrate, lemma_advantage
    coupling     StepSample, gram, head_gram, merge_duplicates, decompose, lifts_by_source,
                 parted, reinforced_rates, worst_offenders, cosine_histograms, check_prediction,
                 mean_push, push, adam_preconditioner, off_diagonal_correlation,
                 log_probabilities
    separation   action_states, separations, plane
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from untwine.diagnose.analysis import (
        cosine_histograms,
        decompose,
        lifts_by_source,
        merge_duplicates,
        parted,
        reinforced_rates,
        worst_offenders,
    )
    from untwine.diagnose.branching import Estimate
    from untwine.diagnose.branching import Settings as BranchSettings
    from untwine.diagnose.calibration import Judged, calibrate, lemma_advantage
    from untwine.diagnose.coupling import Gram, gram, head_gram, off_diagonal_correlation, push
    from untwine.diagnose.own_world import true_advantages
    from untwine.diagnose.parameters import adam_preconditioner
    from untwine.diagnose.samples import StepSample
    from untwine.diagnose.scoring import log_probabilities
    from untwine.diagnose.separation import action_states, plane, separations
    from untwine.diagnose.steps import check_prediction, mean_push

__all__ = [
    "BranchSettings",
    "Estimate",
    "Gram",
    "Judged",
    "StepSample",
    "action_states",
    "adam_preconditioner",
    "calibrate",
    "check_prediction",
    "cosine_histograms",
    "decompose",
    "gram",
    "head_gram",
    "lemma_advantage",
    "lifts_by_source",
    "log_probabilities",
    "mean_push",
    "merge_duplicates",
    "off_diagonal_correlation",
    "parted",
    "plane",
    "push",
    "reinforced_rates",
    "separations",
    "true_advantages",
    "worst_offenders",
]

_PLACES = {
    "analysis": "cosine_histograms decompose lifts_by_source merge_duplicates parted "
    "reinforced_rates worst_offenders",
    "branching": "BranchSettings Estimate",
    "calibration": "Judged calibrate lemma_advantage",
    "coupling": "Gram gram head_gram off_diagonal_correlation push",
    "own_world": "true_advantages",
    "parameters": "adam_preconditioner",
    "samples": "StepSample",
    "scoring": "log_probabilities",
    "separation": "action_states plane separations",
    "steps": "check_prediction mean_push",
}
_OTHER_NAMES = {"BranchSettings": "Settings"}


def __getattr__(name: str) -> Any:
    """Modules are loaded when a name of theirs is first asked for: torch takes seconds."""
    for module, names in _PLACES.items():
        if name in names.split():
            found = getattr(
                importlib.import_module(f"{__name__}.{module}"), _OTHER_NAMES.get(name, name)
            )
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
