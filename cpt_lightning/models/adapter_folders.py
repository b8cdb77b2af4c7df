"""PEFT adapter folders: what a run with LoRA gives away, and what the next run may begin from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpt_lightning.models.adapters import Lora

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""Before every name in the weights file, because PEFT puts its wrapper around the model."""

BASE_BESIDE = "base"
"""Folder of the embedded base within an adapter's, as nobody could get it from anywhere by its name."""

DECISIVE = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out")
"""Settings of PEFT on which the output depends besides the weights."""


def is_adapter_folder(path: str) -> bool:
    """Whether a backbone's path is a folder that holds an adapter instead of a model."""
    return (Path(path) / CONFIG_FILE).is_file()


def base_of(path: str) -> str:
    """The path of the model itself: an adapter's base, any other path as it is.

    Raises:
        ValueError: The adapter does not say what it belongs to.
    """
    if not is_adapter_folder(path):
        return path
    base = _settings(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"backbone.path={path!r} holds an adapter of an unknown model: name its folder or hub id as "
            f"base_model_name_or_path in {CONFIG_FILE}"
        )
    return base


def _settings(path: str) -> dict:
    return json.loads((Path(path) / CONFIG_FILE).read_text(encoding="utf-8"))


def processor_of(path: str) -> str:
    """Where the tokenizer and image processor of a backbone lie: beside an adapter, or with its base."""
    return path if (Path(path) / "preprocessor_config.json").is_file() else base_of(path)


# -- writing -----------------------------------------------------------------------------------------------------------


def save_adapter(model: QwenVL, folder: Path, base: str, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes the model's adapter in PEFT's own form.

    Args:
        model: The backbone with the adapter inside it.
        folder: Folder to write to.
        base: Path of the model it belongs to. The embedded one is laid beside the adapter.
        weights: State dict of the model, where its own is spread over ranks.
    """
    from safetensors.torch import save_file

    from cpt_lightning.models.processor import TINY

    config = model.peft_config["default"]
    named = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps({name: _plain(value) for name, value in named.items()}, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    adapter = _adapter_weights(model, weights)
    tensors = {PEFT_PREFIX + name: weight.cpu().contiguous() for name, weight in adapter.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if base == "tiny":
        shutil.copytree(TINY, folder / BASE_BESIDE, ignore=shutil.ignore_patterns("scores.json"))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else value


def _adapter_weights(model: QwenVL, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """By PEFT's name; without ``weights`` the tensors are the model's own, not copies."""
    from peft import get_peft_model_state_dict

    # save_embedding_layers: "auto" asks the hub for the base's configuration.
    state = model.state_dict() if weights is None else dict(weights)
    return get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)


# -- loading -----------------------------------------------------------------------------------------------------------


def load_adapter_folder(model: QwenVL, path: str, lora: Lora | None) -> None:
    """Puts the weights of an adapter folder into the model.

    Args:
        model: The adapter's base; with adapters as ``lora`` says, if these go on being trained.
        path: The adapter's folder.
        lora: Settings of the adapters that are in the model already; ``None`` merges the folder's into the weights.

    Raises:
        ValueError: The folder holds no LoRA, other settings or other weights than those of the model.
    """
    from peft import PeftConfig

    if (kind := _settings(path).get("peft_type")) != "LORA":
        raise ValueError(f"backbone.path={path!r} holds a {kind} adapter; only LoRA is supported")
    config = PeftConfig.from_pretrained(path)
    if lora is None:
        model.add_adapter(config)
        _bind(model, path)
        merge_and_unload(model)
        model.requires_grad_(True)  # which it was before adapters came
        return
    own = model.peft_config["default"]
    for name in DECISIVE:
        there, here = getattr(config, name), getattr(own, name)
        if there != here:
            raise ValueError(
                f"backbone.path={path!r} holds an adapter with {name}={there!r}, but backbone.lora asks for {here!r}; "
                f"make backbone.lora say what the folder's {CONFIG_FILE} does"
            )
    _bind(model, path)


def _bind(model: QwenVL, path: str) -> None:
    from safetensors.torch import load_file

    file = Path(path) / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"backbone.path={path!r} has no {WEIGHTS_FILE}; other formats are not read")
    given = {name.removeprefix(PEFT_PREFIX): weight for name, weight in load_file(file).items()}
    wanted = _adapter_weights(model)
    if odd := sorted(set(given) ^ set(wanted)):
        raise ValueError(
            f"{file}: {len(odd)} weights are in the file or in the model only, such as {odd[0]}; backbone.lora.parts "
            "or targets must name the layers that the adapter has"
        )
    for name, weight in wanted.items():
        if weight.shape != given[name].shape:
            raise ValueError(f"{file}: {name} is {tuple(given[name].shape)}, the model's is {tuple(weight.shape)}")
        with torch.no_grad():
            weight.copy_(given[name])


# -- merging -----------------------------------------------------------------------------------------------------------


def merge_and_unload(model: QwenVL) -> None:
    """Adds the adapters to the weights they adapt, in place; what is left is a model without adapters.

    Raises:
        ValueError: An adapter sits on embeddings that are also the output matrix: added to one, it would change both.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    shared = model.get_input_embeddings().weight if model.config.tie_word_embeddings else None
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        if shared is not None and getattr(layer.get_base_layer(), "weight", None) is shared:
            raise ValueError(f"merge: {name} has an adapter, but its weight is shared by embeddings and output matrix")
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
