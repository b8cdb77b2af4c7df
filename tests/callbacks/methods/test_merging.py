"""Merged weights by hand, and when they are merged: before the evaluation of the task that has just been learned."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from cpt_lightning.callbacks import ModelMerging
from tests.training import fit


class Climber(L.LightningModule):
    """Two weights; a batch of task t adds 1 to the first and 10^t to the second. Records both at every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 100.0]))
        self.evaluated: list[list[float]] = []

    def training_step(self, batch, batch_idx):
        return -(self.weight * torch.tensor([1.0, 10.0**self.current_epoch])).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(self.weight.tolist())


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"method": "average"}, [[2, 102], [3, 112], [11 / 3, 112 + 200 / 3]]),
        ({"method": "average", "start": "base"}, [[2, 102], [2, 111], [2, 100 + 222 / 3]]),
        ({"method": "task_arithmetic", "scale": 0.5}, [[1, 101], [2, 111], [3, 211]]),
        ({"method": "task_arithmetic", "scale": 0.5, "start": "base"}, [[1, 101], [2, 111], [3, 211]]),
        ({"method": "task_arithmetic", "scale": 1.0}, [[2, 102], [4, 122], [6, 322]]),
    ],
)
def test_the_merged_model_is_what_is_evaluated(options, expected):
    """Tasks of two batches: task vectors [2, 2], [2, 20], [2, 200] whatever they begin from.

    Average from the merged model: after task 2 half of the way from [2, 102] to [4, 122], after task 3 a third of that
    from [3, 112] to [5, 312]. From the base: means of [2, 102], [2, 120], [2, 300]. Task arithmetic: half of the sum of
    the vectors on [0, 100], which these vectors make the same from either start.
    """
    module, callback = Climber(), ModelMerging(**options)
    fit(module, [torch.zeros(1)] * 2, max_epochs=3, limit_val_batches=1, num_sanity_val_steps=0, callbacks=[callback])
    assert torch.tensor(module.evaluated).numpy() == pytest.approx(torch.tensor(expected).numpy())
    assert module.weight.tolist() == pytest.approx(expected[-1])


def test_a_task_begins_from_the_base_if_it_is_to():
    starts = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            starts.append(pl_module.weight.tolist())

    fit(Climber(), [torch.zeros(1)], max_epochs=3, callbacks=[ModelMerging(start="base"), Look()])
    assert starts == [[0, 100]] * 3


def test_a_vector_of_scale_1_leaves_every_bit_as_it_was():
    ends = []
    for callbacks in ([], [ModelMerging("task_arithmetic", scale=1.0)]):
        torch.manual_seed(0)
        module = Climber()
        nn.init.normal_(module.weight)
        fit(module, [torch.zeros(1)] * 3, max_epochs=3, callbacks=callbacks)
        ends.append(module.weight.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": 0.5}, "scale=0.5 belongs to task_arithmetic"),
        ({"method": "task_arithmetic"}, "task_arithmetic needs a positive scale, e.g. 0.4; it is None"),
        ({"method": "task_arithmetic", "scale": -1}, "positive scale"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelMerging(**options)
