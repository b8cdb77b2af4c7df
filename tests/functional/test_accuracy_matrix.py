"""The metrics of continual learning on matrices worked by hand, with a later recovery that tells definitions apart."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_lightning.functional.accuracy_matrix import (
    average_accuracy,
    backward_transfer,
    forgetting_measure,
    forward_transfer,
    learning,
    mean_average_accuracy,
    probe_changes,
    probe_minima,
    worst_dip,
)

# Task 0 is learned (.80), falls to .50 and recovers to .70; task 1 reaches .60, is .64 in the end; task 2 ends at .90.
RECOVERY = [
    [0.80, 0.30, 0.20],
    [0.50, 0.60, 0.30],
    [0.70, 0.64, 0.90],
]
ZERO_SHOT = [0.40, 0.35, 0.10]
TRIANGLE = [[0.80], [0.50, 0.60], [0.70, 0.64, 0.90]]
WITH_NONE = [[0.80, None, None], [0.50, 0.60, math.nan], [0.70, 0.64, 0.90]]


def test_average_accuracy_is_the_mean_of_the_last_row():
    """(.70 + .64 + .90) / 3 = .746667."""
    assert average_accuracy(RECOVERY) == pytest.approx(2.24 / 3)


def test_learning_is_the_mean_of_the_diagonal():
    """(.80 + .60 + .90) / 3 = .766667."""
    assert learning(RECOVERY) == pytest.approx(2.30 / 3)


def test_mean_average_accuracy_weighs_stages_alike():
    """(.80 + (.50 + .60) / 2 + .746667) / 3 = .698889."""
    assert mean_average_accuracy(RECOVERY) == pytest.approx((0.80 + 0.55 + 2.24 / 3) / 3)


def test_forgetting_measure_is_final_minus_best_earlier_over_earlier_tasks():
    """Task 0: .70 - max(.80, .50) = -.10. Task 1: .64 - max(.30, .60) = +.04. Over T-1 = 2: -.03; over T = 3: -.02.

    With the last row inside the maximum task 1 would give 0 and the mean -.05; first minus last would give +.03.
    """
    assert forgetting_measure(RECOVERY) == pytest.approx(-0.03)
    assert forgetting_measure(RECOVERY, normalizer="all") == pytest.approx(-0.02)


def test_the_best_earlier_score_may_be_older_than_the_learning_of_the_task():
    """A task known before it was taught: .95 at stage 0, .60 when learned, .64 at the end; (-.10 - .31) / 2 = -.205."""
    known_before = [[0.80, 0.95, 0.20], RECOVERY[1], RECOVERY[2]]
    assert forgetting_measure(known_before) == pytest.approx(-0.205)
    assert backward_transfer(known_before) == pytest.approx(-0.03)


def test_backward_transfer_compares_the_end_with_the_diagonal():
    """((.70 - .80) + (.64 - .60)) / 2 = -.03, and without recovery ((.50 - .80) + (.64 - .60)) / 2 = -.13."""
    assert backward_transfer(RECOVERY) == pytest.approx(-0.03)
    assert backward_transfer([*RECOVERY[:2], [0.50, 0.64, 0.90]]) == pytest.approx(-0.13)


def test_forward_transfer_compares_the_row_before_learning_with_the_base():
    """((.30 - .35) + (.30 - .10)) / 2 = .075."""
    assert forward_transfer(RECOVERY, ZERO_SHOT) == pytest.approx(0.075)


def test_forward_transfer_leaves_out_tasks_that_the_base_was_not_asked():
    """Of the two terms (.30 - .35) and (.30 - .10) the first alone, and then none."""
    assert forward_transfer(RECOVERY, [0.40, 0.35, None]) == pytest.approx(-0.05)
    assert math.isnan(forward_transfer(RECOVERY, [0.40, math.nan, None]))


def test_a_task_that_came_later_needs_scores_from_the_stage_before_it_on():
    """Task 2 was not asked before stage 1, and FM takes the best that is known: all is as if it had been."""
    later = [[0.80, 0.30, None], *RECOVERY[1:]]
    metrics = (average_accuracy, learning, mean_average_accuracy, forgetting_measure, backward_transfer, worst_dip)
    assert [metric(later) for metric in metrics] == [metric(RECOVERY) for metric in metrics]
    assert forward_transfer(later, [0.40, 0.35, None]) == pytest.approx(-0.05)


def test_worst_dip_sees_what_recovered_later():
    """Task 0 was .30 below its best after stage 1, though .10 at the end."""
    assert worst_dip(RECOVERY) == pytest.approx(0.30)
    assert worst_dip([[0.5, 0.1], [0.6, 0.9]]) == 0


def test_four_stages_with_two_dips():
    """Best earlier at the end: .8, .9, .5 -> changes -.2, -.1, +.1: FM = -.2/3. BWT: (-.2 + .1 + .1)/3 = 0. Dip .4."""
    accuracy = [[0.8, 0.2, 0.1, 0.0], [0.4, 0.7, 0.1, 0.0], [0.7, 0.9, 0.5, 0.3], [0.6, 0.8, 0.6, 0.9]]
    assert forgetting_measure(accuracy) == pytest.approx(-0.2 / 3)
    assert backward_transfer(accuracy) == pytest.approx(0)
    assert worst_dip(accuracy) == pytest.approx(0.4)


@pytest.mark.parametrize("metric", [average_accuracy, learning, mean_average_accuracy, backward_transfer, worst_dip])
@pytest.mark.parametrize("triangle", [TRIANGLE, WITH_NONE], ids=["ragged", "with none and nan"])
def test_a_lower_triangle_is_enough_for_what_looks_back(metric, triangle):
    assert metric(triangle) == pytest.approx(metric(RECOVERY))


def test_forgetting_of_a_lower_triangle_takes_the_best_known_score():
    """Task 1 is .60 at best before the end either way: (-.10 + .04) / 2."""
    assert forgetting_measure(TRIANGLE) == pytest.approx(-0.03)


def test_forward_transfer_of_a_lower_triangle_names_the_missing_entry():
    with pytest.raises(ValueError, match=r"accuracy\[0\]\[1\] is missing"):
        forward_transfer(TRIANGLE, ZERO_SHOT)


def test_a_hole_where_a_metric_needs_a_score_is_an_error():
    with pytest.raises(ValueError, match=r"accuracy\[1\]\[0\] is missing"):
        average_accuracy([[0.8, 0.2], [None, 0.6]])
    with pytest.raises(ValueError, match=r"column 0 .* empty above row 1"):
        forgetting_measure([[None, 0.2], [0.5, 0.6]])


def test_a_single_task_has_learning_but_nothing_earlier_to_forget():
    assert average_accuracy([[0.7]]) == learning([[0.7]]) == mean_average_accuracy([[0.7]]) == 0.7
    assert all(math.isnan(metric([[0.7]])) for metric in (forgetting_measure, backward_transfer, worst_dip))
    assert math.isnan(forgetting_measure([[0.7]], normalizer="all"))
    assert math.isnan(forward_transfer([[0.7]], [0.1]))


def test_tasks_learned_together_are_all_learned_and_none_is_earlier():
    """Joint training: one row, all tasks at stage 0."""
    joint = {"accuracy": [[0.8, 0.6, 0.4]], "learned_at": [0, 0, 0]}
    assert average_accuracy(**joint) == learning(**joint) == pytest.approx(0.6)
    assert math.isnan(forgetting_measure(**joint))


def test_a_stage_of_two_tasks_counts_both():
    """Tasks 0 and 1 at stage 0, task 2 at stage 1: changes -.1 and -.2, learning (.8 + .6 + .9) / 3, FWT .3 - .1."""
    mixed = {"accuracy": [[0.8, 0.6, 0.3], [0.7, 0.4, 0.9]], "learned_at": [0, 0, 1]}
    assert forgetting_measure(**mixed) == backward_transfer(**mixed) == pytest.approx(-0.15)
    assert forgetting_measure(**mixed, normalizer="all") == pytest.approx(-0.1)
    assert learning(**mixed) == pytest.approx(2.3 / 3)
    assert forward_transfer(**mixed, zero_shot=[0.4, 0.3, 0.1]) == pytest.approx(0.2)


def test_a_stream_under_way_is_measured_on_the_tasks_learned_so_far():
    """After 2 of 3 tasks: (.50 + .60) / 2; FM and BWT -.30; FWT .30 - .35."""
    under_way = RECOVERY[:2]
    assert average_accuracy(under_way) == pytest.approx(0.55)
    assert forgetting_measure(under_way) == backward_transfer(under_way) == pytest.approx(-0.30)
    assert forward_transfer(under_way, ZERO_SHOT) == pytest.approx(-0.05)


def test_shapes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        average_accuracy([])
    with pytest.raises(ValueError, match="3 rows for 2 tasks"):
        average_accuracy([[0.1, 0.2]] * 3)
    with pytest.raises(ValueError, match="learned_at names 1"):
        average_accuracy([[0.1, 0.2]], learned_at=[0])
    with pytest.raises((ValueError, TypeError), match="normalizer"):  # in tests beartype is faster than the function
        forgetting_measure(RECOVERY, normalizer="T")


@pytest.mark.parametrize("convert", [torch.tensor, np.array, lambda rows: [torch.tensor(row) for row in rows], tuple])
def test_tensors_arrays_and_lists_give_the_same_and_stay_unchanged(convert):
    given_accuracy, given_base = convert(RECOVERY), convert(ZERO_SHOT)
    before = copy.deepcopy(given_accuracy)
    assert forgetting_measure(given_accuracy) == pytest.approx(-0.03, abs=1e-6)
    assert forward_transfer(given_accuracy, given_base) == pytest.approx(0.075, abs=1e-6)
    assert worst_dip(given_accuracy) == pytest.approx(0.30, abs=1e-6)
    assert str(given_accuracy) == str(before)


def test_probes_show_the_end_and_the_way_there():
    """From 1.0 down to .25 and back to .75: changed by -.25, never above .25 at the worst."""
    probes = [[0.25, 1.0], [0.75, 0.9]]
    assert probe_changes(probes, [1.0, 0.8]) == pytest.approx([-0.25, 0.1])
    assert probe_minima(probes) == [0.25, 0.9]


SCORES = st.floats(0, 1)


@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=n, max_size=n)))
@settings(deadline=None)  # a busy machine is no failure
def test_definitions_relate_as_they_must(accuracy):
    """FM never exceeds BWT (best earlier >= diagonal), and no task ends further below its best than the dip."""
    forgotten = forgetting_measure(accuracy)
    assert forgotten <= backward_transfer(accuracy) + 1e-12
    assert -forgotten <= worst_dip(accuracy) + 1e-12
    assert forgetting_measure(accuracy, "all") == pytest.approx(forgotten * (len(accuracy) - 1) / len(accuracy))
