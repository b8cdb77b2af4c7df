"""Windows of the vision tower in one call; and the model without a pattern is the one transformers knows."""

from __future__ import annotations

import torch

from cpt_lightning.models.decoder import use_patterns
from cpt_lightning.models.qwen_vl import QwenVL, encode_images
from cpt_lightning.models.vision import use_fast_vision
from cpt_lightning.types import Prompts


def test_image_features_are_those_of_transformers(small_model: QwenVL, mixed_prompts: Prompts):
    """Four images of different sizes: windows of 4 x 4 and, at the edges, of fewer patches; gradients too."""
    images = (mixed_prompts.pixel_values, mixed_prompts.image_grid_thw)

    def features() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        small_model.zero_grad()
        output = torch.cat(small_model.model.get_image_features(*images, return_dict=True).pooler_output)
        (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
        return output.detach(), {name: p.grad.clone() for name, p in small_model.model.visual.named_parameters()}

    small_model.set_attn_implementation("eager")
    expected, expected_gradient = features()
    use_fast_vision(small_model)
    found, gradient = features()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert {"patch_embed.proj.weight", "blocks.0.norm1.weight"} <= set(gradient)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encode_images(small_model, mixed_prompts), expected, atol=1e-5, rtol=1e-5)


def test_without_a_pattern_the_model_computes_what_it_always_did(small_model: QwenVL, mixed_prompts: Prompts):
    """Left-padded prompts through transformers' own forward, before and after."""
    inputs = {
        "input_ids": mixed_prompts.input_ids,
        "attention_mask": mixed_prompts.attention_mask,
        "pixel_values": mixed_prompts.pixel_values,
        "image_grid_thw": mixed_prompts.image_grid_thw,
        "mm_token_type_ids": (mixed_prompts.input_ids == small_model.config.image_token_id).int(),
    }
    mask = mixed_prompts.attention_mask.bool()
    small_model.set_attn_implementation("eager")
    expected = small_model(**inputs).logits[mask]
    use_patterns(small_model)
    torch.testing.assert_close(small_model(**inputs).logits[mask], expected, atol=1e-4, rtol=0)
