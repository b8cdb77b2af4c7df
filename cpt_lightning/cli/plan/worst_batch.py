"""The largest batch that a run may meet: the longest prompts, the largest images, completions of full length."""

from __future__ import annotations

import torch

from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.types import Completions, Prompts

AROUND_IMAGE = 2
"""Tokens that every image has beside its own: where it begins and where it ends."""


def longest_prompts(
    model: QwenVL, num_prompts: int, num_tokens: int, max_pixels: int | None, num_images: int = 1
) -> Prompts:
    """Prompts of ``num_tokens`` tokens with images as large as the limit of pixels and the prompt allow.

    Token ids and grids are real, for code asks them for sizes; pixels are on the meta device.

    Raises:
        ValueError: The prompt is too short for its images.
    """
    vision = model.config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    room = num_tokens // max(1, num_images) - AROUND_IMAGE - 1
    if num_images and room < 1:
        raise ValueError(
            f"prompt_tokens={num_tokens} has no room for images={num_images}; raise the one or lower the other"
        )
    rows, columns = _near_square(room if max_pixels is None else min(room, max_pixels // side**2))
    image = [model.config.vision_start_token_id, *[model.config.image_token_id] * (rows * columns)]
    images = [*image, model.config.vision_end_token_id] * num_images
    row = torch.tensor([*images, *[_text_token(model)] * (num_tokens - len(images))])
    ids = row.repeat(num_prompts, 1)
    prompts = Prompts(ids, torch.ones_like(ids), [num_images] * num_prompts)
    if num_images:
        merge = vision.spatial_merge_size
        grid = torch.tensor([[1, rows * merge, columns * merge]]).repeat(num_prompts * num_images, 1)
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        prompts.image_grid_thw = grid
        prompts.pixel_values = torch.empty(int(grid.prod(dim=1).sum()), patch_dim, device="meta")
    return prompts


def full_completions(model: QwenVL, num_completions: int, num_tokens: int) -> Completions:
    """Completions that use up all their tokens."""
    ids = torch.full((num_completions, num_tokens), _text_token(model))
    return Completions(ids, torch.ones_like(ids, dtype=torch.bool))


def _text_token(model: QwenVL) -> int:
    config = model.config
    special = {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id, config.video_token_id}
    return min(set(range(len(special) + 1)) - special)


def _near_square(area: int) -> tuple[int, int]:
    """The largest rectangle of whole tokens within an area, its sides as alike as can be.

    >>> _near_square(13)
    (3, 4)
    """
    rows = max(1, int(area**0.5))
    return rows, max(1, area // rows)
