"""Mismatch and truncated importance sampling against numbers worked by hand."""

from math import exp, log

import pytest
import torch

from cpt_lightning.functional import Mismatch, truncated_importance

MASK = torch.tensor([[True, True, False], [True, False, False]])
POLICY = torch.tensor([[log(0.6), log(0.1), 9.0], [log(0.3), 9.0, 9.0]])
SAMPLER = torch.tensor([[log(0.2), log(0.2), -9.0], [log(0.3), -9.0, -9.0]])
"""Ratios policy / sampler of the three tokens that count: 3, 1/2 and 1."""


def test_a_token_s_weight_is_its_ratio_up_to_the_cap():
    weights = truncated_importance(POLICY, SAMPLER, MASK, "token", cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 1.0], [1.0, 1.0, 1.0]]))


def test_a_sequence_s_weight_is_the_product_of_its_ratios_up_to_the_cap():
    """3 * 1/2 = 1.5 lies below the cap of 2 and above one of 1.2, though a token of it lies above both."""
    for cap, weight in ((2.0, 1.5), (1.2, 1.2)):
        weights = truncated_importance(POLICY, SAMPLER, MASK, "sequence", cap)
        torch.testing.assert_close(weights, torch.tensor([[weight, weight, 1.0], [1.0, 1.0, 1.0]]))


def test_weights_carry_no_gradient():
    logps = POLICY.clone().requires_grad_()
    assert not truncated_importance(logps, SAMPLER, MASK, "token", 2.0).requires_grad


def test_mismatch_by_hand():
    """Log ratios policy - sampler are log 3, -log 2 and 0; k3 is 3 - log 3 - 1, 1/2 + log 2 - 1 and 0."""
    found = Mismatch.between(POLICY, SAMPLER, MASK).shown
    expected = {
        "mean": (log(3) + log(2)) / 3,
        "max": log(3),
        "kl_k1": (-log(3) + log(2)) / 3,
        "kl_k3": ((3 - log(3) - 1) + (0.5 + log(2) - 1)) / 3,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-5)


def test_the_mismatch_of_parts_is_that_of_the_whole():
    parts = [Mismatch.between(POLICY[row : row + 1], SAMPLER[row : row + 1], MASK[row : row + 1]) for row in (0, 1)]
    whole = Mismatch.between(POLICY, SAMPLER, MASK)
    for name, value in Mismatch.of_all(parts).shown.items():
        torch.testing.assert_close(value, whole.shown[name])
    with pytest.raises(ValueError, match="no micro-batches"):
        Mismatch.of_all([])


def test_the_correction_makes_a_mean_over_the_sampler_one_over_the_policy():
    """Policy .5 and .5, sampler .8 and .2: weighed by 5/8 and 5/2, the sampler's mean of f is 0.5 (f1 + f2)."""
    policy, sampler = torch.full((1, 2), log(0.5)), torch.tensor([[log(0.8), log(0.2)]])
    weights = truncated_importance(policy, sampler, torch.ones(1, 2, dtype=torch.bool), "token", cap=10)
    values = torch.tensor([1.0, 7.0])
    assert (sampler.exp() * weights * values).sum().item() == pytest.approx(0.5 * (1 + 7))
    assert weights[0, 1].item() == pytest.approx(exp(log(0.5) - log(0.2)))
