"""Joint training is SFT where all is supervised, RFT where all is reinforced, and their weighted sum in between."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.models import Backbone
from cpt_lightning.modules import RFT, SFT, MultiTask
from cpt_lightning.rollouts import Sampling
from tests.training import fit, largest_difference, sgd, weights, with_examples

OPTIONS = {"optimizer": sgd, "max_grad_norm": None}
RFT_OPTIONS = {**OPTIONS, "group_size": 4, "sampling": Sampling(6)}


@pytest.fixture
def two_tasks(mixed_prompts, processor):
    """Rows 0 and 2 belong to task a, rows 1 and 3 to task b."""
    batch = with_examples(mixed_prompts, processor)
    for row, example in enumerate(batch.prompts.examples):
        example.task = "ab"[row % 2]
    return batch


def fitted(module, batch) -> dict[str, torch.Tensor]:
    fit(module, [batch])
    return weights(module)


def test_all_supervised_is_sft(small_folder, two_tasks):
    joint = fitted(MultiTask(backbone=Backbone(small_folder), objective="sft", **RFT_OPTIONS), two_tasks)
    alone = fitted(SFT(backbone=Backbone(small_folder), **OPTIONS), two_tasks)
    assert largest_difference(joint, alone) < 1e-6


def test_all_reinforced_is_rft(small_folder, two_tasks):
    joint = fitted(MultiTask(backbone=Backbone(small_folder), objective="rft", **RFT_OPTIONS), two_tasks)
    alone = fitted(RFT(backbone=Backbone(small_folder), **RFT_OPTIONS), two_tasks)
    assert largest_difference(joint, alone) < 1e-6


def test_a_mixed_step_is_the_sum_of_both_objectives_weighed_by_rows_and_tasks(small_folder, two_tasks):
    """Half the rows each, task a supervised with weight 3, task b reinforced with weight 1: with plain SGD the step is
    3/2 of SFT's on the rows of a plus 1/2 of RFT's on the rows of b.
    """
    from cpt_lightning.types import Batch

    def part(rows):
        return Batch(two_tasks.prompts.select(rows), two_tasks.targets.select(rows))

    start = SFT(backbone=Backbone(small_folder), **OPTIONS)
    start.configure_model()
    before = weights(start)
    supervised = fitted(SFT(backbone=Backbone(small_folder), **OPTIONS), part([0, 2]))
    reinforced = fitted(RFT(backbone=Backbone(small_folder), **RFT_OPTIONS), part([1, 3]))
    expected = {
        name: weight + 1.5 * (supervised[name] - weight) + 0.5 * (reinforced[name] - weight)
        for name, weight in before.items()
    }
    module = MultiTask(backbone=Backbone(small_folder), objectives={"b": "rft"}, weights={"a": 3.0}, **RFT_OPTIONS)
    assert largest_difference(fitted(module, two_tasks), expected) < 1e-6


@pytest.mark.parametrize("objectives", [{}, {"b": "rft"}])
def test_micro_batches_and_several_updates_see_every_row(small_folder, two_tasks, objectives):
    options = {**RFT_OPTIONS, "objectives": objectives, "updates_per_rollout": 2}
    whole = fitted(MultiTask(backbone=Backbone(small_folder), **options), two_tasks)
    small = fitted(MultiTask(backbone=Backbone(small_folder), micro_batch_prompts=1, **options), two_tasks)
    assert largest_difference(whole, small) < 1e-6


def test_reinforced_rows_lose_for_their_length_as_in_rft(small_folder, two_tasks):
    """Completions of a random model end by chance; at a margin of all 6 tokens each one has lost length / 6.

    It is logged from the first batch on, as is what else is logged before the optimizer's step.
    """
    module = MultiTask(backbone=Backbone(small_folder), objectives={"b": "rft"}, overlong_margin=6, **RFT_OPTIONS)
    rollouts = []
    collect = module.collect
    module.collect = lambda *args: rollouts.append(collect(*args)) or rollouts[-1]
    trainer = fit(module, [two_tasks])
    mean_length = rollouts[0].completions.lengths.float().mean().item()
    assert trainer.callback_metrics["train/reward/overlong"] == pytest.approx(-mean_length / 6)
    assert {"train/reward", "train/grad_norm", "train/lr", "time/rollout_s"} <= set(trainer.callback_metrics)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        MultiTask(weights={"a": -1.0})
