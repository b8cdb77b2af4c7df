"""How much a score depends on which rows happened to be in the test: the bootstrap (Efron, Ann. Statist. 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from cpt_lightning.functional.accuracy_matrix import check_level


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
