"""An export after every task, or at the end: folders that plain transformers and PEFT load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cpt_lightning.callbacks.cards import Kind, config_of, model_card
from cpt_lightning.callbacks.continual import ContinualLearning
from cpt_lightning.models.adapter_folders import merge_and_unload
from cpt_lightning.models.adapters import has_adapters
from cpt_lightning.models.folders import lasting_name, load_weights, save_folder
from cpt_lightning.models.sharding import all_whole

EXPORTS = "exports"
"""Folder of the exports in a run's."""


class TaskExport(Checkpoint):
    """Exports the model to ``exports/1_<task>``, ``exports/2_<task>``, ... in the run's directory.

    With LoRA a folder holds a PEFT adapter, or the whole model with it merged in (``.._merged``); with full tuning the
    whole model. ``cpt export`` makes the same folders afterwards, from checkpoints. An earlier export of that name is
    replaced.

    Args:
        when: After each task, or once after the last.
        merge: Merge LoRA adapters into a freshly loaded base, which takes the memory of another model on rank 0.
    """

    # Lightning lets Checkpoint callbacks come last, when the row of the task stands in the matrix.

    def __init__(self, when: Literal["never", "end", "every_task"] = "every_task", merge: bool = False) -> None:
        self.when = when
        self.merge = merge

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses to merge what has no adapters, and to export what is more than one.

        Raises:
            ValueError: ``merge`` with full tuning, or adapters that are renewed or a task's own.
        """
        if self.when != "never" and self.merge and pl_module.backbone.tuning == "full":
            raise ValueError("export.merge: with full tuning there is no adapter to merge; leave it out")
        if self.when != "never" and pl_module.backbone.lora.along_stream != "shared":
            raise ValueError(
                f"export.when={self.when}: with backbone.lora.along_stream={pl_module.backbone.lora.along_stream} the "
                "model is more than its newest adapter, which is all that an export holds; set export.when to never"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the task's end."""
        names = trainer.datamodule.stage_names[: trainer.current_epoch + 1]
        is_end = len(names) == trainer.datamodule.num_stages
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        if trainer.fast_dev_run or folder is None or not (self.when == "every_task" or (self.when == "end" and is_end)):
            return
        # Where the model is spread over ranks this gathers it: all of them must call it.
        weights = all_whole(trainer.strategy.lightning_module_state_dict(), keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            self._export(trainer, pl_module, weights_of_model(weights), names, Path(folder))

    def _export(
        self, trainer: Trainer, module: LightningModule, weights: dict[str, Tensor], names: list[str], run: Path
    ) -> None:
        model, backbone = module.model, module.backbone
        if self.merge:
            model = replace(backbone, tuning="lora").load_model()  # not quantized
            load_weights(model, weights, "the run")
            merge_and_unload(model)
        kind: Kind = "merged" if self.merge else "adapter" if has_adapters(model) else "full"
        name = f"{len(names)}_{names[-1]}" + ("_merged" if self.merge else "")
        record = next((each for each in trainer.callbacks if isinstance(each, ContinualLearning)), None)
        matrix = None if record is None else record.matrix(trainer)
        dtype = str(model.dtype).removeprefix("torch.")
        card = model_card(name, kind, lasting_name(backbone.path), dtype, names, None, matrix, config_of(run))
        folder = run / EXPORTS / name
        save_folder(
            model, module.processor, folder, backbone.path, card, None if self.merge else weights, overwrite=True
        )
        rank_zero_info(f"exported: {folder}")


def weights_of_model(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights among those of a module, by their name in it; a reference's copy is left out.

    Raises:
        ValueError: The adapter is not the only one since the base, and would be another model without the earlier ones.
    """
    if any(name.startswith("earlier.") for name in state_dict):
        raise ValueError(
            "the run made a new adapter for every task (backbone.lora.along_stream): the last one alone is "
            "not the model that was evaluated, so that only the end of the first task can be exported"
        )
    prefix = "model."
    return {name.removeprefix(prefix): weight for name, weight in state_dict.items() if name.startswith(prefix)}
