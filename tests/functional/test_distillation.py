"""The divergence of whole distributions, against torch's own on full logits."""

import pytest
import torch
from torch.nn.functional import kl_div

from cpt_lightning.functional.distillation import forward_kl


@pytest.mark.parametrize("chunk_logits", [1, 50, 10**6], ids=["a row at a time", "chunks", "all at once"])
def test_value_and_gradients_are_torchs_on_full_logits(chunk_logits):
    hidden, weight, ref_hidden, ref_weight = (
        torch.randn(rows, 5, dtype=torch.float32, requires_grad=True) for rows in (7, 11, 7, 11)
    )
    ours = forward_kl(hidden, weight, ref_hidden.detach(), ref_weight.detach(), chunk_logits)
    logps, ref_logps = ((h @ w.T).log_softmax(dim=1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    theirs = kl_div(logps, ref_logps.detach(), reduction="none", log_target=True).sum(dim=1)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(kl.square().sum(), [hidden, weight]) for kl in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_two_tokens_by_hand():
    """Logits [0, 0] against [ln 3, 0]: p = [3/4, 1/4], q = [1/2, 1/2]: .75 ln 1.5 + .25 ln .5 = .1308."""
    kl = forward_kl(torch.zeros(1, 2), torch.eye(2), torch.tensor([[3.0, 1.0]]).log(), torch.eye(2))
    assert kl.item() == pytest.approx(0.130812, abs=1e-5)


def test_a_model_does_not_diverge_from_itself():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
    kl = forward_kl(hidden, weight, hidden.detach(), weight)
    assert kl.abs().max().item() < 1e-6
    assert torch.autograd.grad(kl.sum(), hidden)[0].abs().max().item() < 1e-6
