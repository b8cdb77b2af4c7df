"""Packed groups give the log-probabilities and gradients of separate sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cpt_lightning.models.adapters import Lora, add_lora, freeze
from cpt_lightning.models.qwen_vl import QwenVL, encode_images
from cpt_lightning.rollouts import completion_logprobs, run_prompts
from cpt_lightning.types import Completions, Prompts
from tests.naive import naive_logprobs, random_completions

ORDINARY_TOKENS = 256
SINGLE_IMAGE, TEXT_ONLY, MULTI_IMAGE, MIXED = [0], [1], [2], [0, 1, 2, 3]


def gradients(model: QwenVL, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal_to_naive(model: QwenVL, prompts: Prompts, group_size: int, keep_state: bool = False) -> None:
    """float32: 1e-5 absolute on log-probabilities, 1e-4 relative on the gradient of every trained parameter."""
    generator = torch.Generator().manual_seed(1)
    completions = random_completions(len(prompts) * group_size, 7, ORDINARY_TOKENS, generator)
    weights = torch.rand(completions.ids.shape, generator=generator)

    kept = replace(prompts, state=run_prompts(model, prompts)) if keep_state else prompts
    packed = completion_logprobs(model, kept, completions)
    naive = naive_logprobs(model, prompts, completions)

    assert naive.abs().max() > 1
    torch.testing.assert_close(packed, naive, atol=1e-5, rtol=0)
    packed_gradients = gradients(model, (packed * weights).sum())
    naive_gradients = gradients(model, (naive * weights).sum())
    assert packed_gradients.keys() == naive_gradients.keys()
    for name, gradient in naive_gradients.items():
        # k_proj.bias shifts all logits of a query alike, so its gradient is rounding error around 0: hence the floor.
        error = (packed_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize(
    "rows", [SINGLE_IMAGE, TEXT_ONLY, MULTI_IMAGE, MIXED], ids=["single", "text", "multi", "mixed"]
)
def test_packed_groups_equal_a_naive_forward_per_completion(
    small_model: QwenVL, mixed_prompts: Prompts, rows: list[int], group_size: int
):
    assert_equal_to_naive(small_model, mixed_prompts.select(rows), group_size)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("group_size", [1, 3])
def test_within_pefts_wrapper_the_model_is_refused_and_behind_it_scores(
    small_model: QwenVL, mixed_prompts: Prompts, group_size: int
):
    wrapped = get_peft_model(small_model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    completions = random_completions(len(mixed_prompts) * group_size, 3, ORDINARY_TOKENS, torch.Generator())
    with pytest.raises(TypeError, match=r"the model is a PeftModel; .* get_base_model\(\), .* backbone.tuning=lora"):
        completion_logprobs(wrapped, mixed_prompts, completions)
    assert_equal_to_naive(wrapped.get_base_model(), mixed_prompts, group_size)


@pytest.mark.parametrize("group_size", [1, 3])
def test_a_kept_state_of_the_prompts_carries_the_gradient(small_model: QwenVL, mixed_prompts: Prompts, group_size: int):
    """The rollout's pass over prompts and images may be the update's: no second one, the same gradients."""
    assert_equal_to_naive(small_model, mixed_prompts, group_size, keep_state=True)


def test_a_kept_state_can_be_selected_from(small_model: QwenVL, mixed_prompts: Prompts):
    """Rows 1 and 0, of which the longer one has less padding than the batch had."""
    completions = random_completions(8, 5, ORDINARY_TOKENS, torch.Generator().manual_seed(0)).select([2, 3, 0, 1])
    kept = replace(mixed_prompts, state=run_prompts(small_model, mixed_prompts)).select([1, 0])
    assert kept.input_ids.shape[1] < mixed_prompts.input_ids.shape[1]
    found = completion_logprobs(small_model, kept, completions)
    expected = naive_logprobs(small_model, mixed_prompts.select([1, 0]), completions)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keep_state", [False, True], ids=["computed again", "kept"])
def test_packed_groups_equal_naive_with_gradient_checkpointing(
    small_model: QwenVL, mixed_prompts: Prompts, keep_state: bool
):
    for part in (small_model.model.visual, small_model.model.language_model):
        getattr(part, "activation_checkpointing_enable", part.gradient_checkpointing_enable)({"use_reentrant": False})
    assert_equal_to_naive(small_model.train(), mixed_prompts, 3, keep_state)


def test_packed_groups_equal_naive_with_lora(small_model: QwenVL, mixed_prompts: Prompts):
    """Adapters on every linear layer of all three parts, with B no longer at its initial zero."""
    add_lora(small_model, Lora(rank=4, parts=["language_model", "vision_tower", "projector"]))
    for name, weight in small_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    assert_equal_to_naive(small_model, mixed_prompts, 3)


def test_packed_groups_equal_naive_with_a_frozen_vision_tower(small_model: QwenVL, mixed_prompts: Prompts):
    freeze(small_model, ["vision_tower"])
    assert_equal_to_naive(small_model, mixed_prompts, 3)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_stays_near_float32(small_model: QwenVL, mixed_prompts: Prompts, how: str):
    """bfloat16 keeps 8 bits, so a logit around 10 is off by some hundredths: 0.15 at most, 0.03 on average.

    transformers' own forward in bfloat16 is held to the same bounds, so they are the number format's, not ours.
    """
    completions = random_completions(12, 7, ORDINARY_TOKENS, torch.Generator().manual_seed(1))
    exact = completion_logprobs(small_model, mixed_prompts, completions).detach()
    if how == "weights":
        small_model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.no_grad():
        errors = [
            (logprobs.float() - exact)[completions.mask].abs()
            for logprobs in (
                completion_logprobs(small_model, mixed_prompts, completions),
                naive_logprobs(small_model, mixed_prompts, completions),
            )
        ]
    for error in errors:
        assert 0 < error.max() < 0.15 and error.mean() < 0.03, (error.max(), error.mean())


def test_a_temperature_divides_the_logits(small_model: QwenVL, mixed_prompts: Prompts):
    prompts = mixed_prompts.select(TEXT_ONLY)
    completion = Completions(torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool))
    logits = small_model(input_ids=prompts.input_ids).logits[0, -1]
    scored = completion_logprobs(small_model, prompts, completion, temperature=0.5)
    torch.testing.assert_close(scored[0, 0], (logits / 0.5).log_softmax(dim=-1)[5], atol=1e-5, rtol=0)


def test_image_features_kept_from_the_rollout_give_the_same_result(small_model: QwenVL, mixed_prompts: Prompts):
    prompts = replace(mixed_prompts, image_features=encode_images(small_model, mixed_prompts).detach())
    completions = random_completions(8, 5, ORDINARY_TOKENS, torch.Generator().manual_seed(0))
    expected = completion_logprobs(small_model, mixed_prompts, completions)
    torch.testing.assert_close(completion_logprobs(small_model, prompts, completions), expected)
    some = completion_logprobs(small_model, prompts.select([1, 3]), completions.select([2, 3, 6, 7]))
    torch.testing.assert_close(some, expected[[2, 3, 6, 7], : some.shape[1]], atol=1e-5, rtol=0)


def test_groups_of_single_tokens_need_no_pass_but_the_prompts(small_model: QwenVL, mixed_prompts: Prompts):
    completions = Completions(torch.tensor([[5], [6]] * 4), torch.ones(8, 1, dtype=torch.bool))
    found = completion_logprobs(small_model, mixed_prompts, completions)
    torch.testing.assert_close(found, naive_logprobs(small_model, mixed_prompts, completions), atol=1e-5, rtol=0)


def test_completions_that_do_not_fit_the_prompts_are_refused(small_model: QwenVL, mixed_prompts: Prompts):
    completions = random_completions(5, 2, ORDINARY_TOKENS, torch.Generator())
    with pytest.raises(ValueError, match="5 completions cannot be split evenly over 4 prompts"):
        completion_logprobs(small_model, mixed_prompts, completions)
