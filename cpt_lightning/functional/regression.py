"""How well one figure tells another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class QuadraticFit:
    """A parabola through points, by least squares.

    Args:
        coefficients: Of 1, x and x squared.
        r_squared: Share of the variance of y that it explains, in the points that it was fitted to.
    """

    coefficients: tuple[float, float, float]
    r_squared: float

    def __call__(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Where the parabola lies."""
        return np.polynomial.polynomial.polyval(x, self.coefficients)


def quadratic_fit(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> QuadraticFit | None:
    """``y = a + b x + c x^2``, as RL's Razor (arXiv 2509.04259) fits forgetting to the KL divergence from the base.

    Args:
        x: ``[n]``.
        y: ``[n]``.

    Returns:
        ``None`` where a fit says nothing: fewer than four points (a parabola goes through any three), fewer than three
        different x, or a y that does not vary.

    >>> fit = quadratic_fit(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 5.0, 10.0]))
    >>> [round(each, 6) + 0.0 for each in fit.coefficients], round(fit.r_squared, 6)
    ([1.0, 0.0, 1.0], 1.0)
    >>> quadratic_fit(x := np.array([-1.0, 0.0, 0.0, 1.0]), x).coefficients  # which numpy takes for a line
    (0.0, 1.0, 0.0)
    """
    if len(x) < 4 or len(np.unique(x)) < 3 or np.ptp(y) == 0:
        return None
    # Points on a line have fewer coefficients.
    a, b, c, *_ = [*np.polynomial.Polynomial.fit(x, y, deg=2).convert().coef.tolist(), 0.0, 0.0]
    residual = y - np.polynomial.polynomial.polyval(x, (a, b, c))
    return QuadraticFit((a, b, c), float(1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()))
