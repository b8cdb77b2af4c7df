"""Folders that plain transformers and PEFT load, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpt_lightning.models.adapter_folders import BASE_BESIDE, base_of, save_adapter
from cpt_lightning.models.adapters import has_adapters

if TYPE_CHECKING:
    from cpt_lightning.models.processor import PromptProcessor
    from cpt_lightning.models.qwen_vl import QwenVL


MODEL_CONFIGS = {"config.json", "adapter_config.json"}
"""Of transformers and PEFT: one of them is in the folder of a model."""


def save_folder(
    model: QwenVL,
    processor: PromptProcessor,
    folder: str | Path,
    base: str,
    card: str,
    weights: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the model as others load it: with adapters inside it a PEFT adapter, else a whole model.

    Beside the weights stand the tokenizer, the image processor's and the generation's settings, and a model card.

    Args:
        model: The backbone, as trained.
        processor: Its processor.
        folder: Folder to write.
        base: The ``backbone.path`` that the model began from, to which an adapter belongs.
        card: Text of the model card.
        weights: State dict of the model, where its own is spread over ranks.
        overwrite: Replace the folder of a model.

    Raises:
        FileExistsError: The folder is not empty.
    """
    with whole_folder(Path(folder), overwrite) as part:
        processor.tokenizer._set_processor_class("Qwen2_5_VLProcessor")  # what AutoProcessor looks for
        processor.tokenizer.backend_tokenizer.no_padding()  # of the last batch, which would be saved with it
        processor.tokenizer.save_pretrained(part)
        processor.image_processor.save_pretrained(part)
        (part / "README.md").write_text(card, encoding="utf-8")
        if has_adapters(model):
            model.generation_config.save_pretrained(part)
            save_adapter(model, part, lasting_name(base), weights)
        else:
            tied = model.all_tied_weights_keys  # gathered, they are no longer one tensor, and would be written twice
            kept = None if weights is None else {name: weights[name] for name in weights if name not in tied}
            model.save_pretrained(part, state_dict=kept)
        for file in part.iterdir():  # what safetensors (0.8) writes, only its owner may read
            shutil.copymode(part / "README.md", file)


def load_weights(model: QwenVL, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads a checkpoint's weights: all of them, or those that were trained.

    Args:
        model: The backbone, loaded and tuned as in the run.
        weights: By their name in the model.
        source: Where they come from, for errors.

    Raises:
        ValueError: A weight has no place in the model, another shape, or is missing though it was trained.
    """
    own = model.state_dict()
    if odd := [name for name in weights if name not in own]:
        raise ValueError(f"{source}: {len(odd)} weights have no place in the model, such as {odd[0]}")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if missing := sorted(trained - set(weights)):
        raise ValueError(f"{source}: {len(missing)} trained weights are missing, such as {missing[0]}")
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise ValueError(f"{source}: {name} is {tuple(weight.shape)}, the model's is {tuple(own[name].shape)}")
        with torch.no_grad():
            own[name].copy_(weight)


def lasting_name(path: str) -> str:
    """A backbone's base by a name that holds wherever one stands: a whole path, a hub id, or ``tiny``."""
    base = base_of(path)
    return str(Path(base).resolve()) if base != "tiny" and Path(base).is_dir() else base


def refuse_filled(folder: Path, overwrite: bool) -> None:
    """Keeps what is there, unless it may be replaced; only what is a model's folder, and nothing else, may be.

    Raises:
        FileExistsError: The folder is not empty, or is a file.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; --output names a folder")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    if entries and not overwrite:
        raise FileExistsError(f"{folder} exists already; --overwrite replaces it, --output names another folder")
    if entries and not _is_model_alone(folder):
        raise FileExistsError(
            f"{folder} is not the folder of a model alone, and all that is in it would be lost; --output names another "
            "folder"
        )


def _is_model_alone(folder: Path) -> bool:
    """Whether a model is in the folder and no folder is, but the embedded base's beside its adapter."""
    entries = list(folder.iterdir())
    folders = [entry for entry in entries if entry.is_dir()]
    return not MODEL_CONFIGS.isdisjoint(entry.name for entry in entries) and all(
        entry.name == BASE_BESIDE and _is_model_alone(entry) for entry in folders
    )


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to that gets its name when all is written; what fails or is killed leaves none of that name."""
    refuse_filled(folder, overwrite)
    part, old = (folder.with_name(f".{folder.name}.{state}") for state in ("part", "old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if folder.is_dir():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
