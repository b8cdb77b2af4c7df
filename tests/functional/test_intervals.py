"""Resampled means against the counts of draws, their spread against the standard error; Wilson's formula by hand."""

import numpy as np
import pytest

from cpt_lightning.functional.intervals import percentile_interval, resampled_means, wilson_interval


def test_a_draw_takes_the_same_rows_for_all_series():
    """The second series is one minus the first, so their means add up to 1 in every draw, and to 1 in no other way."""
    one = np.array([1.0, 0, 0, 1, 1, 0, 1])
    means = resampled_means(np.stack([one, 1 - one]), 200, key=[7])
    assert means.sum(axis=1) == pytest.approx(np.ones(200))
    assert len(np.unique(means[:, 0].round(6))) + 5 > 10 and set((means[:, 0] * 7).round(6)) <= set(
        map(float, range(8))
    )


def test_the_spread_of_the_draws_is_the_standard_error():
    """60 of 100 right: sqrt(.6 * .4 / 100) = .04899; of 20,000 draws the deviation is within 2 % of it."""
    scores = np.array([[1.0] * 60 + [0.0] * 40])
    draws = resampled_means(scores, 20_000, key=[1])[:, 0]
    assert draws.mean() == pytest.approx(0.6, abs=0.002)
    assert draws.std() == pytest.approx(0.04899, rel=0.02)
    low, high = percentile_interval(draws)
    assert (low, high) == pytest.approx((0.504, 0.696), abs=0.011), "0.6 -+ 1.96 * .049, on a grid of .01"


def test_equal_keys_give_equal_draws_and_others_do_not():
    scores = np.arange(50.0)[None]
    one, same, other = (resampled_means(scores, 5, key=[key]) for key in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


def test_an_interval_leaves_out_as_much_on_either_side():
    """Of 0, 1, ..., 200 the middle 95 % end at 5 and 195."""
    assert percentile_interval(np.arange(201.0)[::-1]) == pytest.approx((5.0, 195.0))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="no rows to draw from"):
        resampled_means(np.zeros((2, 0)), 3, key=[0])
    with pytest.raises(ValueError, match="level=95 must lie between 0 and 1"):
        percentile_interval(np.ones(3), level=95)


@pytest.mark.parametrize(
    "num_right, num_samples, low, high", [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_interval_by_hand(num_right, num_samples, low, high):
    """With z = 1.96, z^2 = 3.8415. 5 of 10: center .5, half 1.96/1.38415*sqrt(.025 + .0096) = .2634.

    0 of 10: [0, z^2/(10 + z^2)] = .2775. 81 of 263 is Newcombe's example (Statistics in Medicine 17, 1998, table I).
    """
    assert wilson_interval(num_right / num_samples, num_samples) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_refuses_what_is_no_share():
    for arguments, name in (((1.2, 10), "accuracy"), ((0.5, 0), "num_samples"), ((0.5, 10, 95), "level")):
        with pytest.raises(ValueError, match=name):
            wilson_interval(*arguments)
