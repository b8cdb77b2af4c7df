"""SFT's loss is transformers' own, and its rows and tokens weigh what is said."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.functional import forward_kl
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


def test_without_a_kl_term_no_reference_is_made_and_with_one_the_policy_stays_near(
    small_folder, processor, mixed_prompts
):
    """The model diverges less from its start with a KL term; the first step, from the start itself, has none."""
    batch, ends, shown = with_examples(mixed_prompts, processor), {}, {}
    for kl_coef in (0.0, 20.0):
        module = SFT(backbone=Backbone(small_folder), optimizer=sgd, kl_coef=kl_coef)
        module.configure_model()
        start = weights(module)
        trainer = fit(module, [batch] * 5)
        ends[kl_coef], shown[kl_coef] = largest_difference(start, weights(module)), trainer.callback_metrics
        assert ("reference" in module._modules) == (kl_coef > 0)
    assert "train/forward_kl" not in shown[0.0]
    assert shown[20.0]["train/forward_kl"] > 0
    assert ends[20.0] < ends[0.0]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("reference", ["task_start", "base"])
def test_the_divergence_is_that_of_naive_forwards(small_folder, processor, mixed_prompts, reference, tuning):
    """After one step and a new task: zero from the task's start, and that of two naive softmaxes from the base."""
    batch = with_examples(mixed_prompts, processor)
    module = SFT(backbone=Backbone(small_folder, tuning=tuning), optimizer=sgd, kl_coef=1.0, reference=reference)
    fit(module, [batch] * 3)
    start, now = SFT(backbone=Backbone(small_folder)), module.model
    start.configure_model()
    full = [all_logits(model, batch).log_softmax(dim=-1) for model in (start.model, now)]
    expected = (full[0].exp() * (full[0] - full[1])).sum(dim=-1) * batch.targets.mask
    with torch.no_grad():
        found = module.logps_and_divergence(batch.prompts, batch.targets, forward_kl)[1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        module.reference.renew(module.model)
        again = module.logps_and_divergence(batch.prompts, batch.targets, forward_kl)[1]
    assert expected.max() > 1e-4
    assert (again.abs().max() < 1e-6) == (reference == "task_start")


def all_logits(model, batch) -> torch.Tensor:
    """``[B, T, V]`` at the tokens of the targets, by the padded forward of transformers."""
    prompts, targets = batch.prompts, batch.targets
    ids = torch.cat([prompts.input_ids, targets.ids], dim=1)
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat([prompts.attention_mask, targets.mask.long()], dim=1),
            pixel_values=prompts.pixel_values,
            image_grid_thw=prompts.image_grid_thw,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
        ).logits
    return logits[:, prompts.input_ids.shape[1] - 1 : -1]
