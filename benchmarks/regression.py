"""Whether one figure is another times a constant: ratio, regression, and how sure that is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
NUM_RESAMPLES = 2000


def regression(x: Values, y: Values) -> dict[str, float]:
    """How y goes with x.

    Returns:
        ``ratio``, mean(y) / mean(x); ``slope``, ``intercept`` and ``r2`` of least squares; ``log_slope`` and ``log_r2``
        of the same on the logarithms of pairs in which neither is 0: 1 and 1 if y is x times a constant.
    """
    slope, intercept, r2 = _line(x, y)
    both = (x > 0) & (y > 0)
    log_slope, _, log_r2 = _line(np.log(x[both]), np.log(y[both]))
    return {"ratio": y.mean() / x.mean(), "slope": slope, "intercept": intercept, "r2": r2,
            "log_slope": log_slope, "log_r2": log_r2}  # fmt: skip


def with_intervals(x: Values, y: Values, seed: int = 0) -> dict[str, list[float]]:
    """Each figure of :func:`regression` with its 95 % interval, by drawing as many pairs again with replacement."""
    random = np.random.default_rng(seed)
    draws = random.integers(0, len(x), (NUM_RESAMPLES, len(x)))
    again = [regression(x[rows], y[rows]) for rows in draws]
    found = {}
    for name, value in regression(x, y).items():
        low, high = np.percentile([each[name] for each in again], [2.5, 97.5])
        found[name] = [float(value), float(low), float(high)]
    return found


def _line(x: Values, y: Values) -> tuple[float, float, float]:
    dx, dy = x - x.mean(), y - y.mean()
    spread = dx @ dx
    if spread == 0 or dy @ dy == 0:
        return 0.0, float(y.mean()), 0.0
    slope = dx @ dy / spread
    return float(slope), float(y.mean() - slope * x.mean()), float((dx @ dy) ** 2 / (spread * (dy @ dy)))
