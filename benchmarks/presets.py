"""The models that benchmarks run: the embedded base, Qwen2.5-VL of 6 M and 100 M parameters, and the 3B and 7B shapes.

All but the embedded base have random weights, the same for the same seed. All speak with the embedded base's
tokenizer, whose ids lie within every vocabulary; of a larger one the other tokens are called by their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig

from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import add_lora, freeze
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import QwenVL, use_cuda_graphs
from cpt_lightning.models.tiny.config import TEXT, VISION, tiny_config

TEXT_6M = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "mrope_section": [4, 6, 6],
}
VISION_6M = {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 384, "fullatt_block_indexes": [3]}
TEXT_100M = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 3072,
    "mrope_section": [8, 12, 12],
}
VISION_100M = {"depth": 6, "hidden_size": 384, "num_heads": 6, "intermediate_size": 1152, "fullatt_block_indexes": [5]}
TEXT_3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "mrope_section": [16, 24, 24],
    "vocab_size": 151936,
}
TEXT_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "mrope_section": [16, 24, 24],
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
VISION_QWEN = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cpu-6m": (TEXT_6M, VISION_6M),
    "cpu-100m": (TEXT_100M, VISION_100M),
    "qwen2.5-vl-3b": (TEXT_3B, VISION_QWEN),
    "qwen2.5-vl-7b": (TEXT_7B, VISION_QWEN),
}
PRESETS = ("tiny", *SHAPES)
HIDDEN_SIZES = {"tiny": TEXT["hidden_size"]} | {name: text["hidden_size"] for name, (text, _) in SHAPES.items()}


class EndlessProcessor(PromptProcessor):
    """The embedded base's processor for images of any size, under which no completion ends before its last token."""

    @property
    def stop_token_ids(self) -> list[int]:
        """None."""
        return []

    @property
    def banned_token_ids(self) -> list[int]:
        """What must not be sampled, and what would end a completion."""
        return [*super().banned_token_ids, *super().stop_token_ids]


@dataclass
class PresetBackbone(Backbone):
    """A backbone whose ``path`` is the name of a preset, made in place on its device.

    Args:
        device: Where the weights are made.
        seed: Of random weights.
    """

    device: str = "cpu"
    seed: int = 0

    def load_processor(self) -> EndlessProcessor:
        """The processor of all presets, with a text for every token that the preset may sample."""
        processor = EndlessProcessor.load("tiny", min_pixels=28 * 28, max_pixels=2**24)
        # Without texts of their own most completions would be empty, of equal reward, and nothing to learn from.
        vocabulary = SHAPES[self.path][0].get("vocab_size", 0) if self.path in SHAPES else 0
        processor.tokenizer.add_tokens([f"<{token}>" for token in range(len(processor.tokenizer), vocabulary)])
        return processor

    def load_model(self, on_meta: bool = False) -> QwenVL:
        """The preset's model, in train mode, tuned as the other options say."""
        if self.path == "tiny":
            model = super().load_model(on_meta)
            return model if on_meta else model.to(self.device)
        config = preset_config(self.path, self.load_processor())
        torch.manual_seed(self.seed)
        with torch.device("meta" if on_meta else self.device):
            model = QwenVL._from_config(config, dtype=getattr(torch, self.dtype), attn_implementation="sdpa")
            if self.tuning == "lora":
                add_lora(model, self.lora)
        freeze(model, self.freeze)
        modules = {"vision_tower": model.model.visual, "language_model": model.model.language_model}
        for part in self.gradient_checkpointing:
            modules[part].activation_checkpointing_enable({"use_reentrant": False})
        use_cuda_graphs(model, self.cuda_graphs)
        return model.train()


def preset_config(preset: str, processor: PromptProcessor) -> Qwen2_5_VLConfig:
    """The configuration of a preset, with the special tokens of the embedded base."""
    text, vision = SHAPES[preset]
    base = tiny_config(processor.tokenizer).to_dict()
    text = {"tie_word_embeddings": True, **text}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope_section")}
    special = {name: token for name, token in base.items() if name.endswith("_token_id")}
    ends = {name: base["text_config"][name] for name in ("bos_token_id", "eos_token_id", "vocab_size")}
    return Qwen2_5_VLConfig(
        text_config={**TEXT, **ends, "max_position_embeddings": 32768, "rope_parameters": rope, **text},
        vision_config={**VISION, **vision, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
        **special,
    )
