"""Loads the backbone: which weights, what of them is trained, in which precision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from cpt_lightning.models.adapter_folders import base_of, is_adapter_folder, load_adapter_folder, processor_of
from cpt_lightning.models.adapters import Lora, Part
from cpt_lightning.models.quantization import Quantization
from cpt_lightning.tasks.checks import check_kinds, check_known, check_known_lists

if TYPE_CHECKING:
    from cpt_lightning.models.processor import PromptProcessor
    from cpt_lightning.models.qwen_vl import QwenVL


Tuning = Literal["full", "lora", "qlora"]
Checkpointed = Literal["vision_tower", "language_model"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]


class MissingBackbone(FileNotFoundError, ValueError):
    """No Qwen2.5-VL is where an option says that there is one."""


@dataclass
class Backbone:
    """The Qwen2.5-VL that is tuned.

    Args:
        path: Local folder, hub id, or ``tiny`` for the embedded base of 3 M parameters. May be the folder of a LoRA
            adapter: with ``lora`` tuning that adapter is trained on, with ``full`` it is merged into its base first.
        tuning: ``full`` trains all weights that are not frozen, ``lora`` only low-rank adapters,
            ``qlora`` low-rank adapters over a language model that is stored in four bits.
        lora: Settings of the adapters.
        quantization: How ``qlora`` stores the language model.
        freeze: Parts that are not trained.
        gradient_checkpointing: Parts whose activations are recomputed in backward: slower, less memory.
        dtype: Precision of the weights; ``auto`` takes the checkpoint's. Autocasting is the Trainer's ``precision``.
        min_pixels: Area to which smaller images are enlarged; the checkpoint's setting by default.
        max_pixels: Area to which larger images are reduced; the checkpoint's setting by default.
        cuda_graphs: On a GPU, record a step of decoding and replay it for the tokens to come: one launch in place of a
            thousand. Without effect on a CPU.
    """

    path: str = "tiny"
    tuning: Tuning = "full"
    lora: Lora = field(default_factory=Lora)
    quantization: Quantization = field(default_factory=Quantization)
    freeze: list[Part] = field(default_factory=list)
    gradient_checkpointing: list[Checkpointed] = field(default_factory=list)
    dtype: Dtype = "float32"
    min_pixels: int | None = None
    max_pixels: int | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        self.path = os.fspath(self.path)  # of pathlib too
        check_known("backbone.", tuning=(self.tuning, Tuning), dtype=(self.dtype, Dtype))
        check_known_lists(
            "backbone.",
            freeze=(self.freeze, Part),
            gradient_checkpointing=(self.gradient_checkpointing, Checkpointed),
        )
        check_kinds("backbone.", lora=(self.lora, Lora), quantization=(self.quantization, Quantization))
        both = set(self.freeze) & set(self.lora.parts)
        if self.tuning != "full" and self.lora.targets is None and both:
            raise ValueError(f"backbone: {sorted(both)} cannot be frozen and get LoRA adapters; drop one of the two")
        if self.tuning == "full" and len(set(self.freeze)) == 3:
            raise ValueError("backbone.freeze names every part: nothing would be trained")
        along_stream = self.lora.along_stream
        if self.tuning == "full" and along_stream != "shared":
            raise ValueError(f"backbone.lora.along_stream={along_stream} needs adapters: set backbone.tuning to lora")
        if self.tuning == "qlora" and along_stream == "renewed":
            raise ValueError(
                "backbone.lora.along_stream=renewed: four-bit weights cannot take in an adapter without rounding it "
                "away; set backbone.tuning to lora, or along_stream to per_task"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Backbone:
        """The backbone whose options, as ``asdict`` of dataclasses gives them, stand in a checkpoint.

        Raises:
            ValueError: They are not those of a backbone.
        """
        try:
            parts = {"lora": Lora(**options["lora"]), "quantization": Quantization(**options["quantization"])}
            return cls(**{**options, **parts})
        except (KeyError, TypeError) as error:
            raise ValueError(f"backbone: another version wrote its options ({error}); give backbone itself") from error

    def load_processor(self) -> PromptProcessor:
        """The tokenizer and image processor that belong to the weights."""
        from cpt_lightning.models.processor import PromptProcessor

        self._check_path()
        return PromptProcessor.load(processor_of(self.path), self.min_pixels, self.max_pixels)

    def load_model(self, on_meta: bool = False) -> QwenVL:
        """The model, in train mode, with what is not tuned frozen.

        Args:
            on_meta: Without weights, which another rank has.
        """
        with torch.device("meta") if on_meta else nullcontext():
            return self._load_model(on_meta)

    def _load_model(self, on_meta: bool) -> QwenVL:
        from cpt_lightning.models.adapters import add_lora, freeze, has_adapters
        from cpt_lightning.models.processor import resolve_path
        from cpt_lightning.models.quantization import settle_quantized
        from cpt_lightning.models.qwen_vl import QwenVL, use_cuda_graphs, weightless

        self._check_path()
        load = weightless if on_meta else QwenVL.from_pretrained
        quantized = {"quantization_config": self.quantization.config} if self.tuning == "qlora" else {}
        model = load(resolve_path(base_of(self.path)), dtype=self.dtype, **quantized)
        if has_adapters(model):
            raise ValueError(f"backbone.path={self.path!r} is an adapter on the hub: download it and give its folder")
        if self.tuning == "qlora":
            settle_quantized(model)
        if self.tuning != "full":
            add_lora(model, self.lora)
        if is_adapter_folder(self.path) and not on_meta:
            load_adapter_folder(model, self.path, self.lora if self.tuning != "full" else None)
        freeze(model, self.freeze)
        modules = {"vision_tower": model.model.visual, "language_model": model.model.language_model}
        for part in self.gradient_checkpointing:
            # Renamed on the way from transformers 5.16 to 5.23, where the old name warns.
            old_name = modules[part].gradient_checkpointing_enable
            getattr(modules[part], "activation_checkpointing_enable", old_name)({"use_reentrant": False})
        use_cuda_graphs(model, self.cuda_graphs)
        return model.train()  # from_pretrained leaves it in eval mode

    def _check_path(self) -> None:
        """A path that looks like a folder must be one, or the hub would be asked for it; and of our kind of model."""
        path = base_of(self.path)
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
        if looks_local and not (Path(path) / "config.json").is_file():
            base = "" if path == self.path else f"its base {path!r}: "
            raise MissingBackbone(
                f"backbone.path={self.path!r}: {base}no config.json there; give a folder of transformers or PEFT, "
                "a hub id or 'tiny'"
            )
        from huggingface_hub import constants, try_to_load_from_cache

        is_here = path == "tiny" or Path(path).is_dir()
        if constants.HF_HUB_OFFLINE and not is_here and not try_to_load_from_cache(path, "config.json"):
            raise MissingBackbone(
                f"backbone.path={path!r} is no folder and not in the cache, and HF_HUB_OFFLINE forbids to ask the hub: "
                f"`hf download {path}` where there is a network, or unset it"
            )
        self._check_kind(path)

    def _check_kind(self, path: str) -> None:
        """Of another model only a few weights would fit, and transformers would draw the others at random."""
        from cpt_lightning.models.processor import resolve_path
        from cpt_lightning.models.qwen_vl import QwenVL

        wanted = QwenVL.config_class.model_type
        try:
            kind = QwenVL.config_class.get_config_dict(resolve_path(path))[0].get("model_type")
        except OSError as error:
            said = str(error).strip().partition("\n")[0]
            raise MissingBackbone(f"backbone.path={self.path!r} cannot be had: {said}") from error
        if kind != wanted:
            raise MissingBackbone(
                f"backbone.path={self.path!r} is a model of type {kind!r}; give a Qwen2.5-VL, whose config.json says "
                f"{wanted!r}"
            )


def load_backbone(path: str = "tiny", **options) -> tuple[QwenVL, PromptProcessor]:
    """Loads a backbone with its processor.

    Args:
        path: Local folder, hub id, or ``"tiny"``.
        **options: Fields of :class:`Backbone`.

    Returns:
        The transformers model, in train mode, and its processor.

    Example:
        >>> model, processor = load_backbone("tiny", freeze=["vision_tower"])
        >>> type(model).__name__
        'Qwen2_5_VLForConditionalGeneration'
    """
    backbone = Backbone(path, **options)
    return backbone.load_model(), backbone.load_processor()
