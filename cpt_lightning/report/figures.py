"""The figures of one run, read from what it left in its folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from cpt_lightning.records.matrix import AccuracyMatrix

MATRIX = "accuracy_matrix.json"
DRIFT = "drift.json"

FIGURES = {
    "learning": "accuracy on a task right after it, mean over tasks, in %",
    "AvgAcc": "accuracy after the last task, mean over tasks, in %",
    "forgetting": "best earlier minus final accuracy, mean over earlier tasks (Chaudhry et al. 2018), in points",
    "worst dip": "the largest fall of a learned task below its best on the way, in points",
    "BWT": "final minus just-learned accuracy, mean over earlier tasks (Lopez-Paz and Ranzato 2017), in points",
    "probes": "accuracy on the probes after the last task minus the base's, mean over probes, in points",
    "probes, lowest": "the same after the task where it is lowest",
    "probes, forced": "as `probes`, where answers are made to begin in the base's style",
    "KL": "KL(base || model) on prompts of the learned tasks after the last one, mean over tasks, in nats per answer",
    "rows": "training rows gone through, in thousands",
    "rollouts": "completions sampled to learn from, to filter by or to collect, in thousands",
    "minutes": "wall-clock minutes, evaluations included",
}
"""What is compared: a name, and what it is."""


def figures_of(folder: str | Path, seconds: float | None = None) -> dict[str, float | None]:
    """The figures of a finished run; ``None`` where it has no such thing.

    Args:
        folder: Of the run.
        seconds: How long it took, if that was measured.

    Raises:
        FileNotFoundError: The folder holds no accuracy matrix.
        ValueError: The run has not learned all of its tasks.
    """
    path = Path(folder) / MATRIX
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} is not the folder of a run that has learned a task")
    matrix = AccuracyMatrix.load(path)
    if len(matrix.rows) < len(matrix.stages):
        raise ValueError(f"{path}: {len(matrix.rows)} of {len(matrix.stages)} stages are learned; let the run finish")
    logged = _logged(Path(folder))
    return {
        **scores_of(matrix),
        "KL": _last_drift(Path(folder), matrix.tasks),
        "rows": _thousands(logged.get("perf/rows")),
        "rollouts": _thousands(logged.get("perf/rollouts", 0.0) + _filtered(Path(folder)) + _collected(Path(folder))),
        "minutes": None if seconds is None else seconds / 60,
    }


def scores_of(matrix: AccuracyMatrix) -> dict[str, float | None]:
    """Those of the figures that an accuracy matrix tells alone."""
    metrics = matrix.metrics()
    return {
        "learning": _percent(metrics.get("learning")),
        "AvgAcc": _percent(metrics.get("average_accuracy")),
        "forgetting": _negative(_percent(metrics.get("forgetting_measure"))),
        "worst dip": _percent(metrics.get("worst_dip")),
        "BWT": _percent(metrics.get("backward_transfer")),
        "probes": _percent(_last(probe_changes(matrix))),
        "probes, lowest": _percent(min(probe_changes(matrix), default=None)),
        "probes, forced": _percent(_last(probe_changes(matrix, "forced_accuracy"))),
    }


def probe_changes(matrix: AccuracyMatrix, part: Literal["accuracy", "forced_accuracy"] = "accuracy") -> list[float]:
    """The mean over probes of a score minus the base's, after each stage; empty where it was not measured."""
    if matrix.zero_shot is None or not matrix.probes or part not in matrix.zero_shot[matrix.probes[0]]:
        return []
    means = [statistics.mean(row[probe][part] for probe in matrix.probes) for row in (matrix.zero_shot, *matrix.rows)]
    return [mean - means[0] for mean in means[1:]]


def _logged(folder: Path) -> dict[str, float]:
    """Sums over the steps of what a run logged at each."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    wanted = {"perf/rows", "perf/rollouts"}.intersection(events.Tags()["scalars"])
    return {name: sum(event.value for event in events.Scalars(name)) for name in wanted}


def _last_drift(folder: Path, tasks: Collection[str]) -> float | None:
    """The divergence from the base, on the base's own answers, when it was measured last."""
    path = folder / DRIFT
    if not path.exists():
        return None
    measured = json.loads(path.read_text(encoding="utf-8"))["measurements"]
    last = [row for row in measured if (row["stage"], row["step"]) == (measured[-1]["stage"], measured[-1]["step"])]
    values = [row["forward_kl_per_answer"] for row in last if row["name"] in tasks]
    return statistics.mean(values) if values else None


def _filtered(folder: Path) -> int:
    """Completions that a rollout filter sampled."""
    total = 0
    for path in folder.glob("filter/*.jsonl"):
        header, *verdicts = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        total += header["completions_per_row"] * sum(verdict["refused"] is None for verdict in verdicts)
    return total


def _collected(folder: Path) -> int:
    """Completions that ``cpt predict`` sampled into the folder or one within it."""
    summaries = folder.glob("**/*_summary.json")
    return sum(json.loads(path.read_text(encoding="utf-8"))["num_completions"] for path in summaries)


def _last(values: list[float]) -> float | None:
    return values[-1] if values else None


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _thousands(value: float | None) -> float | None:
    return None if value is None else value / 1000
