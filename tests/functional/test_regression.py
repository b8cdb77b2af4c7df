"""Parabolas against numpy's and by hand; fronts against the definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_lightning.functional.pareto import pareto_front
from cpt_lightning.functional.regression import quadratic_fit


def test_a_parabola_by_least_squares():
    """Symmetric about 0: x = -1, -1, 1, 1 with y = 0, 2, 0, 2 and x = 0, 0 with y = 1, 3. The parabola goes through the
    means, 1 at -1 and 1, 2 at 0: a = 2, b = 0, c = -1. Residuals are 1 each, 6 in all. The mean of y is 8/6; the sum of
    squares 0 + 4 + 0 + 4 + 1 + 9 - 64/6 = 7.3333; R^2 = 1 - 6 / 7.3333 = .1818.
    """
    x, y = np.array([-1.0, -1, 1, 1, 0, 0]), np.array([0.0, 2, 0, 2, 1, 3])
    fit = quadratic_fit(x, y)
    assert fit.coefficients == pytest.approx((2, 0, -1), abs=1e-9)
    assert fit.r_squared == pytest.approx(1 - 6 / (18 - 64 / 6))
    assert fit(np.array([2.0])) == pytest.approx([-2.0])


def test_the_same_as_numpy_and_the_squared_correlation_of_fit_and_points():
    random = np.random.default_rng(0)
    x = random.normal(50, 5, size=40)
    y = 3 - x + 0.2 * x**2 + random.normal(0, 20, size=40)
    fit = quadratic_fit(x, y)
    assert fit.coefficients == pytest.approx(tuple(np.polyfit(x, y, 2)[::-1]), rel=1e-6)
    assert fit.r_squared == pytest.approx(np.corrcoef(fit(x), y)[0, 1] ** 2)


@pytest.mark.parametrize(
    ("x", "y"), [([0, 1, 2], [0, 1, 5]), ([0, 0, 1, 1], [0, 1, 2, 3]), ([0, 1, 2, 3], [2] * 4), ([], [])]
)
def test_where_a_fit_says_nothing_there_is_none(x, y):
    assert quadratic_fit(np.array(x, dtype=float), np.array(y, dtype=float)) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_nothing_else_beats(things):
    """Of equal ones the first; beaten: another gains no less and loses no more, and is better in one of the two."""
    gains, losses = [float(gain) for gain, _ in things], [float(loss) for _, loss in things]

    def beaten(one: int) -> bool:
        return any(
            gains[other] >= gains[one] and losses[other] <= losses[one]
            and (things[other] != things[one] or other < one)
            for other in range(len(things)) if other != one
        )  # fmt: skip

    assert set(pareto_front(gains, losses)) == {one for one in range(len(things)) if not beaten(one)}
