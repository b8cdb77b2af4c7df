"""Advantages against hand-worked groups, TRL's published formula, and the properties a baseline must have."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpt_lightning.functional import group_normalized_advantages, zero_signal_fraction


def test_hand_worked_groups_are_divided_by_the_unbiased_deviation():
    """Rewards 1 0 0 1: mean 1/2, variance (4 * 1/4) / 3 = 1/3, deviation .577350: advantages +-.866025.
    Rewards 1 0 0 0: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4, deviation 1/2: advantages 3/2 and -1/2."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.866025, -0.866025, -0.866025, 0.866025], [1.5, -0.5, -0.5, -0.5]])
    torch.testing.assert_close(group_normalized_advantages(rewards), expected, atol=1e-5, rtol=0)


def test_without_a_scale_only_the_mean_is_subtracted():
    """Rewards 1 .1 .1 0: mean .3."""
    rewards = torch.tensor([[1.0, 0.1, 0.1, 0.0]])
    expected = torch.tensor([[0.7, -0.2, -0.2, -0.3]])
    torch.testing.assert_close(group_normalized_advantages(rewards, scale="none"), expected)


@given(reward=st.floats(-1e3, 1e3, width=32), group_size=st.integers(2, 17), scale=st.sampled_from(["std", "none"]))
def test_a_group_of_equal_rewards_gives_exactly_zero(reward, group_size, scale):
    """The float32 mean of eight times .9 is one bit away from .9, so this is not free."""
    advantages = group_normalized_advantages(torch.full((1, group_size), reward), scale)
    assert torch.equal(advantages, torch.zeros(1, group_size))


@pytest.mark.parametrize("eps", [1e-4, 1e-6])
def test_advantages_agree_with_the_formula_of_trl(eps):
    """TRL keeps rewards flat: view as groups, mean and ``std`` (torch's default: ddof 1), repeat, divide by std + 1e-4;
    verl's eps is 1e-6."""
    rewards = torch.rand(48, generator=torch.Generator().manual_seed(0))
    mean = rewards.view(-1, 8).mean(dim=1).repeat_interleave(8, dim=0)
    deviation = rewards.view(-1, 8).std(dim=1).repeat_interleave(8, dim=0)
    published = (rewards - mean) / (deviation + eps)
    torch.testing.assert_close(group_normalized_advantages(rewards.view(6, 8), eps=eps).flatten(), published)


@given(
    rewards=st.lists(st.sampled_from([0.0, 0.1, 0.9, 1.0]), min_size=2, max_size=16),
    shift=st.floats(-2, 2, width=32),
    scale=st.sampled_from(["std", "none"]),
)
def test_advantages_sum_to_zero_and_ignore_a_reward_that_all_completions_get(rewards, shift, scale):
    group = torch.tensor([rewards])
    advantages = group_normalized_advantages(group, scale)
    assert advantages.sum().abs() < 1e-4
    torch.testing.assert_close(group_normalized_advantages(group + shift, scale), advantages, atol=1e-3, rtol=1e-3)


def test_a_group_of_one_is_refused_with_the_mend():
    with pytest.raises(ValueError, match="group_size=1.*sample 2 or more"):
        group_normalized_advantages(torch.ones(3, 1))


def test_an_unknown_scale_is_refused_by_name():
    with pytest.raises(ValueError, match="scale='batch' is none of std, none"):
        inspect.unwrap(group_normalized_advantages)(torch.rand(2, 4), scale="batch")


def test_zero_signal_counts_groups_of_equal_rewards():
    """Of four groups, all right and all wrong teach nothing: 2/4."""
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.9, 0.9, 1.0]])
    assert zero_signal_fraction(rewards) == 0.5
    assert zero_signal_fraction(torch.zeros(0, 8)) == 0.0
