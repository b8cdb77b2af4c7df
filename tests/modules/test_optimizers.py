"""Optimizers of bitsandbytes train, keep eight bits, and go on from a checkpoint where they stopped."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from cpt_lightning.models import Backbone
from cpt_lightning.modules import SFT
from tests.training import fit, largest_difference, weights, with_examples


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_eight_bit_state_survives_a_checkpoint(small_folder, processor, mixed_prompts, tmp_path, name):
    """Two epochs in a row and with a checkpoint between them, read as weights only, end in the same weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    batches = [with_examples(mixed_prompts, processor)] * 2

    def make() -> SFT:
        optimizer = getattr(bitsandbytes.optim, name)
        return SFT(backbone=Backbone(small_folder), optimizer=lambda parameters: optimizer(parameters, lr=1e-3))

    whole, first, second = make(), make(), make()
    trainer = fit(whole, batches, max_epochs=2)
    states = [state["state1"].dtype for state in trainer.optimizers[0].state.values()]
    assert {torch.uint8, torch.float32} == set(states)  # weights of fewer than 4,096 numbers keep 32 bits
    fit(first, batches).save_checkpoint(tmp_path / "half.ckpt")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    rest = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, limit_val_batches=0, **quiet)
    loader = DataLoader(batches, batch_size=None)
    rest.fit(second, loader, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert rest.global_step == 4
    assert largest_difference(weights(second), weights(whole)) == 0
    assert largest_difference(weights(first), weights(whole)) > 0
