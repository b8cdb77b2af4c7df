"""SFT's loss is transformers' own, and its rows and tokens weigh what is said."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.models import Backbone
from cpt_lightning.modules import SFT
from cpt_lightning.types import Batch
from tests.naive import naive_logprobs
from tests.training import fit, largest_difference, sgd, weights, with_examples


def test_token_mean_loss_is_transformers_own_loss(small_folder, processor, mixed_prompts):
    """One padded batch of prompt and target, labels -100 outside the targets, through the model's own loss."""
    batch = with_examples(mixed_prompts, processor)
    module = SFT(reduction="token_mean", backbone=Backbone(small_folder), optimizer=sgd)
    module.configure_model()
    prompts, targets = batch.prompts, batch.targets
    ids = torch.cat([prompts.input_ids, targets.ids], dim=1)
    ignored = torch.full_like(prompts.input_ids, -100)
    expected = module.model(
        input_ids=ids,
        attention_mask=torch.cat([prompts.attention_mask, targets.mask.long()], dim=1),
        labels=torch.cat([ignored, targets.ids.masked_fill(~targets.mask, -100)], dim=1),
        pixel_values=prompts.pixel_values,
        image_grid_thw=prompts.image_grid_thw,
        mm_token_type_ids=(ids == module.model.config.image_token_id).int(),
    ).loss
    shown = fit(module, [batch]).callback_metrics["train/loss"]
    torch.testing.assert_close(shown, expected.detach(), atol=1e-5, rtol=0)


def test_sequence_mean_gives_every_row_the_same_weight(small_folder, processor, mixed_prompts):
    """Mean over rows of each row's mean negative log-likelihood, from naive forwards of the untouched model."""
    batch = with_examples(mixed_prompts, processor)
    module = SFT(backbone=Backbone(small_folder), optimizer=sgd)
    module.configure_model()
    logps = naive_logprobs(module.model, batch.prompts, batch.targets)
    expected = -(logps.sum(dim=1) / batch.targets.lengths).mean()
    shown = fit(module, [batch]).callback_metrics["train/loss"]
    torch.testing.assert_close(shown, expected.detach(), atol=1e-5, rtol=0)


def test_fitting_raises_the_probability_of_the_targets(small_folder, processor, mixed_prompts):
    batch = with_examples(mixed_prompts, processor)
    module = SFT(backbone=Backbone(small_folder), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    module.configure_model()
    before = naive_logprobs(module.model, batch.prompts, batch.targets).sum()
    fit(module, [batch] * 10)
    assert naive_logprobs(module.model, batch.prompts, batch.targets).sum() > before + 10


@pytest.mark.parametrize("part", ["vision_tower", "projector", "language_model"])
def test_frozen_parts_stay_bit_identical_and_the_others_learn(small_folder, processor, mixed_prompts, part):
    from cpt_lightning.models.adapters import parts_of

    module = SFT(backbone=Backbone(small_folder, freeze=[part]), optimizer=sgd)
    module.configure_model()
    before = weights(module)
    fit(module, [with_examples(mixed_prompts, processor)] * 2)
    after = weights(module)
    names = {id(weight): name for name, weight in module.model.named_parameters()}
    frozen = {names[id(weight)] for each in parts_of(module.model)[part] for weight in each.parameters()}
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in set(before) - frozen)


def test_gradient_checkpointing_changes_nothing_but_memory(small_folder, processor, mixed_prompts):
    results = []
    for parts in ([], ["vision_tower", "language_model"]):
        module = SFT(backbone=Backbone(small_folder, gradient_checkpointing=parts), optimizer=sgd)
        fit(module, [with_examples(mixed_prompts, processor)] * 2)
        results.append(weights(module))
    assert largest_difference(*results) < 1e-6


def test_a_row_without_a_target_is_named(small_folder, processor, mixed_prompts):
    batch = with_examples(mixed_prompts, processor)
    batch.prompts.examples[2].target = None
    with pytest.raises(ValueError, match="row demo/2 of task 'demo' has no target"):
        fit(SFT(backbone=Backbone(small_folder)), [Batch(batch.prompts)])


def test_a_gradient_that_is_not_finite_changes_nothing_and_several_stop_the_run(small_folder, processor, mixed_prompts):
    class Broken(SFT):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    module = Broken(backbone=Backbone(small_folder))
    module.configure_model()
    before = weights(module)
    batch = with_examples(mixed_prompts, processor)
    fit(module, [batch] * 4)
    assert largest_difference(before, weights(module)) == 0
    with pytest.raises(FloatingPointError, match="5 steps in a row had a gradient that is not finite"):
        fit(Broken(backbone=Backbone(small_folder)), [batch] * 5)


def test_clipping_by_the_trainer_is_refused_in_favour_of_the_modules_own(small_folder, processor, mixed_prompts):
    with pytest.raises(ValueError, match="max_grad_norm"):
        fit(SFT(backbone=Backbone(small_folder)), [with_examples(mixed_prompts, processor)], gradient_clip_val=1.0)
