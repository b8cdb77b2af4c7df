"""L2 to the start: its gradient by hand, once per optimizer step, before clipping, under every objective."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from cpt_lightning.callbacks import EWC, L2, ModelMerging
from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import Lora
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.rollouts import Sampling
from tests.callbacks.analysis.test_gradient_risk import fit as fit_stream
from tests.training import fit, largest_difference, sgd, weights, with_examples


class Scalar(L.LightningModule):
    """One weight, whose loss has the gradient -1 at every batch; records the gradient of every step."""

    def __init__(self, manual: bool = False, steps_per_batch: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.steps_per_batch = steps_per_batch
        self.weight = nn.Parameter(torch.zeros(1))
        self.gradients: list[float] = []

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return -self.weight.sum()
        for _ in range(self.steps_per_batch):
            self.manual_backward(-self.weight.sum())
            self.optimizers().step()
            self.optimizers().zero_grad()
        return None

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.weight.grad.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def validation_step(self, batch, batch_idx):
        return None


def scalar_fit(module, callback, epochs=1, batches=2, **options):
    return fit(module, [torch.zeros(1)] * batches, max_epochs=epochs, callbacks=[callback], **options)


@pytest.mark.parametrize("module", [Scalar(), Scalar(manual=True)], ids=["automatic", "manual"])
def test_the_pull_is_strength_times_the_distance(module):
    """lr .5, loss -w, strength .4, start 0. Step 1: gradient -1, w = .5; step 2: -1 + .4 * .5 = -.8, w = .9.

    The penalty before step 2 is .4 / 2 * .5^2 = .05.
    """
    trainer = scalar_fit(module, L2(0.4))
    assert module.gradients == pytest.approx([-1.0, -0.8])
    assert module.weight.item() == pytest.approx(0.9)
    assert trainer.callback_metrics["train/l2"].item() == pytest.approx(0.05)


@pytest.mark.parametrize(
    "anchor, gradients", [("task_start", [-1, -0.8, -1, -0.8]), ("base", [-1, -0.8, -0.64, -0.512])]
)
def test_the_anchor_is_the_tasks_start_or_the_base(anchor, gradients):
    """As above; the second task begins at .9, from where the pull to the base is .4 * .9 = .36, then .4 * 1.22."""
    module = Scalar()
    scalar_fit(module, L2(0.4, anchor), epochs=2)
    assert module.gradients == pytest.approx(gradients)


def test_accumulated_batches_are_one_step_and_have_one_pull():
    """Four batches in two steps: the same two steps as above."""
    module = Scalar()
    scalar_fit(module, L2(0.4), batches=4, accumulate_grad_batches=2)
    assert module.gradients == pytest.approx([-1.0, -0.8])


def test_every_step_of_a_batch_has_its_pull():
    """Two steps in each of two batches: -1, -1 + .2, then w = .9: -1 + .36, then w = 1.22: -1 + .488."""
    module = Scalar(manual=True, steps_per_batch=2)
    scalar_fit(module, L2(0.4))
    assert module.gradients == pytest.approx([-1, -0.8, -0.64, -0.512])


class Pull(L.Callback):
    """Adds a known gradient to every weight, as a penalty does."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)


OBJECTIVES = {
    "sft": partial(SFT),
    "rft": partial(RFT, group_size=2, sampling=Sampling(max_new_tokens=6)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_callbacks_add_is_clipped_and_shown_like_the_losss_gradient(
    small_folder, processor, mixed_prompts, objective
):
    """All gradients are 1: their norm is the root of their number n, so a step of lr .1 at norm 1 is .1 / sqrt(n)."""
    module = OBJECTIVES[objective](backbone=Backbone(small_folder), optimizer=sgd, max_grad_norm=1.0)
    module.configure_model()
    before, number = weights(module), sum(weight.numel() for weight in module.parameters())
    trainer = fit(module, [with_examples(mixed_prompts, processor)], callbacks=[Pull()])
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(number**0.5, rel=1e-4)
    assert trainer.callback_metrics["train/lr"].item() == pytest.approx(0.1)
    for name, weight in weights(module).items():
        torch.testing.assert_close(before[name] - weight, torch.full_like(weight, 0.1 / number**0.5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("strength", [0.0, 5.0])
def test_strength_0_changes_nothing_bit_for_bit_and_a_strong_pull_holds_back(
    small_folder, processor, mixed_prompts, objective, strength
):
    ends = {}
    for callbacks in ([], [L2(strength)]):
        module = OBJECTIVES[objective](backbone=Backbone(small_folder), optimizer=sgd, max_grad_norm=None)
        module.configure_model()
        start = weights(module)
        fit(module, [with_examples(mixed_prompts, processor)] * 4, callbacks=callbacks)
        ends[len(callbacks)] = weights(module)
    moved = [largest_difference(start, end) for end in ends.values()]
    assert moved[0] > 0
    assert torch.equal(*(nn.utils.parameters_to_vector(end.values()) for end in ends.values())) == (strength == 0)
    assert moved[1] == moved[0] if strength == 0 else moved[1] < moved[0]


def test_only_adapters_are_kept_where_only_they_are_trained(small_folder, processor, mixed_prompts):
    callback = L2(0.1)
    fit(
        SFT(backbone=Backbone(small_folder, tuning="lora")),
        [with_examples(mixed_prompts, processor)],
        callbacks=[callback],
    )
    assert callback.kept["anchor"] and all("lora_" in name for name in callback.kept["anchor"])


@pytest.mark.parametrize("along_stream", ["renewed", "per_task"])
def test_a_new_adapter_is_pulled_to_its_own_start(tmp_path, small_folder, along_stream):
    """Not to where the adapter of the task before it ended: the first step of a task has no penalty."""
    penalties = []

    class Watched(L2):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            penalties.append(self._penalty.item())

    lora = Lora(rank=4, along_stream=along_stream)
    module = SFT(backbone=Backbone(small_folder, tuning="lora", lora=lora), optimizer=sgd, evaluation=Sampling(2))
    fit_stream(tmp_path, module, [Watched(1.0)])
    first, second = penalties[: len(penalties) // 2], penalties[len(penalties) // 2 :]
    for task in (first, second):
        assert task[0] == 0 and min(task[1:]) > 0


@pytest.mark.parametrize("callback", [L2(anchor="base"), EWC(), ModelMerging()], ids=lambda each: type(each).__name__)
def test_what_one_adapter_was_is_not_held_against_the_next(tmp_path, small_folder, callback):
    lora = Lora(along_stream="renewed")
    module = SFT(backbone=Backbone(small_folder, tuning="lora", lora=lora), evaluation=Sampling(2))
    with pytest.raises(ValueError, match=f"{type(callback).__name__}: with backbone.lora.along_stream=renewed"):
        fit_stream(tmp_path, module, [callback])


def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match="L2: strength=-1 must not be negative"):
        L2(-1)
