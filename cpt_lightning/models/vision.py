"""The vision tower of Qwen2.5-VL, its windows attended to at once and its patches projected by a matrix product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from cpt_lightning.models.norms import use_fast_norms

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

WINDOWS = "windows_like_flash"
"""Attention of the vision tower. With "flash" in its name transformers hands over all windows at once."""


def use_fast_vision(model: QwenVL) -> None:
    """Makes the vision tower compute the same in less time."""
    tower = model.model.visual
    tower.config._attn_implementation = WINDOWS
    if not isinstance(tower.patch_embed, PatchProjection):
        tower.patch_embed.__class__ = PatchProjection
        use_fast_norms(tower)


def vision_layout(model: QwenVL, grid_thw: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Where patches stand and which look at each other, as the tower's forward takes it.

    On a GPU the tower itself would wait for it at each image. What windows are is asked on the host, see `_places`.

    Args:
        model: The backbone.
        grid_thw: ``[num_images, 3]`` on the CPU.
        device: Where the patches are.
    """
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    order, windows = get_vision_window_index(grid_thw, merge, vision.window_size, vision.patch_size)
    moved = {"position_ids": get_vision_position_ids(grid_thw, merge), "window_index": order}
    moved = {name: each.to(device, non_blocking=True) for name, each in moved.items()}
    return {**moved, "cu_seqlens": get_vision_cu_seqlens(grid_thw), "cu_window_seqlens": windows}


class PatchProjection(Qwen2_5_VisionPatchEmbed):
    """The projection of patches. As a convolution whose stride is its kernel it takes four times as long (CPU)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[num_patches, width]`` from ``[num_patches, patch_dim]``."""
        if type(self.proj) is not nn.Conv3d:  # an adapter
            return super().forward(hidden_states)
        weight = self.proj.weight
        return linear(hidden_states.to(weight.dtype), weight.flatten(1))


def _window_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    cu_seq_lens_q: Tensor,
    **kwargs,
) -> tuple[Tensor, None]:
    """Full attention within each window ``cu[i]:cu[i + 1]`` of the only row; windows of one size are one batch."""
    places = _places(cu_seq_lens_q, query.device)
    outputs = []
    for size, place in places.items():
        # index_select: the backward of advanced indexing adds up element by element on the CPU.
        rows = (x if len(places) == 1 else x.index_select(2, place) for x in (query, key, value))
        q, k, v = (_cut(row, size) for row in rows)
        outputs.append(attention(q, k, v).transpose(1, 2).flatten(0, 1))
    if len(places) == 1:
        return outputs[0].unsqueeze(0), None
    output = torch.cat(outputs)
    return output.new_empty(output.shape).index_copy(0, torch.cat([*places.values()]), output).unsqueeze(0), None


def _places(cu_seq_lens: Tensor, device: torch.device) -> dict[int, Tensor]:
    """For each size of windows the places of the tokens in all of them; looked up once for all blocks of a forward."""
    if (known := _PLACES.get(cu_seq_lens)) is None:
        lengths = cu_seq_lens.diff()
        known = _PLACES[cu_seq_lens] = {
            size: (cu_seq_lens[:-1][lengths == size, None] + torch.arange(size)).flatten().to(device, non_blocking=True)
            for size in lengths.unique().tolist()
        }
    return known


def _cut(row: Tensor, size: int) -> Tensor:
    """``[windows, heads, size, D]`` from ``[1, heads, windows * size, D]``."""
    return row[0].unflatten(1, (-1, size)).transpose(0, 1)


_PLACES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

AttentionInterface.register(WINDOWS, _window_attention)
