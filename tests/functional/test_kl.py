"""KL estimators against hand calculations, the exact divergence of small distributions, and its gradients."""

import math

import pytest
import torch
from torch import Tensor

from cpt_lightning.functional import divergences, kl_full, kl_k1, kl_k2, kl_k3


def test_hand_worked_estimates():
    """pi 1/2, reference 1/4: d = log(1/2) = -.693147, so k1 = .693147, k2 = .240227, k3 = 1/2 + .693147 - 1 = .193147.
    pi 1/4, reference 1/2: d = .693147, so k1 = -.693147, k2 the same, k3 = 2 - .693147 - 1 = .306853."""
    logps, ref_logps = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    torch.testing.assert_close(kl_k1(logps, ref_logps), torch.tensor([[0.693147, -0.693147]]))
    torch.testing.assert_close(kl_k2(logps, ref_logps), torch.tensor([[0.240227, 0.240227]]))
    torch.testing.assert_close(kl_k3(logps, ref_logps), torch.tensor([[0.193147, 0.306853]]))


@pytest.fixture
def distributions() -> tuple[Tensor, Tensor]:
    """Log-probabilities over a vocabulary of 7, policy and reference, in float64."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 1, 7, generator=generator, dtype=torch.float64)
    policy, reference = logits.log_softmax(dim=-1)
    return policy.requires_grad_(), reference


def test_the_policys_expectation_of_k1_and_k3_is_the_kl(distributions):
    policy, reference = distributions
    exact = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    for estimate in (kl_k1, kl_k3):
        expectation = (policy.exp() * estimate(policy, reference)).sum()
        torch.testing.assert_close(expectation, exact)


@pytest.mark.parametrize("estimate, reverse", [(kl_k2, False), (kl_k3, True)])
def test_on_policy_k2_has_the_gradient_of_the_kl_and_k3_that_of_the_reverse_kl(distributions, estimate, reverse):
    """As a loss on sampled tokens the sampling probabilities are constants."""
    logits, reference = distributions[0].detach().requires_grad_(), distributions[1]
    policy = logits.log_softmax(dim=-1)
    (expected,) = torch.autograd.grad((policy.exp().detach() * estimate(policy, reference)).sum(), logits)
    policy = logits.log_softmax(dim=-1)
    log_ratio = policy - reference
    exact = -(reference.exp() * log_ratio).sum() if reverse else (policy.exp() * log_ratio).sum()
    torch.testing.assert_close(expected, torch.autograd.grad(exact, logits)[0])


def test_k3_of_nearly_equal_policies_keeps_its_digits_in_float32():
    """d = -1e-4: k3 = d^2/2 + d^3/6 = 5e-9 - 1.7e-13; exp(d) - d - 1 evaluated in float32 gives 0 or 6e-8 instead."""
    result = kl_k3(torch.full((1, 1), 1e-4), torch.zeros(1, 1))
    torch.testing.assert_close(result, torch.full((1, 1), 4.99983e-9), rtol=5e-3, atol=0)


@pytest.mark.parametrize("estimate", [kl_k1, kl_k2, kl_k3])
def test_masked_garbage_gives_zero_and_no_gradient(estimate):
    logps = torch.tensor([[-1.0, -math.inf, math.nan, 1e30]], requires_grad=True)
    ref_logps = torch.tensor([[-2.0, 0.0, -math.inf, -1e30]])
    mask = torch.tensor([[True, False, False, False]])
    result = estimate(logps, ref_logps, mask)
    result.sum().backward()
    assert torch.equal(result[0, 1:], torch.zeros(3)) and torch.equal(logps.grad[0, 1:], torch.zeros(3))
    torch.testing.assert_close(result[:, :1], estimate(logps[:, :1], ref_logps[:, :1]))


def test_k3_far_from_the_reference_stays_finite_with_its_gradient():
    logps = torch.tensor([[-200.0, -0.1]], requires_grad=True)
    result = kl_k3(logps, torch.tensor([[-0.1, -200.0]]))
    result.sum().backward()
    assert result.isfinite().all() and logps.grad.isfinite().all()


@pytest.mark.parametrize("estimate", [kl_k1, kl_k2, kl_k3])
def test_half_precision_is_computed_in_float32(estimate):
    logps, ref_logps = torch.tensor([[-10.1]]).bfloat16(), torch.tensor([[-9.7]]).bfloat16()
    result = estimate(logps, ref_logps)
    assert result.dtype == torch.float32
    assert torch.equal(result, estimate(logps.float(), ref_logps.float()))


@pytest.mark.parametrize("chunk_logits", [1, 3 * 11, 10**6], ids=["a row", "three rows", "at once"])
def test_the_full_kl_and_its_gradients_are_torchs_whatever_the_chunks(chunk_logits):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=generator).requires_grad_() for n in (7, 11))
    ref_hidden, ref_weight = (torch.randn(n, 6, generator=generator) for n in (7, 11))
    ours = kl_full(hidden, weight, ref_hidden, ref_weight, temperature=0.7, chunk_logits=chunk_logits)
    policy = (hidden @ weight.T / 0.7).log_softmax(dim=-1)
    reference = (ref_hidden @ ref_weight.T / 0.7).log_softmax(dim=-1)
    exact = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="none").sum(dim=-1)
    torch.testing.assert_close(ours, exact)
    slope = torch.randn(7, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (hidden, weight), slope),
        torch.autograd.grad(exact, (hidden, weight), slope),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_hand_worked_full_kl():
    """Policy 3/4 and 1/4, reference 1/2 and 1/2: 3/4 log 3/2 + 1/4 log 1/2 = .130812."""
    result = kl_full(torch.eye(1), torch.tensor([[math.log(3.0)], [0.0]]), torch.eye(1), torch.zeros(2, 1))
    torch.testing.assert_close(result, torch.tensor([0.130812]))


def test_divergences_of_two_tokens_by_hand():
    """Policy (.4, .6), reference (.75, .25): KL(reference || policy) = .75 ln(.75/.4) + .25 ln(.25/.6) = .252589,
    KL(policy || reference) = .4 ln(.4/.75) + .6 ln(.6/.25) = .273838, total variation .35, other favourites. Then twice
    the same distribution, whose logits differ by a constant."""
    logits = torch.tensor([[0.4, 0.6], [0.2, 0.8], [0.5, 0.5]]).log()
    ref_logits = torch.tensor([[0.75, 0.25], [0.2, 0.8], [0.5, 0.5]]).log() + torch.tensor([[0.0], [3.0], [0.0]])
    for chunk_logits in (2, 4, 100):
        found = divergences(logits, torch.eye(2), ref_logits, torch.eye(2), chunk_logits=chunk_logits)
        expected = [[0.252589, 0, 0], [0.273838, 0, 0], [0.35, 0, 0], [0, 1, 1]]
        torch.testing.assert_close(torch.stack(found), torch.tensor(expected), atol=1e-6, rtol=0)
