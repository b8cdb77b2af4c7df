"""The shape of the embedded base: Qwen2.5-VL in every part, at 3 M parameters."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig

TEXT: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 576,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    # Qwen2.5-VL divides half a head into time, height and width like 16:24:24 of 64; here 6:5:5 of 16.
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 384,
    "out_hidden_size": TEXT["hidden_size"],
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [2],
}


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    """The configuration that belongs to a tokenizer: its vocabulary size and the ids of its special tokens."""
    token_id = tokenizer.convert_tokens_to_ids
    ends = {"bos_token_id": token_id("<|endoftext|>"), "eos_token_id": token_id("<|im_end|>")}
    config = Qwen2_5_VLConfig(
        # No pad_token_id: transformers would hold that embedding at zero, and its output logit with it.
        text_config={**TEXT, **ends, "vocab_size": len(tokenizer), "tie_word_embeddings": True},
        vision_config=VISION,
        tie_word_embeddings=True,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config
