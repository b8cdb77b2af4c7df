"""Chunked log-probabilities are the softmax's, and so are their gradients."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.functional.logprobs import _chunk_rows, token_logprobs


@pytest.mark.parametrize("chunk_logits", [1, 130, 10_000], ids=["a row a chunk", "ragged chunks", "one chunk"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_log_softmax(chunk_logits: int, temperature: float):
    """Vocabulary of 40, so 130 logits make chunks of 3 rows, the last one of 2."""
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.randint(0, 40, (11,)), torch.randn(11, dtype=torch.float64)

    logps = token_logprobs(hidden, weight, targets, temperature, chunk_logits)
    gradients = torch.autograd.grad((logps * upstream).sum(), (hidden, weight))
    full = (hidden @ weight.T / temperature).log_softmax(dim=-1)
    expected = full.gather(1, targets[:, None]).squeeze(1)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))

    # The softmax itself is float32 whatever goes in.
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=0)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_frozen_output_matrix_gets_no_gradient_and_hidden_states_the_same(temperature: float):
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    targets, upstream = torch.tensor([0, 1, 2, 6, 0]), torch.randn(5)
    found = torch.autograd.grad(token_logprobs(hidden, weight, targets, temperature, 14), hidden, upstream)[0]
    full = (hidden @ weight.T / temperature).log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found, torch.autograd.grad(full, hidden, upstream)[0], atol=1e-5, rtol=1e-4)


def test_under_autocast_the_product_is_bfloat16_and_the_softmax_float32():
    hidden, weight, targets = torch.randn(5, 16), torch.randn(30, 16), torch.tensor([1, 2, 3, 4, 5])
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logprobs(hidden, weight, targets)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    expected = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected)


@pytest.mark.parametrize("width, rows", [(256, 110), (3584, 896)], ids=["64 MB of logits", "a quarter of the width"])
def test_chunks_of_wide_models_are_longer_for_each_adds_to_the_gradient_of_the_whole_matrix(width: int, rows: int):
    assert _chunk_rows(torch.empty(151_936, width, device="meta"), None) == rows


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_divides_into_nothing_is_refused(temperature: float):
    with pytest.raises(ValueError, match="temperature=.* must be above 0; what was drawn greedily is scored with 1"):
        token_logprobs(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), temperature)
