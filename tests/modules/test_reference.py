"""With adapters the policy of the task's start is the policy with other adapters, not a second model."""

import pytest
import torch

from cpt_lightning.models import Lora, load_backbone
from cpt_lightning.models.adapters import adapter_weights
from cpt_lightning.modules.reference import Reference
from tests.naive import naive_logprobs, random_completions


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
@torch.no_grad()
def test_the_adapters_of_the_tasks_start_are_kept_and_the_policys_come_back(small_folder, mixed_prompts, tuning):
    model, _ = load_backbone(small_folder, tuning=tuning, lora=Lora(rank=2))
    completions = random_completions(4, 3, 100, torch.Generator())
    reference = Reference(model, "task_start")
    for weight in adapter_weights(model):
        weight.add_(0.1)
    at_start = naive_logprobs(model, mixed_prompts, completions)
    reference.renew(model)
    for weight in adapter_weights(model):
        weight.add_(0.1)
    learned = naive_logprobs(model, mixed_prompts, completions)
    with reference.model(model) as then:
        torch.testing.assert_close(naive_logprobs(then, mixed_prompts, completions), at_start, atol=1e-5, rtol=1e-5)
    assert (learned - at_start).abs().max() > 1e-2
    assert torch.equal(naive_logprobs(model, mixed_prompts, completions), learned)
    assert reference.copy is None
    assert sum(each.numel() for each in reference.parameters()) == sum(each.numel() for each in adapter_weights(model))
