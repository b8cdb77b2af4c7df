"""Packed groups give the log-probabilities and gradients of separate sequences."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.rollouts import completion_logprobs
from cpt_lightning.rollouts.packing import GroupLayout
from cpt_lightning.types import Completions, Prompts
from tests.naive import naive_logprobs, random_completions

ORDINARY_TOKENS = 256
SINGLE_IMAGE, TEXT_ONLY, MULTI_IMAGE, MIXED = [0], [1], [2], [0, 1, 2, 3]


def gradients(model: QwenVL, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "rows", [SINGLE_IMAGE, TEXT_ONLY, MULTI_IMAGE, MIXED], ids=["single", "text", "multi", "mixed"]
)
def test_packed_groups_equal_a_naive_forward_per_completion(
    small_model: QwenVL, mixed_prompts: Prompts, rows: list[int], implementation: str
):
    """float32: 1e-5 absolute on log-probabilities, 1e-4 relative on the gradient of every parameter."""
    small_model.set_attn_implementation(implementation)
    prompts, group_size = mixed_prompts.select(rows), 3
    generator = torch.Generator().manual_seed(1)
    completions = random_completions(len(rows) * group_size, 7, ORDINARY_TOKENS, generator)
    weights = torch.rand(completions.ids.shape, generator=generator)

    packed = completion_logprobs(small_model, prompts, completions).logps
    naive = naive_logprobs(small_model, prompts, completions)

    assert naive.abs().max() > 1
    torch.testing.assert_close(packed, naive, atol=1e-5, rtol=0)
    packed_gradients = gradients(small_model, (packed * weights).sum())
    naive_gradients = gradients(small_model, (naive * weights).sum())
    assert packed_gradients.keys() == naive_gradients.keys()
    for name, gradient in naive_gradients.items():
        # k_proj.bias shifts all logits of a query alike, so its gradient is rounding error around 0: hence the floor.
        error = (packed_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_entropy_is_that_of_the_distribution_at_each_token(small_model: QwenVL, mixed_prompts: Prompts):
    """The first token of every completion of a text-only prompt comes from one distribution: the plain model's."""
    prompts = mixed_prompts.select(TEXT_ONLY)
    completions = random_completions(2, 4, ORDINARY_TOKENS, torch.Generator().manual_seed(0))
    entropies = completion_logprobs(small_model, prompts, completions).entropies
    logps = small_model(input_ids=prompts.input_ids).logits[0, -1].log_softmax(dim=-1)
    expected = -(logps.exp() * logps).sum()
    torch.testing.assert_close(entropies[:, 0], expected.expand(2), atol=1e-5, rtol=0)
    assert (entropies[~completions.mask] == 0).all()


def test_a_temperature_divides_the_logits(small_model: QwenVL, mixed_prompts: Prompts):
    prompts = mixed_prompts.select(TEXT_ONLY)
    completion = Completions(torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool))
    logits = small_model(input_ids=prompts.input_ids).logits[0, -1]
    scored = completion_logprobs(small_model, prompts, completion, temperature=0.5)
    torch.testing.assert_close(scored.logps[0, 0], (logits / 0.5).log_softmax(dim=-1)[5], atol=1e-5, rtol=0)


def test_image_features_kept_from_the_rollout_give_the_same_result(small_model: QwenVL, mixed_prompts: Prompts):
    from dataclasses import replace

    from cpt_lightning.models.qwen_vl import encode_images

    prompts = replace(mixed_prompts, image_features=encode_images(small_model, mixed_prompts).detach())
    completions = random_completions(8, 5, ORDINARY_TOKENS, torch.Generator().manual_seed(0))
    expected = completion_logprobs(small_model, mixed_prompts, completions).logps
    torch.testing.assert_close(completion_logprobs(small_model, prompts, completions).logps, expected)
    some = completion_logprobs(small_model, prompts.select([1, 3]), completions.select([2, 3, 6, 7])).logps
    torch.testing.assert_close(some, expected[[2, 3, 6, 7], : some.shape[1]], atol=1e-5, rtol=0)


def test_the_layout_of_a_hand_packed_group():
    """One prompt of 2 tokens behind 1 padding, completions of 3 and 1 tokens.

    Columns: padding, p0, p1, a0, a1 (a2 and b0 predict nothing and have no place). a0 and b0 are predicted by p1 in
    column 2, a1 by column 3, a2 by column 4. a0 sees p0, p1 and itself; the prompt's last position is 7, so a0 is at 8.
    """
    prompts = Prompts(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 1, 1]]), [0])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    layout = GroupLayout.of(prompts, mask)
    assert layout.branch.tolist() == [[-1, 0, 0, 1, 1]]
    assert layout.source.tolist() == [2, 3, 4, 2]
    assert layout.inputs.tolist() == [True, True, False, False]
    seen = layout.tree_mask()[0, 0]
    assert seen[3].tolist() == [False, True, True, True, False]
    assert seen[0].tolist() == [True, False, False, False, False]
    positions = layout.positions(torch.tensor([0, 6, 7]).expand(3, 1, 3))
    assert positions[:, 0].tolist() == [[0, 6, 7, 8, 9]] * 3


def test_completions_that_do_not_fit_the_prompts_are_refused(small_model: QwenVL, mixed_prompts: Prompts):
    completions = random_completions(5, 2, ORDINARY_TOKENS, torch.Generator())
    with pytest.raises(ValueError, match="5 completions cannot be split evenly over 4 prompts"):
        completion_logprobs(small_model, mixed_prompts, completions)
