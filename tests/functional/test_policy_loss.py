"""The policy loss against hand calculations, TRL's and verl's published formulas, and what must hold for any split."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpt_lightning.functional import PolicyStats, clipped_policy_loss, clipped_weight_loss, token_weights

REDUCTIONS = [("token_mean", None), ("sequence_mean", None), ("constant", 16.0)]


def ratios(*rows: list[float]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the policy (a leaf) and of the sampler whose quotient is the given ratios."""
    ratio = torch.tensor(rows)
    old_logps = torch.full_like(ratio, -2.0)
    return (old_logps + ratio.log()).requires_grad_(), old_logps


def random_case(num_sequences: int = 6, length: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities (a leaf), old ones, advantages, and a mask of ragged lengths 1..length."""
    generator = torch.Generator().manual_seed(seed)
    old_logps = -3 * torch.rand(num_sequences, length, generator=generator)
    logps = (old_logps + 0.4 * torch.randn(num_sequences, length, generator=generator)).requires_grad_()
    lengths = torch.randint(1, length + 1, (num_sequences, 1), generator=generator)
    return logps, old_logps, torch.randn(num_sequences, generator=generator), torch.arange(length) < lengths


def test_hand_worked_loss_clips_each_side_only_where_it_would_gain():
    """Bounds .8 and 1.3; token mean, so each of the 6 tokens weighs 1/6.
    A = 2:  ratio 1.5 -> min(3, 2.6) = 2.6; ratio .5 -> min(1, 1.6) = 1; ratio 1 -> 2.
    A = -1: ratio 1.5 -> min(-1.5, -1.3) = -1.5; ratio .5 -> min(-.5, -.8) = -.8; one masked; ratio 1.1 -> -1.1.
    Loss = -(2.6 + 1 + 2 - 1.5 - .8 - 1.1) / 6 = -2.2 / 6 = -.366667. One token of six is clipped high (1.5 with A = 2),
    one low (.5 with A = -1); mean ratio (1.5 + .5 + 1 + 1.5 + .5 + 1.1) / 6 = 6.1 / 6."""
    logps, old_logps = ratios([1.5, 0.5, 1.0, 9.0], [1.5, 0.5, 9.0, 1.1])
    mask = torch.tensor([[True, True, True, False], [True, True, False, True]])
    weights = token_weights(mask, "token_mean")
    loss, stats = clipped_policy_loss(logps, old_logps, torch.tensor([2.0, -1.0]), mask, weights)
    torch.testing.assert_close(loss, torch.tensor(-2.2 / 6))
    torch.testing.assert_close(stats.clip_fraction_high, torch.tensor(1 / 6))
    torch.testing.assert_close(stats.clip_fraction_low, torch.tensor(1 / 6))
    torch.testing.assert_close(stats.clip_fraction, torch.tensor(1 / 3))
    torch.testing.assert_close(stats.ratio_mean, torch.tensor(6.1 / 6))
    assert stats.num_tokens == 6 and stats.dual_clip_fraction == 0


def test_hand_worked_gradient_is_zero_exactly_where_a_token_is_clipped():
    """d loss / d logp = -w * ratio * A where not clipped. w = 1/2: A = 1: ratio 1.5 clipped -> 0; ratio .5 -> -.25.
    A = -1: ratio 1.5 -> .75; ratio .5 clipped -> 0."""
    logps, old_logps = ratios([1.5, 0.5], [1.5, 0.5])
    mask, weights = torch.ones(2, 2, dtype=torch.bool), torch.full((2, 2), 0.5)
    clipped_policy_loss(logps, old_logps, torch.tensor([1.0, -1.0]), mask, weights)[0].backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0, -0.25], [0.75, 0.0]]))


def test_on_policy_the_gradient_is_that_of_minus_advantage_times_log_prob():
    logps, _, advantages, mask = random_case()
    weights = token_weights(mask, "sequence_mean")
    loss, stats = clipped_policy_loss(logps, logps.detach(), advantages, mask, weights)
    loss.backward()
    torch.testing.assert_close(logps.grad, -weights * advantages[:, None])
    assert stats.ratio_mean == 1 and stats.clip_fraction == 0


def test_dual_clip_bounds_the_loss_of_a_bad_token_and_stops_its_gradient():
    """A = -2, ratio 5: plain loss 10, dual clip 3 makes it 6; ratio 2 is untouched: 4. A = 2, ratio 5: -2 * 1.3."""
    logps, old_logps = ratios([5.0, 2.0], [5.0, 1.0])
    mask, weights = torch.tensor([[True, True], [True, False]]), torch.ones(2, 2)
    loss, stats = clipped_policy_loss(logps, old_logps, torch.tensor([-2.0, 2.0]), mask, weights, dual_clip=3.0)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(6 + 4 - 2.6))
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(stats.dual_clip_fraction, torch.tensor(1 / 3))


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0])
def test_a_dual_clip_that_would_cut_on_policy_updates_is_refused(dual_clip):
    logps, old_logps, advantages, mask = random_case()
    with pytest.raises(ValueError, match="dual_clip=.*above 1"):
        clipped_policy_loss(logps, old_logps, advantages, mask, mask.float(), dual_clip=dual_clip)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("name", ["grpo", "bnpo", "dr_grpo"])
def test_loss_agrees_with_the_formulas_of_trl_and_verl(name, dual_clip):
    """TRL: two coefficients, minimum, then ``grpo`` the mean of sequence means, ``bnpo`` the token mean, ``dr_grpo``
    the sum over (sequences * maximum length). verl's dual clip: where A < 0, the minimum of the loss and -c * A."""
    logps, old_logps, advantages, mask = random_case(16, 7, seed=3)
    logps.data += (torch.rand(16, 7, generator=torch.Generator().manual_seed(4)) > 0.8) * 2.0
    ratio, gain = (logps - old_logps).exp(), advantages.unsqueeze(1)
    per_token = -torch.min(ratio * gain, torch.clamp(ratio, 0.8, 1.3) * gain)
    if dual_clip is not None:
        per_token = torch.where(gain < 0, torch.min(-dual_clip * gain, per_token), per_token)
    published = {
        "grpo": ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean(),
        "bnpo": (per_token * mask).sum() / mask.sum().clamp(min=1.0),
        "dr_grpo": (per_token * mask).sum() / (per_token.size(0) * 16),
    }[name]
    reduction, constant = dict(zip(["bnpo", "grpo", "dr_grpo"], REDUCTIONS, strict=True))[name]
    weights = token_weights(mask, reduction, constant=constant)
    loss, _ = clipped_policy_loss(logps, old_logps, advantages, mask, weights, dual_clip=dual_clip)
    torch.testing.assert_close(loss, published)
    ours, theirs = torch.autograd.grad(loss, logps)[0], torch.autograd.grad(published, logps)[0]
    torch.testing.assert_close(ours, theirs)


@settings(deadline=None)
@given(cuts=st.sets(st.integers(1, 11)), case=st.sampled_from(REDUCTIONS), slice_weights=st.booleans())
def test_micro_batches_of_any_size_add_up_to_the_mini_batch(cuts, case, slice_weights):
    """Both ways to get a micro-batch's weights: sliced from the mini-batch's, or from the mini-batch's counts."""
    reduction, constant = case
    logps, old_logps, advantages, mask = random_case(12)
    weights = token_weights(mask, reduction, constant=constant)
    whole, whole_stats = clipped_policy_loss(logps, old_logps, advantages, mask, weights)
    total, parts = torch.zeros(()), []
    for rows in map(slice, [0, *sorted(cuts)], [*sorted(cuts), 12]):
        counts = {"num_sequences": 12, "num_tokens": int(mask.sum())}
        part = weights[rows] if slice_weights else token_weights(mask[rows], reduction, constant=constant, **counts)
        loss, stats = clipped_policy_loss(logps[rows], old_logps[rows], advantages[rows], mask[rows], part)
        total, parts = total + loss, [*parts, stats]
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, logps)[0], torch.autograd.grad(whole, logps)[0])
    merged = PolicyStats.mean(parts)
    for name in ("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction", "ratio_mean", "num_tokens"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole_stats, name))


def test_masked_garbage_changes_neither_loss_nor_gradient_nor_statistics():
    logps, old_logps, advantages, mask = random_case()
    weights = token_weights(mask, "token_mean")
    clean, clean_stats = clipped_policy_loss(logps, old_logps, advantages, mask, weights)
    (clean_grad,) = torch.autograd.grad(clean, logps)
    garbage = torch.tensor([math.inf, -math.inf, math.nan, 1e30]).repeat(8)[: logps.numel()].view_as(logps)
    dirty_logps = torch.where(mask, logps, garbage).detach().requires_grad_()
    dirty_old = torch.where(mask, old_logps, garbage.flip(1))
    dirty, dirty_stats = clipped_policy_loss(dirty_logps, dirty_old, advantages, mask, weights)
    dirty.backward()
    assert torch.equal(dirty, clean) and torch.equal(dirty_logps.grad, clean_grad)
    assert dirty_stats.ratio_mean == clean_stats.ratio_mean and dirty_stats.clip_fraction == clean_stats.clip_fraction


@pytest.mark.parametrize("reduction, constant", REDUCTIONS)
def test_an_empty_mask_gives_a_loss_of_zero_that_backpropagates_zeros(reduction, constant):
    logps, old_logps, advantages, mask = random_case()
    mask = torch.zeros_like(mask)
    weights = token_weights(mask, reduction, constant=constant)
    loss, stats = clipped_policy_loss(logps, old_logps, advantages, mask, weights)
    loss.backward()
    assert loss == 0 and torch.equal(logps.grad, torch.zeros_like(logps)) and stats.ratio_mean == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_overflows_exp_leaves_no_nan(advantage):
    logps = torch.tensor([[-0.1, -400.0]], requires_grad=True)
    old_logps, mask = torch.tensor([[-400.0, -0.1]]), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = clipped_policy_loss(logps, old_logps, torch.tensor([advantage]), mask, torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()


def test_half_precision_log_probs_are_subtracted_in_float32():
    logps, old_logps, advantages, mask = random_case()
    half, old_half = logps.detach().bfloat16(), old_logps.bfloat16()
    weights = token_weights(mask, "token_mean")
    loss, _ = clipped_policy_loss(half, old_half, advantages, mask, weights)
    expected, _ = clipped_policy_loss(half.float(), old_half.float(), advantages, mask, weights)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_the_mean_of_no_statistics_is_refused():
    with pytest.raises(ValueError, match="no policy statistics"):
        PolicyStats.mean([])


def test_hand_worked_sequence_ratio_is_the_geometric_mean_and_clips_whole_sequences():
    """Ratios 4 and 1: geometric mean 2; ratios 1/4 and 1 with a masked token: 1/2. Bounds .8 and 1.3, A = 1 for both,
    weights 1: losses -min(2, 1.3) twice and -min(.5, .8) twice = -3.6. The first is clipped: no gradient; the second's
    tokens have -.5 each."""
    logps, old_logps = ratios([4.0, 1.0, 7.0], [0.25, 1.0, 7.0])
    mask = torch.tensor([[True, True, False]] * 2)
    loss, stats = clipped_policy_loss(
        logps, old_logps, torch.ones(2), mask, mask.float(), clip_low=0.2, clip_high=0.3, level="sequence"
    )
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(-3.6))
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 0.0, 0.0], [-0.5, -0.5, 0.0]]))
    torch.testing.assert_close(stats.clip_fraction_high, torch.tensor(0.5))
    torch.testing.assert_close(stats.ratio_mean, torch.tensor(1.25))


def test_gspo_agrees_with_the_formula_of_trl():
    """TRL's ``importance_sampling_level="sequence"`` with the loss type ``grpo``: the ratio is one number a sequence,
    its gradient flows through the mean of the log-ratios."""
    logps, old_logps, advantages, mask = random_case(16, 7, seed=3)
    coefficient = (((logps - old_logps) * mask).sum(-1) / mask.sum(-1)).unsqueeze(-1).exp()
    gain = advantages.unsqueeze(1)
    per_token = -torch.min(coefficient * gain, torch.clamp(coefficient, 1 - 3e-2, 1 + 4e-2) * gain)
    published = ((per_token * mask).sum(-1) / mask.sum(-1)).mean()
    weights = token_weights(mask, "sequence_mean")
    loss, _ = clipped_policy_loss(
        logps, old_logps, advantages, mask, weights, clip_low=3e-2, clip_high=4e-2, level="sequence"
    )
    torch.testing.assert_close(loss, published)
    ours, theirs = torch.autograd.grad(loss, logps)[0], torch.autograd.grad(published, logps)[0]
    torch.testing.assert_close(ours, theirs)


def test_hand_worked_clipped_weights_go_on_learning():
    """A = 2, ratios 8 and 1, weights up to 5, log pi = -2 + log ratio: the gradient is -5 * 2 and -1 * 2, where PPO's
    clip would leave 0 and -2."""
    logps, old_logps = ratios([8.0, 1.0, 1.0])
    mask = torch.tensor([[True, True, False]])
    loss, stats = clipped_weight_loss(logps, old_logps, torch.tensor([2.0]), mask, mask.float())
    loss.backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[-10.0, -2.0, 0.0]]))
    torch.testing.assert_close(loss, torch.tensor(-10 * (math.log(8) - 2) + 4))
    torch.testing.assert_close(stats.clip_fraction, torch.tensor(0.5))


def test_cispo_agrees_with_the_formula_of_trl():
    """TRL: weights clamped from above only (its ``epsilon_high`` is the bound itself), detached, token mean."""
    logps, old_logps, advantages, mask = random_case(16, 7, seed=3)
    weight = torch.clamp((logps - old_logps).exp(), max=1.2).detach()
    published = (-weight * advantages.unsqueeze(1) * logps * mask).sum() / mask.sum()
    weights = token_weights(mask, "token_mean")
    loss, _ = clipped_weight_loss(logps, old_logps, advantages, mask, weights, clip_low=1.0, clip_high=0.2)
    torch.testing.assert_close(loss, published)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(published, logps)[0])


@pytest.mark.parametrize("loss_of", [clipped_policy_loss, clipped_weight_loss])
def test_on_policy_every_loss_has_the_gradient_of_reinforce(loss_of):
    logps, _, advantages, mask = random_case()
    weights = token_weights(mask, "sequence_mean")
    loss_of(logps, logps.detach(), advantages, mask, weights)[0].backward()
    torch.testing.assert_close(logps.grad, -weights * advantages[:, None])


@pytest.mark.parametrize("level", ["sequence", "weights"])
def test_masked_garbage_changes_neither_sequence_ratios_nor_clipped_weights(level):
    logps, old_logps, advantages, mask = random_case()
    weights = token_weights(mask, "token_mean")

    def loss_and_grad(logps: Tensor, old_logps: Tensor) -> tuple[Tensor, Tensor]:
        logps = logps.detach().requires_grad_()
        if level == "weights":
            loss, _ = clipped_weight_loss(logps, old_logps, advantages, mask, weights)
        else:
            loss, _ = clipped_policy_loss(logps, old_logps, advantages, mask, weights, level="sequence")
        return loss, torch.autograd.grad(loss, logps)[0]

    garbage = torch.tensor([math.inf, -math.inf, math.nan, 1e30]).repeat(8)[: logps.numel()].view_as(logps)
    clean = loss_and_grad(logps, old_logps)
    dirty = loss_and_grad(torch.where(mask, logps, garbage), torch.where(mask, old_logps, garbage.flip(1)))
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
