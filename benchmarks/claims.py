"""What a study of methods, learning rates and seeds says about claims: differences, and what foretells a loss."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cpt_lightning.functional.intervals import percentile_interval
from cpt_lightning.functional.regression import quadratic_fit

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """A finished run.

    Args:
        method: What it learned by.
        lr: Learning rate.
        seed: Of all that is random.
        figures: By name.
    """

    method: str
    lr: str
    seed: int
    figures: Mapping[str, float]


def values_of(points: Sequence[Point], figure: str, method: str, lr: str) -> dict[int, float]:
    """A figure of a method at a learning rate, by seed."""
    return {point.seed: point.figures[figure] for point in points if (point.method, point.lr) == (method, lr)}


def learning_rates(points: Sequence[Point], method: str) -> list[str]:
    """Those that a method was run at, in the order of the study."""
    return list(dict.fromkeys(point.lr for point in points if point.method == method))


def best_lr(points: Sequence[Point], method: str, by: str) -> str:
    """The learning rate at which a method's mean over seeds is highest."""
    rates = learning_rates(points, method)
    return max(rates, key=lambda lr: statistics.mean(values_of(points, by, method, lr).values()))


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float, float]:
    """Mean over seeds of the difference, and its 95 % interval by Student's t.

    Example:
        Differences 1, 2 and 3 have the mean 2 and the standard error 1 / sqrt(3); t is 4.303.

        >>> [round(each, 3) for each in paired_difference({0: 1.0, 1: 3.0, 2: 5.0}, {0: 0.0, 1: 1.0, 2: 2.0})]
        [2.0, -0.484, 4.484]

    Raises:
        ValueError: Fewer than two seeds in common.
    """
    differences = [one[seed] - other[seed] for seed in one if seed in other]
    if len(differences) < 2:
        raise ValueError(f"an interval needs two seeds in common; there are {len(differences)}")
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    reach = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return mean, mean - reach, mean + reach


@dataclass(frozen=True)
class Prediction:
    """How well a figure foretells another over all runs, with 95 % intervals.

    Args:
        figure: What foretells.
        num_runs: Of how many runs.
        r_squared: Share of the variance that a parabola explains (RL's Razor, arXiv 2509.04259).
        rank_correlation: Spearman's, which asks for no shape.
    """

    figure: str
    num_runs: int
    r_squared: tuple[float, float, float]
    rank_correlation: tuple[float, float, float]


def prediction(points: Sequence[Point], figure: str, loss: str) -> Prediction:
    """How well a figure foretells a loss.

    Intervals are by drawing methods with their learning rate anew, all seeds of one together: these are much alike.
    """
    key: Callable[[Point], tuple[str, str]] = lambda point: (point.method, point.lr)  # noqa: E731
    groups = [list(group) for _, group in itertools.groupby(sorted(points, key=key), key)]
    random = np.random.default_rng(0)
    draws = [
        [point for place in random.integers(0, len(groups), len(groups)) for point in groups[place]]
        for _ in range(NUM_RESAMPLES)
    ]

    def with_interval(measure: Callable[[np.ndarray, np.ndarray], float]) -> tuple[float, float, float]:
        def of(chosen: Sequence[Point]) -> float:
            return measure(*(np.array([point.figures[name] for point in chosen]) for name in (figure, loss)))

        again = np.array([of(chosen) for chosen in draws])
        return of(points), *percentile_interval(again[~np.isnan(again)])

    return Prediction(figure, len(points), with_interval(_r_squared), with_interval(_rank_correlation))


def _r_squared(x: np.ndarray, y: np.ndarray) -> float:
    fit = quadratic_fit(x, y)
    return np.nan if fit is None else fit.r_squared


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    return np.nan if np.ptp(x) == 0 or np.ptp(y) == 0 else float(stats.spearmanr(x, y).statistic)
