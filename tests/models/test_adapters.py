"""Adapters bind: what they hold reaches the model's outputs, from every part that can have them."""

import pytest
import torch

from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import Lora, adapter_weights, adapters_off
from cpt_lightning.models.qwen_vl import encode_images
from cpt_lightning.rollouts import completion_logprobs
from tests.training import with_examples


@pytest.mark.parametrize("part", ["language_model", "vision_tower", "projector"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_every_part_alone_move_what_comes_behind_it(small_folder, processor, mixed_prompts, part, use_dora):
    """Fresh ones leave the base bit for bit what it was (DoRA: but for rounding); each layer's own B moves it."""
    batch = with_examples(mixed_prompts, processor)
    lora = Lora(rank=2, parts=[part], use_dora=use_dora)
    model = Backbone(small_folder, tuning="lora", lora=lora).load_model().eval()
    base = Backbone(small_folder).load_model().eval()

    def outputs(of):
        return completion_logprobs(of, batch.prompts, batch.targets), encode_images(of, batch.prompts)

    with torch.no_grad():
        before = outputs(base)
        for fresh, expected in zip(outputs(model), before, strict=True):
            torch.testing.assert_close(fresh, expected, rtol=0, atol=1e-5 if use_dora else 0)
        names = [name for name, _ in model.named_parameters() if "lora_B" in name]
        assert names and sum(weight.requires_grad for weight in model.parameters()) == len(adapter_weights(model))
        for name in names:
            weight = model.get_parameter(name)
            weight.data.normal_()
            logps, features = outputs(model)
            assert (logps - before[0]).abs().max() > 1e-4, name
            assert torch.equal(features, before[1]) == (part == "language_model"), name
            weight.data.zero_()
        for name in names:
            model.get_parameter(name).data.normal_()
        with adapters_off(model):
            assert all(torch.equal(now, then) for now, then in zip(outputs(model), before, strict=True))
