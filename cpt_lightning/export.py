"""From a checkpoint of a run to a folder that plain transformers and PEFT load."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from cpt_lightning.callbacks.cards import Kind, config_of, model_card
from cpt_lightning.callbacks.continual import FILENAME
from cpt_lightning.callbacks.exports import EXPORTS, weights_of_model
from cpt_lightning.callbacks.matrix import AccuracyMatrix
from cpt_lightning.models import Backbone
from cpt_lightning.models.adapter_folders import merge_adapters
from cpt_lightning.models.adapters import has_adapters
from cpt_lightning.models.folders import lasting_name, load_weights, refuse_filled, save_folder

TASK_CHECKPOINT = re.compile(r"(?P<stage>\d+)_(?P<name>.+)\.ckpt")


def export(
    run: str | Path,
    task: str | None = None,
    merge: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Exports a checkpoint: with LoRA as PEFT adapter, otherwise as a whole transformers model.

    Args:
        run: Directory of the run.
        task: The task after which, as ``word2`` or ``1_word2``; where the run stands last by default.
        merge: Merge the adapter into its base; the folder then holds a whole model.
        output: Folder to write; ``exports/<name of the checkpoint>`` in the run's by default.
        overwrite: Replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        FileExistsError: The folder is not empty.
        ValueError: There is nothing to merge, or the checkpoint's weights are not those of the run's model.
    """
    run = Path(run)
    config = _config(run)
    path = find_checkpoint(_checkpoint_folder(run, config), task)
    folder = Path(output) if output is not None else run / EXPORTS / (path.stem + ("_merged" if merge else ""))
    refuse_filled(folder, overwrite)
    backbone = backbone_of(config, run)
    if merge and backbone.tuning != "lora":
        raise ValueError("--merge: this run tuned the weights themselves, there is no adapter to merge; leave it out")
    checkpoint = read_checkpoint(path)
    model = backbone.load_model()
    load_weights(model, weights_of_model(checkpoint["state_dict"]), str(path))
    if merge:
        merge_adapters(model)
    kind: Kind = "merged" if merge else "adapter" if has_adapters(model) else "full"
    matrix = AccuracyMatrix.load(run / FILENAME) if (run / FILENAME).is_file() else None
    card = model_card(
        f"{run.resolve().name}/{folder.name}",
        kind,
        lasting_name(backbone.path),
        str(model.dtype).removeprefix("torch."),
        learned_stages(path, checkpoint, matrix),
        matrix,
        config,
    )
    save_folder(model, backbone.load_processor(), folder, backbone.path, card, overwrite=overwrite)
    return folder
