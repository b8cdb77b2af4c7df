"""An export after every task, or at the end: folders that plain transformers and PEFT load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cpt_lightning.callbacks.cards import Kind, config_of, model_card
from cpt_lightning.callbacks.checks import ChecksFit
from cpt_lightning.callbacks.continual import ContinualLearning
from cpt_lightning.models.adapted_layers import merge_earlier
from cpt_lightning.models.adapter_folders import merge_and_unload
from cpt_lightning.models.adapters import has_adapters
from cpt_lightning.models.folders import load_weights, save_folder
from cpt_lightning.models.sharding import all_whole
from cpt_lightning.tasks.checks import check_known

if TYPE_CHECKING:
    from cpt_lightning.models import Backbone
    from cpt_lightning.models.qwen_vl import QwenVL

EXPORTS = "exports"
"""Folder of the exports in a run's."""

When = Literal["never", "end", "every_task"]


class TaskExport(ChecksFit, Checkpoint):
    """Exports the model to ``exports/1_<task>``, ``exports/2_<task>``, ... in the run's directory.

    With LoRA a folder holds a PEFT adapter, or the whole model with it merged in (``.._merged``); with full tuning the
    whole model. ``cpt export`` makes the same folders afterwards, from checkpoints. An earlier export of that name is
    replaced. Of adapters ``per_task`` a folder holds the task's own; ``renewed`` ones can only be merged, all of them.

    Args:
        when: After each task, or once after the last.
        merge: Merge LoRA adapters into a freshly loaded base, which takes the memory of another model on rank 0.
    """

    # Lightning lets Checkpoint callbacks come last, when the row of the task stands in the matrix.

    def __init__(self, when: When = "every_task", merge: bool = False) -> None:
        check_known("export.", when=(when, When))
        self.when = when
        self.merge = merge

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses to merge what has no adapters, and to export one adapter where several make up the model.

        Raises:
            ValueError: ``merge`` with full tuning, or adapters that are renewed without it.
        """
        if self.when == "never":
            return
        if self.merge and pl_module.backbone.tuning == "full":
            raise ValueError("export.merge: with full tuning there is no adapter to merge; leave it out")
        if not self.merge and pl_module.backbone.lora.along_stream == "renewed":
            raise ValueError(
                f"export.when={self.when}: with backbone.lora.along_stream=renewed the model is more than its newest "
                "adapter; set export.merge to true, or export.when to never"
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
            self._export(trainer, pl_module, weights, names, Path(folder))

    def _export(
        self, trainer: Trainer, module: LightningModule, state: dict[str, Tensor], names: list[str], run: Path
    ) -> None:
        backbone = module.backbone
        model = merged_model(backbone, state, "the run") if self.merge else module.model
        weights = None if self.merge else weights_of_model(state)
        kind: Kind = "merged" if self.merge else "adapter" if has_adapters(model) else "full"
        name = f"{len(names)}_{names[-1]}" + ("_merged" if self.merge else "")
        record = next((each for each in trainer.callbacks if isinstance(each, ContinualLearning)), None)
        matrix = None if record is None else record.matrix(trainer)
        dtype = str(model.dtype).removeprefix("torch.")
        card = model_card(name, kind, backbone, dtype, names, None, matrix, config_of(run), module.prefixes)
        folder = run / EXPORTS / name
        save_folder(model, module.processor, folder, backbone.path, card, weights, overwrite=True)
        rank_zero_info(f"exported: {folder}")


def merged_model(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> QwenVL:
    """The base with all adapters merged in that a checkpoint's model consists of, in the order of the run.

    Args:
        backbone: The run's. A base that was quantized while adapters were trained is taken as it was before.
        state: The module's state dict.
        source: Where it comes from, for errors.
    """
    model = replace(backbone, tuning="lora").load_model()
    if backbone.lora.along_stream == "renewed":
        merge_earlier(model, state)
    load_weights(model, weights_of_model(state), source)
    merge_and_unload(model)
    return model


def weights_of_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights among those of a module, by their name in it.

    Left out are a reference's copy, and the adapters of earlier stages.
    """
    prefix = "model."
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
