"""Advantages against hand-worked groups, TRL's published formula, and the properties a baseline must have."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpt_lightning.functional import (
    greedy_baseline_advantages,
    group_normalized_advantages,
    leave_one_out_advantages,
    mean_and_variance,
    one_zero_advantages,
    token_moments,
    whitened_advantages,
    zero_signal_fraction,
)


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


def test_zero_signal_counts_groups_that_teach_nothing():
    """Of four groups, all right and all wrong teach GRPO nothing: 2/4; 1-0 REINFORCE learns of all right, 1/4."""
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.9, 0.9, 1.0]])
    assert zero_signal_fraction(group_normalized_advantages(rewards)) == 0.5
    assert zero_signal_fraction(one_zero_advantages(rewards == 1)) == 0.25
    assert zero_signal_fraction(torch.zeros(0, 8)) == 0.0


def test_leaving_one_out_compares_with_the_siblings_mean():
    """Rewards 1 0 0 1: the first's siblings have mean 1/3, the second's 2/3.
    Rewards .9 .1 .1 .1: siblings' means .1 and 1.1/3."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.9, 0.1, 0.1, 0.1]])
    expected = torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0.8, *[0.1 - 1.1 / 3] * 3]])
    torch.testing.assert_close(leave_one_out_advantages(rewards), expected)


def test_leaving_one_out_agrees_with_the_formula_of_verl():
    """verl: ``score * n / (n - 1) - mean * n / (n - 1)``."""
    rewards = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    published = rewards * 8 / 7 - rewards.mean(dim=1, keepdim=True) * 8 / 7
    torch.testing.assert_close(leave_one_out_advantages(rewards), published, atol=1e-6, rtol=1e-5)


@given(reward=st.floats(-1e3, 1e3, width=32), group_size=st.integers(2, 17))
def test_leaving_one_out_gives_exactly_zero_for_equal_rewards(reward, group_size):
    assert not leave_one_out_advantages(torch.full((1, group_size), reward)).any()


def test_the_greedy_completion_is_remaxs_baseline():
    """A prompt that greedy decoding solves has nothing above it: right samples get 0, wrong ones -1."""
    rewards, greedy = torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.tensor([1.0, 0.1])
    torch.testing.assert_close(greedy_baseline_advantages(rewards, greedy), torch.tensor([[0.0, -1.0], [0.9, 0.0]]))


def whitened_as_in_verl(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A score at each token of its completion, whitened over all tokens with the unbiased variance and 1e-8."""
    mask = torch.arange(int(lengths.max())) < lengths.flatten()[:, None]
    tokens = scores.flatten()[:, None].expand_as(mask)[mask]
    whitened = (tokens - tokens.mean()) * torch.rsqrt(tokens.var(unbiased=True) + 1e-8)
    firsts = lengths.flatten().cumsum(0) - lengths.flatten()
    return whitened[firsts].view_as(scores)


@pytest.mark.parametrize("group_baseline", [False, True], ids=["reinforce++", "reinforce++ baseline"])
def test_whitening_agrees_with_verl_whatever_ranks_the_batch_is_spread_over(group_baseline):
    generator = torch.Generator().manual_seed(0)
    rewards, lengths = torch.rand(6, 4, generator=generator), torch.randint(1, 9, (6, 4), generator=generator)
    if group_baseline:
        rewards = group_normalized_advantages(rewards, "none")
    ranks = [token_moments(rewards[part], lengths[part].float()) for part in (slice(0, 2), slice(2, 6))]
    mean, variance = mean_and_variance(sum(ranks))
    torch.testing.assert_close(whitened_advantages(rewards, mean, variance), whitened_as_in_verl(rewards, lengths))


def test_hand_worked_whitening():
    """Rewards 1 and 0 at 1 and 3 tokens: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4: advantages 3/2 and -1/2."""
    rewards, lengths = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 3.0]])
    mean, variance = mean_and_variance(token_moments(rewards, lengths))
    torch.testing.assert_close(whitened_advantages(rewards, mean, variance), torch.tensor([[1.5, -0.5]]))


@given(reward=st.floats(-10, 10, width=32), shape=st.tuples(st.integers(1, 5), st.integers(2, 5)))
def test_whitening_equal_rewards_gives_exactly_zero(reward, shape):
    rewards, lengths = torch.full(shape, reward), torch.full(shape, 3.0)
    mean, variance = mean_and_variance(token_moments(rewards, lengths))
    assert not whitened_advantages(rewards, mean, variance).any()


def test_one_zero_learns_from_correct_completions_only():
    correct = torch.tensor([[True, False]])
    assert one_zero_advantages(correct).tolist() == [[1.0, 0.0]]
