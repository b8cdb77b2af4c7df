"""Token weights and masked means, worked out by hand."""

import inspect
import math

import pytest
import torch

from cpt_lightning.functional import masked_mean, token_weights, weighted_sum

MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [False, False, False, False]])


@pytest.mark.parametrize(
    "reduction, constant, rows",
    [
        ("token_mean", None, [[1 / 4, 1 / 4, 1 / 4, 0], [1 / 4, 0, 0, 0]]),
        ("sequence_mean", None, [[1 / 9, 1 / 9, 1 / 9, 0], [1 / 3, 0, 0, 0]]),
        ("constant", 8.0, [[1 / 24, 1 / 24, 1 / 24, 0], [1 / 24, 0, 0, 0]]),
    ],
)
def test_hand_worked_weights(reduction, constant, rows):
    """Three sequences of 3, 1 and 0 tokens: 1/4 each; 1/3 of 1/3 and of 1/1, the empty one is a sequence; 1/(3*8)."""
    expected = torch.tensor([*rows, [0.0] * 4])
    torch.testing.assert_close(token_weights(MASK, reduction, constant=constant), expected)


def test_counts_of_a_larger_mini_batch_replace_those_of_the_mask():
    """With 10 tokens in 5 sequences around: 1/10, and 1/3 of 1/5 and 1/1 of 1/5."""
    assert token_weights(MASK, "token_mean", num_tokens=10)[0, 0] == pytest.approx(1 / 10)
    weights = token_weights(MASK, "sequence_mean", num_sequences=5)
    assert weights[0, 0] == pytest.approx(1 / 15) and weights[1, 0] == pytest.approx(1 / 5)
    assert token_weights(MASK, "constant", constant=8.0, num_sequences=5)[0, 0] == pytest.approx(1 / 40)


@pytest.mark.parametrize("constant", [None, 0.0, -1.0])
def test_the_constant_reduction_needs_a_positive_constant(constant):
    with pytest.raises(ValueError, match="divides by a number above 0"):
        token_weights(MASK, "constant", constant=constant)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_a_constant_that_another_reduction_would_ignore_is_refused(reduction):
    with pytest.raises(ValueError, match="constant=8.0 with reduction=.*leave it out"):
        token_weights(MASK, reduction, constant=8.0)


def test_an_unknown_reduction_is_refused_by_name():
    with pytest.raises(ValueError, match="reduction='mean' is none of token_mean, sequence_mean, constant"):
        inspect.unwrap(token_weights)(MASK, "mean")


def test_masked_mean_over_everything_and_along_a_dimension():
    """Values 1 2 3 and 7: mean 13/4; rows 2, 7, and 0 for the empty one."""
    values = torch.tensor([[1.0, 2.0, 3.0, math.nan], [7.0, math.inf, 0.0, 0.0], [math.nan] * 4])
    assert masked_mean(values, MASK) == 13 / 4
    assert masked_mean(values, MASK, dim=1).tolist() == [2.0, 7.0, 0.0]


def test_masked_values_get_no_gradient_even_where_they_are_nan():
    values = torch.tensor([[1.0, 2.0, 3.0, math.nan], [7.0, math.inf, 0.0, 0.0], [math.nan] * 4], requires_grad=True)
    (masked_mean(values, MASK) + weighted_sum(values, token_weights(MASK, "token_mean"), MASK)).backward()
    torch.testing.assert_close(values.grad, MASK.float() / 2)


def test_weighted_sum_by_hand():
    """1/4 * (1 + 2 + 3 + 7) = 13/4, whatever weight stands at a masked place."""
    values = torch.tensor([[1.0, 2.0, 3.0, 9.0], [7.0, 9.0, 9.0, 9.0], [9.0] * 4])
    assert weighted_sum(values, torch.full((3, 4), 0.25), MASK) == 13 / 4


def test_shapes_are_checked_while_testing():
    """The import hook of conftest.py is on: a mask of another length is refused before any arithmetic."""
    with pytest.raises(Exception, match="Type-check error"):
        weighted_sum(torch.ones(3, 5), torch.ones(3, 4), MASK)
