"""What updates did to prior knowledge and to the weights: ``Influence``, ``GradientRisk``, ``WeightChange``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from cpt_lightning.records import RunFolder

UPDATES = {
    "log p, probes": "change of the log-probability of the base's answers to probes by one update, mean over measured "
    "updates and probes, in thousandths of a nat per answer (`Influence`)",
    "log p, tasks": "the same of tasks learned before",
    "base perplexity": "the base's, per token, of what was learned, geometric mean over measured updates and their "
    "tasks (`Influence`; arXiv 2506.23508)",
    "risk, probes": "g'Fg of an update's gradient for what the base knows of the probes, over that of a gradient as "
    "long that points anywhere, mean over measured updates (`GradientRisk`; arXiv 2507.05386)",
    "risk, tasks": "the same for tasks learned before",
    "weight change": "norm of what a stage changed over that of the weights before it, mean over stages, in "
    "thousandths (`WeightChange`)",
    "weights changed": "share of the weights that have another value in bfloat16 after a stage, mean over stages, in %",
}
"""Means over what callbacks measured along the way."""


def updates_of(run: RunFolder) -> dict[str, float | None]:
    """:data:`UPDATES` of a run; ``None`` of what was not measured."""
    probes = set(run.matrix.probes if run.matrix else ())
    influence, risks, changes = run.influence or [], run.gradient_risk or [], run.weight_change or []
    prior = [(name in probes, found["log_prob_change"]) for each in influence for name, found in each["on"].items()]
    surprise = _mean(math.log(value) for each in influence for value in each["base_perplexity"].values())
    return {
        "log p, probes": _mean(1000 * change for is_probe, change in prior if is_probe),
        "log p, tasks": _mean(1000 * change for is_probe, change in prior if not is_probe),
        "base perplexity": None if surprise is None else math.exp(surprise),
        "risk, probes": _mean(each["probes_per_weight"] for each in risks if "probes_per_weight" in each),
        "risk, tasks": _mean(each["earlier_per_weight"] for each in risks if "earlier_per_weight" in each),
        "weight change": _mean(1000 * each["relative_norm"] for each in changes),
        "weights changed": _mean(100 * each["changed_fraction"] for each in changes),
    }


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.mean(found) if found else None
