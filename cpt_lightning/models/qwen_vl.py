"""Qwen2.5-VL taken apart at its joints: images to features, prompts to embeddings, embeddings to hidden states.

Group rollouts and packed updates need these steps apart, because the image and the prompt are paid for once while
many completions follow. All functions take the plain transformers model; adapters live inside it (see adapters.py).
Another vision-language model is another file with these functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from cpt_lightning.models.attention import Pattern
from cpt_lightning.models.decoder import decode, use_patterns
from cpt_lightning.models.vision import use_fast_vision, vision_layout
from cpt_lightning.types import Prompts

QwenVL: TypeAlias = Qwen2_5_VLForConditionalGeneration


def weightless(path: str, dtype: str) -> QwenVL:
    """The model of a folder or hub id without its weights, to be called under ``torch.device("meta")``."""
    config = QwenVL.config_class.from_pretrained(path)
    kept = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    return QwenVL._from_config(config, dtype=kept)


def check_model(model: nn.Module) -> None:
    """Refuses a model within a wrapper, behind which its parts are not found.

    Raises:
        TypeError: Names the wrapper, and how adapters get inside the model.
    """
    if not isinstance(model, QwenVL):  # type: ignore[misc]  # transformers is untyped
        raise TypeError(
            f"the model is a {type(model).__name__}; give the {QwenVL.__name__} itself: of PEFT's wrapper it is "
            "get_base_model(), with the adapters inside it; a module puts them there with backbone.tuning=lora"
        )


def use_cuda_graphs(model: QwenVL, wanted: bool) -> None:
    """Notes on a model whether its steps of decoding may be recorded on a GPU, see rollouts/decoding.py."""
    model._uses_cuda_graphs = wanted


def uses_cuda_graphs(model: QwenVL) -> bool:
    """Whether they may; not of a model on which nothing is noted."""
    return getattr(model, "_uses_cuda_graphs", False)


def vision_is_frozen(model: QwenVL) -> bool:
    """Whether image features stay what they are over an update, so that a rollout's may be used again."""
    return not any(parameter.requires_grad for parameter in model.model.visual.parameters())


def has_dropout(model: QwenVL) -> bool:
    """Whether two passes in train mode give different results."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """The module with nothing dropped out, for as long as it lasts; what else train mode means stays as it is."""
    dropouts = [part for part in module.modules() if isinstance(part, nn.Dropout) and part.training]
    for part in dropouts:
        part.eval()
    try:
        yield
    finally:
        for part in dropouts:
            part.train()


def encode_images(model: QwenVL, prompts: Prompts) -> Tensor | None:
    """Runs vision tower and projector over every image of the batch, unless the prompts hold the features already.

    Returns:
        ``[num_image_tokens, H]`` features of all images in order, or ``None`` if no prompt has an image.
    """
    pixels, grid = prompts.pixel_values, prompts.image_grid_thw
    if prompts.image_features is not None or pixels is None or grid is None:
        return prompts.image_features
    use_fast_vision(model)
    layout = vision_layout(model, grid, pixels.device)
    output = model.model.get_image_features(pixels, grid, return_dict=True, **layout)
    return torch.cat(tuple(output.pooler_output))


def embed(model: QwenVL, ids: Tensor) -> Tensor:
    """``[..., H]`` input embeddings of token ids ``[...]`` that hold no image, as those of completions."""
    return model.get_input_embeddings()(ids)


def embed_prompts(model: QwenVL, ids: Tensor, image_features: Tensor | None) -> Tensor:
    """``[..., H]`` input embeddings of token ids ``[...]``, image features in the place of their placeholders.

    Args:
        model: The backbone.
        ids: Token ids of any shape.
        image_features: ``[num_image_tokens, H]`` in reading order, or ``None`` if the ids hold no image.

    Raises:
        ValueError: The ids hold another number of image tokens than there are features.
    """
    embeds = embed(model, ids)
    is_image = ids == model.config.image_token_id
    num_tokens, num_features = int(is_image.sum()), 0 if image_features is None else len(image_features)
    if num_tokens != num_features:
        raise ValueError(f"{num_tokens} image tokens in the prompts, but {num_features} image features")
    if image_features is None:
        return embeds
    return embeds.masked_scatter(is_image.unsqueeze(-1), image_features.to(embeds.dtype))


def prompt_positions(model: QwenVL, prompts: Prompts) -> Tensor:
    """``[3, B, P]`` M-RoPE positions (time, height, width) of the prompts; 0 on padding."""
    # On the host: it goes through the tokens in Python, and would wait for a GPU at each image.
    ids, grid = prompts.input_ids.cpu(), prompts.image_grid_thw
    positions, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        image_grid_thw=grid,
        attention_mask=prompts.attention_mask.cpu(),
    )
    return positions.to(prompts.device)


def hidden_states(model: QwenVL, embeds: Tensor, positions: Tensor, pattern: Pattern) -> Tensor:
    """Runs the language model over embeddings; the pattern says what each token looks at.

    Args:
        model: The backbone.
        embeds: ``[B, Q, H]`` input embeddings.
        positions: ``[3, B, Q]`` M-RoPE positions.
        pattern: Computes the attention of every layer, and keeps keys and values where later tokens want them.

    Returns:
        ``[B, W, H]`` final hidden states of the tokens that the pattern wants, all Q by default.
    """
    use_patterns(model)
    if pattern.decoding:
        return decode(model.model.language_model, embeds, positions, pattern)
    output = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask={"full_attention": pattern},  # a dict keeps transformers from building masks of its own
        use_cache=False,
    )
    return output.last_hidden_state


def output_weight(model: QwenVL) -> Tensor:
    """``[V, H]`` matrix that turns hidden states into logits."""
    return model.get_output_embeddings().weight
