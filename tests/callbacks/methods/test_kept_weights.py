"""What callbacks remember of weights survives a kill: the resumed run ends like one that was not killed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cpt_lightning.callbacks import EWC, L2, ModelMerging
from tests.fakes import KillAt, Killed, LinearModule, make_trainer, number_stream

METHODS = {
    "L2 to the task's start": partial(L2, 0.5),
    "L2 to the base": partial(L2, 0.5, "base"),
    "EWC": partial(EWC, 50.0, num_rows=5),
    "EWC of every task": partial(EWC, 50.0, "targets", num_rows=5, decay=0.9, anchors="every_task"),
    "average": ModelMerging,
    "average from the base": partial(ModelMerging, start="base"),
    "task arithmetic": partial(ModelMerging, "task_arithmetic", 0.7),
    "task arithmetic from the base": partial(ModelMerging, "task_arithmetic", 0.7, start="base"),
}
KILLS = [KillAt(0, batch=1), KillAt(1, batch=0), KillAt(2, batch=2), KillAt(1, "on_train_epoch_end")]


def run(folder, callbacks, resume=False, module=None, **options):
    """A run of three tasks, or the rest of one; returns its weights."""
    module, stream = module or LinearModule(), number_stream()
    trainer = make_trainer(folder, stream, callbacks=callbacks, **options)
    if not resume:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=folder / "last.ckpt" if resume else None)
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_like_a_whole_one_bit_for_bit(tmp_path, method):
    """Killed within the first task, after one, within the last, and between evaluation and the task's checkpoint."""
    whole = run(tmp_path / "whole", [METHODS[method]()])
    assert not torch.equal(whole, run(tmp_path / "without", [])), "the method does something"
    for number, kill in enumerate(KILLS):
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            run(folder, [METHODS[method](), kill])
        assert torch.equal(run(folder, [METHODS[method]()], resume=True), whole)


def test_a_checkpoint_of_a_run_without_the_method_is_refused(tmp_path):
    run(tmp_path, [], max_epochs=1)
    with pytest.raises(ValueError, match="L2: .*last.ckpt was written without this callback"):
        run(tmp_path, [L2()], resume=True)


def test_a_checkpoint_of_other_trained_weights_is_refused(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, [L2(), KillAt(1)])
    module = LinearModule()
    module.layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="L2: .*last.ckpt remembers other weights: 'layer.bias' is trained no more"):
        run(tmp_path, [L2()], resume=True, module=module)
