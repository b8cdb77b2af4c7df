"""What remembers weights over tasks: where it is kept, and how it survives a resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import Callback, LightningModule, Trainer

from cpt_lightning.callbacks.checks import ChecksFit
from cpt_lightning.models.sharding import whole
from cpt_lightning.models.weights import Weights, laid_out


class KeptWeights(ChecksFit):
    """Keeps named sets of tensors, one for every trained parameter, in memory and in the checkpoint.

    With LoRA these are as small as the adapters; with full tuning each set takes the memory of the trained weights, on
    their devices and, where they are sharded, sharded alike.

    Raises:
        ValueError: A run is resumed from a checkpoint that was written without this callback, or that trained other
            parameters.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Weights] = {}
        self._resumed: dict[str, Weights] | None = None

    @property
    def sets(self) -> list[torch.dtype | None]:
        """The sets of tensors that are kept at most, each by its dtype; ``None`` is the weights' own."""
        return [None]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts what a checkpoint held where the parameters are."""
        if trainer.ckpt_path is None:
            return
        if self._resumed is None:
            self._refuse(trainer.ckpt_path)
        try:
            self.kept = {kind: laid_out(weights, pl_module) for kind, weights in self._resumed.items()}
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {trainer.ckpt_path} remembers other weights: {error}") from error
        self._resumed = None

    def check_resume(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any], path: str | Path
    ) -> None:
        """Refuses one that was written without this callback."""
        super().check_resume(trainer, pl_module, checkpoint, path)
        if self.state_key not in checkpoint.get("callbacks", {}):
            self._refuse(path)

    def _refuse(self, path: str | Path) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__}: {path} was written without this callback, so what it should remember of the "
            "start is lost; begin a new run with it, or resume without it"
        )

    def state_dict(self) -> dict:
        """All that is kept, as whole tensors on the CPU."""
        return {
            "kept": {
                kind: {name: whole(tensor).cpu() for name, tensor in weights.items()}
                for kind, weights in self.kept.items()
            }
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on with what a checkpoint held, once training starts."""
        self._resumed = state_dict["kept"]


def refuse_other_adapters(callback: Callback, module: LightningModule, but: str = "") -> None:
    """Refuses a stream in which tasks have other adapters, where what is kept of one task's says nothing of the next's.

    Args:
        callback: That keeps it.
        module: That is trained.
        but: Another mend than the adapters', if there is one.

    Raises:
        ValueError: Tasks do not share an adapter.
    """
    along_stream = getattr(module, "along_stream", "shared")
    if along_stream != "shared":
        raise ValueError(
            f"{type(callback).__name__}: with backbone.lora.along_stream={along_stream} each task has weights of its "
            f"own, and what is kept of one task's says nothing of the next one's; set along_stream to shared{but}"
        )
