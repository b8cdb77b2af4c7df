"""The figures of one run: what it learned, lost and cost."""

from __future__ import annotations

import statistics
from typing import Literal

from cpt_lightning.functional.accuracy_matrix import forgetting_measure
from cpt_lightning.records import AccuracyMatrix, RunFolder
from cpt_lightning.report.updates import UPDATES, updates_of

Figures = dict[str, float | None]
"""By name; ``None`` where a run has no such thing."""

SCORES = {
    "learning": "accuracy on a task right after it, mean over tasks (MFT), in %",
    "AvgAcc": "accuracy after the last task, mean over tasks, in %",
    "MAA": "accuracy on the tasks learned so far, mean over these and then over stages, in %",
    "forgetting": "best accuracy after any earlier stage, before it was learned too, minus final accuracy, mean over "
    "the T-1 earlier tasks (Chaudhry et al. 2018; the negative of FM in arXiv 2507.05386), in points",
    "forgetting / T": "the same sum divided by all T tasks, in points",
    "worst dip": "the largest fall of a learned task below its best on the way, in points",
    "BWT": "final minus just-learned accuracy, mean over earlier tasks (Lopez-Paz and Ranzato 2017), in points",
    "FWT": "accuracy on a task right before it is learned minus the base's, mean over the tasks after the first, of "
    "those that the base was asked (Lopez-Paz and Ranzato 2017, with the base for their random model), in points",
    "probes": "accuracy on the probes after the last task minus the base's, mean over probes, in points",
    "probes, lowest": "the same after the task where it is lowest",
    "probes, forced": "as `probes`, where answers are made to begin in the base's style",
}
"""What can be said from accuracies alone."""
DISTANCES = {
    "KL": "KL(base || model) on prompts of the learned tasks after the last one, mean over tasks, in nats per answer",
}
"""How far the model has gone."""
COSTS = {
    "rows": "training rows gone through, in thousands",
    "rollouts": "completions sampled to learn from, to filter by or to collect, in thousands",
    "tokens": "prompt and completion tokens learned from by the first process, in thousands",
    "minutes": "wall-clock minutes, evaluations included: of the commands as `cpt study` timed them, else from the "
    "first to the last entry of the logs",
    "GPU memory": "the most that the first process held on its GPU, in GB",
    "host memory": "the most that the first process held in main memory, in GB",
}
"""What it took."""
FIGURES = {**SCORES, **DISTANCES, **UPDATES, **COSTS}
"""What is compared: a name, and what it is."""


def figures_of(run: RunFolder) -> Figures:
    """The figures of a run, as far as it came."""
    return {**scores_of(run.matrix), **_distances(run), **updates_of(run), **_costs(run)}


def scores_of(matrix: AccuracyMatrix | None) -> Figures:
    """:data:`SCORES` of a matrix; none of what was not scored yet."""
    if matrix is None or not matrix.rows:
        return dict.fromkeys(SCORES)
    metrics = matrix.metrics()
    over_all = forgetting_measure(matrix.accuracy(matrix.tasks), "all", matrix.learned_at)
    probes = probe_changes(matrix)
    shares = {
        "learning": metrics.get("learning"),
        "AvgAcc": metrics.get("average_accuracy"),
        "MAA": metrics.get("mean_average_accuracy"),
        "forgetting": _negative(metrics.get("forgetting_measure")),
        "forgetting / T": -over_all if "forgetting_measure" in metrics else None,
        "worst dip": metrics.get("worst_dip"),
        "BWT": metrics.get("backward_transfer"),
        "FWT": metrics.get("forward_transfer"),
        "probes": probes[-1] if probes else None,
        "probes, lowest": min(probes, default=None),
        "probes, forced": next(reversed(probe_changes(matrix, "forced_accuracy")), None),
    }
    return {name: None if share is None else 100 * share for name, share in shares.items()}


def probe_changes(matrix: AccuracyMatrix, part: Literal["accuracy", "forced_accuracy"] = "accuracy") -> list[float]:
    """The mean over probes of a score minus the base's, after each stage; empty where it was not measured.

    Probes that the base was not asked, for they came to the stream later, have no part in it.
    """
    base, probes = matrix.zero_shot or {}, matrix.probes_since_base
    if not probes or part not in base[probes[0]]:
        return []
    means = [statistics.mean(row[probe][part] for probe in probes) for row in (base, *matrix.rows)]
    return [mean - means[0] for mean in means[1:]]


def changes_by_probe(matrix: AccuracyMatrix) -> dict[str, float]:
    """What each probe scored after the last task minus the base's, in points; nothing where that was not asked."""
    if matrix.zero_shot is None or not matrix.rows:
        return {}
    last, base = matrix.rows[-1], matrix.zero_shot
    return {probe: 100 * (last[probe]["accuracy"] - base[probe]["accuracy"]) for probe in matrix.probes_since_base}


def distances_of(run: RunFolder, stage: int) -> dict[str, float]:
    """How far a run was from the base after a stage, as far as it was measured.

    Returns:
        ``forward_kl`` and ``reverse_kl`` in nats per answer, the mean over the tasks so far when they were measured
        last; ``weights``, the Euclidean distance, and ``fisher``, that by the probes' Fisher information.
    """
    tasks = run.matrix.tasks if run.matrix else []
    measured = [row for row in run.drift or [] if row["stage"] == stage and row["name"] in tasks]
    last = [row for row in measured if row["step"] == measured[-1]["step"]]
    found = {
        kind: statistics.mean(row[f"{kind}_per_answer"] for row in last)
        for kind in ("forward_kl", "reverse_kl")
        if last
    }
    for row in run.weight_distance or []:
        if row["stage"] == stage:
            found["weights"] = row["distance"]
            if "fisher_distance" in row:
                found["fisher"] = row["fisher_distance"]
    return found


def _distances(run: RunFolder) -> Figures:
    return {"KL": distances_of(run, run.drift[-1]["stage"]).get("forward_kl") if run.drift else None}


def _costs(run: RunFolder) -> Figures:
    logged = run.logged
    filtered = sum(judged.num_completions for judged in run.verdicts.values())
    drawn = logged.total("perf/rollouts")  # unknown where other loggers have it: the rest alone would mislead
    rollouts = None if drawn is None else drawn + filtered + run.num_collected
    seconds = logged.seconds if run.seconds is None else run.seconds
    return {
        "rows": _thousands(logged.total("perf/rows")),
        "rollouts": _thousands(rollouts),
        "tokens": _thousands(logged.tokens),
        "minutes": None if seconds is None else seconds / 60,
        "GPU memory": logged.highest("perf/peak_memory_gb"),
        "host memory": logged.highest("perf/host_rss_gb"),
    }


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _thousands(value: float | None) -> float | None:
    return None if value is None else value / 1000
