"""Four-bit weights under adapters (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), through bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from cpt_lightning.tasks.checks import check_known

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from cpt_lightning.models.qwen_vl import QwenVL

QuantType = Literal["nf4", "fp4"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]

KEPT_WHOLE = ["lm_head", "model.visual"]
"""Not quantised, beside embeddings and norms: the output matrix, which sampling and log-probabilities read itself, and
the vision tower with its projector, a small share of the weights."""


@dataclass
class Quantization:
    """How the linear layers of the language model are stored with ``tuning: qlora``.

    Args:
        quant_type: ``nf4`` spaces the 16 values like those of a normal distribution, ``fp4`` like a float.
        double_quant: Quantise the scales too: 0.4 bits less per weight.
        compute_dtype: Precision in which a layer is multiplied once its weights are unpacked.
    """

    quant_type: QuantType = "nf4"
    double_quant: bool = True
    compute_dtype: ComputeDtype = "bfloat16"

    def __post_init__(self) -> None:
        check_known(
            "quantization.",
            quant_type=(self.quant_type, QuantType),
            compute_dtype=(self.compute_dtype, ComputeDtype),
        )

    @property
    def config(self) -> BitsAndBytesConfig:
        """What ``from_pretrained`` of transformers takes."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
            llm_int8_skip_modules=KEPT_WHOLE,
        )

    @property
    def bytes_per_weight(self) -> float:
        """Half a byte, and a share of the scale of each 64 weights: 4 bytes, or 1 and 4 more for 256 of these."""
        return 0.5 + ((1 + 4 / 256) / 64 if self.double_quant else 4 / 64)


def settle_quantized(model: QwenVL) -> None:
    """Makes forward passes leave the frozen four-bit layers as they are.

    Of PEFT's ``prepare_model_for_kbit_training`` only the freezing is needed here, and ``add_lora`` does that: it would
    also cast every other weight to float32, embeddings and vision tower too, and its gradient of the inputs serves
    reentrant checkpointing, which is not used.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # Otherwise bitsandbytes (0.50) repacks weights in eval mode on some CPUs: a rollout would change them.
            layer.support_avx512bf16_for_cpu = False
            if layer.bias is not None:  # the first forward would do so
                layer.bias.data = layer.bias.data.to(layer.compute_dtype)
