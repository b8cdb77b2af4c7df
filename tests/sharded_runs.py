"""The runs that ``test_sharded`` compares, by one process of one or two: ``python -m tests.sharded_runs ...``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import distributed
from torch.utils.data import DataLoader

from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import Lora
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.rollouts import Sampling
from tests.training import sgd, with_examples

BACKBONES = {"full": {"tuning": "full"}, "lora": {"tuning": "lora", "lora": Lora(rank=4)}}
RUNS: dict[str, Callable[..., L.LightningModule]] = {
    "sft_full": partial(SFT, max_grad_norm=0.05),
    "sft_lora": partial(SFT, max_grad_norm=0.05),
    "rft_full": partial(RFT, group_size=4, sampling=Sampling(max_new_tokens=8), micro_batch_prompts=1, kl_coef=0.1),
    "rft_lora": partial(
        RFT, group_size=4, sampling=Sampling(max_new_tokens=8), updates_per_rollout=1, kl_coef=0.1, reference="base"
    ),
}


def run(name: str, backbone: str, prompts: Any, strategy: str, devices: int) -> dict:
    """Two steps of one objective; what the weights are then, on rank 0."""
    torch.manual_seed(0)
    options = BACKBONES[name.rpartition("_")[2]]
    module = RUNS[name](backbone=Backbone(backbone, **options), optimizer=sgd)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False, use_distributed_sampler=False,
        strategy=strategy, devices=devices, accumulate_grad_batches=2 if name.startswith("sft") else 1,
    )  # fmt: skip
    loader = DataLoader(Share(prompts, module.processor, trainer), batch_size=None)
    trainer.fit(module, loader)
    state = trainer.strategy.lightning_module_state_dict()
    return {name.removeprefix("model."): weight.clone() for name, weight in state.items()}


class Share(torch.utils.data.Dataset):
    """Two batches of the same four prompts, this rank's share of each: rank 0 has an image and text, rank 1 images."""

    def __init__(self, prompts: Any, processor: Any, trainer: L.Trainer) -> None:
        self.whole, self.trainer = with_examples(prompts, processor), trainer

    def __len__(self) -> int:
        return 4

    def __getitem__(self, step: int) -> Any:
        if step >= len(self):
            raise IndexError
        # The row with text alone and the one with two images trade places: it is the only one of its rank.
        rows = [[1, 0, 2, 3], [2, 3, 1, 0]][step % 2]
        part = len(rows) // self.trainer.world_size
        mine = rows[self.trainer.global_rank * part :][:part]
        return type(self.whole)(self.whole.prompts.select(mine), self.whole.targets.select(mine))


def main(folder: Path, strategy: str, devices: int, *names: str) -> None:
    prompts = torch.load(folder / "prompts.pt", weights_only=False)
    for name in names:
        state = run(name, str(folder / "backbone"), prompts, strategy, devices)
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            torch.save(state, folder / f"{name}_{strategy}_{devices}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
