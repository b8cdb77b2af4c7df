"""How much a score depends on which rows happened to be in the test: by formula, or by the bootstrap (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float


def wilson_interval(accuracy: float, num_samples: int, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a share of right answers (Wilson, JASA 1927); never leaves [0, 1].

    For scores between 0 and 1 (``vqa``) it is too wide rather than too narrow: no distribution on [0, 1] varies more
    than right-or-wrong does.

    Args:
        accuracy: Share of right answers, in [0, 1].
        num_samples: Answers graded.
        level: Probability with which such intervals hold the true share.

    >>> [round(bound, 3) for bound in wilson_interval(0.5, 100)]
    [0.404, 0.596]
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy={accuracy} must lie in [0, 1]")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: an interval needs at least one sample")
    check_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    shrink = 1 + z**2 / num_samples
    center = (accuracy + z**2 / (2 * num_samples)) / shrink
    half = z / shrink * math.sqrt(accuracy * (1 - accuracy) / num_samples + z**2 / (4 * num_samples**2))
    return max(0.0, center - half), min(1.0, center + half)


def resampled_means(scores: Float[np.ndarray, "R n"], num_draws: int, key: Sequence[int]) -> Float[np.ndarray, "D R"]:
    """Means of R series over the same n test rows, drawn anew with replacement, D times.

    A draw takes the same rows for all series, and equal keys give equal draws: what two models scored on the same rows
    is compared row by row, so that rows which are hard for both do not blur their difference.

    Args:
        scores: ``[R, n]`` what each series scored on each row.
        num_draws: How many times rows are drawn.
        key: Seeds the draws.

    Raises:
        ValueError: There are no rows.

    >>> resampled_means(np.ones((1, 5)), num_draws=3, key=[0]).tolist()
    [[1.0], [1.0], [1.0]]
    """
    num_rows = scores.shape[1]
    if num_rows == 0:
        raise ValueError("scores has no rows to draw from")
    counts = np.random.default_rng(key).multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=num_draws)
    return counts @ scores.T / num_rows


def percentile_interval(values: Float[np.ndarray, " D"], level: float = 0.95) -> tuple[float, float]:
    """The range that the middle of the draws fills, leaving out as many on either side.

    Args:
        values: ``[D]`` a figure in each draw.
        level: Share of the draws within.

    >>> percentile_interval(np.arange(5.0), level=0.5)
    (1.0, 3.0)
    """
    check_level(level)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def check_level(level: float) -> None:
    """Refuses a level of confidence that is no probability."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, e.g. 0.95")
