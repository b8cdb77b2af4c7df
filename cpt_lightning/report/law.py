"""Does the distance from the base tell what is lost? Runs and their stages, as in RL's Razor (arXiv 2509.04259)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpt_lightning.functional.regression import QuadraticFit, quadratic_fit
from cpt_lightning.records import RunFolder
from cpt_lightning.report.arms import Arm
from cpt_lightning.report.figures import distances_of, scores_of

DISTANCES = {
    "forward_kl": "KL(base || model), nats per answer",
    "reverse_kl": "KL(model || base), nats per answer",
    "weights": "Euclidean distance of the weights from the base's",
    "fisher": "the same by the probes' Fisher information, nats per answer",
}
"""Of the model from the base, as :func:`distances_of` names them."""
LOSSES = {
    "probes": "lost on probes, points",
    "forgetting": "forgotten of earlier tasks, points",
}
"""What is set against them."""
FEWEST_POINTS = 8
"""That a fit is shown of: a parabola has three coefficients, and would explain a handful of any points."""


@dataclass(frozen=True)
class Law:
    """A loss against a distance.

    Args:
        distance: Key of :data:`DISTANCES`.
        loss: Key of :data:`LOSSES`.
        points: By arm, distance and loss after each stage of each of its runs.
        fit: A parabola through all points, if there are enough.
    """

    distance: str
    loss: str
    points: Mapping[str, Sequence[tuple[float, float]]]
    fit: QuadraticFit | None

    @property
    def labels(self) -> tuple[str, str]:
        """Of the axes."""
        return DISTANCES[self.distance], LOSSES[self.loss]

    @property
    def num_points(self) -> int:
        """Of all arms."""
        return sum(map(len, self.points.values()))


def laws_of(arms: Sequence[Arm]) -> list[Law]:
    """Every loss against every distance, where any run measured both."""
    return [law for distance in DISTANCES for loss in LOSSES if (law := _law(arms, distance, loss)).num_points]


def _law(arms: Sequence[Arm], distance: str, loss: str) -> Law:
    found = {arm.name: [point for run in arm.runs.values() for point in _points(run, distance, loss)] for arm in arms}
    points = {name: each for name, each in found.items() if each}
    together = np.array([point for each in points.values() for point in each], dtype=float).reshape(-1, 2)
    fit = quadratic_fit(together[:, 0], together[:, 1]) if len(together) >= FEWEST_POINTS else None
    return Law(distance, loss, points, fit)


def _points(run: RunFolder, distance: str, loss: str) -> Iterator[tuple[float, float]]:
    """After each stage, the distance and the loss."""
    matrix = run.matrix
    if matrix is None:
        return
    for stage in range(1, len(matrix.rows) + 1):
        reached = distances_of(run, stage).get(distance)
        scores = scores_of(replace(matrix, rows=matrix.rows[:stage]))
        lost = scores[loss] if loss == "forgetting" else _negative(scores[loss])
        if reached is not None and lost is not None:
            yield reached, lost


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
