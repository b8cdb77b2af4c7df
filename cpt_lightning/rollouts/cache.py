"""Keys and values for decoding groups: those of a prompt are kept once, whatever the group size."""

from __future__ import annotations

import torch
from torch import Tensor

from cpt_lightning.rollouts.layout import PackedGroups


class PromptPass:
    """The pattern of the pass over the prompts: attends as usual, and keeps keys and values.

    Args:
        layout: Prompts without completions.
    """

    def __init__(self, layout: PackedGroups) -> None:
        self.layout = layout
        self.layers: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[1, heads, L, D]`` for all prompts in one row."""
        self.layers.append((self._by_prompt(key), self._by_prompt(value)))
        return self.layout.attend(layer, query, key, value)

    def _by_prompt(self, row: Tensor) -> Tensor:
        """``[B, kv_heads, P, D]``, zero on the padding."""
        mask = self.layout.prompt_mask
        padded = row.new_zeros(*mask.shape, row.shape[1], row.shape[3])
        padded[mask] = row[0].transpose(0, 1)
        return padded.transpose(1, 2).contiguous()


class GroupCache:
    """The pattern of a decoding step: one new token of each of B * G completions, all in one row.

    A query scores its prompt's keys, which the whole group shares, and those of its own completion; one softmax goes
    over both (bifurcated attention, arXiv 2403.08845). Room for the completions is taken at once.

    Args:
        prompts: What the pass over the prompts kept.
        group_size: G.
        max_new_tokens: Room for each completion.
    """

    def __init__(self, prompts: PromptPass, group_size: int, max_new_tokens: int) -> None:
        mask = prompts.layout.prompt_mask
        self.prompts = prompts.layers
        self.completions = [tuple(_room(x, group_size, max_new_tokens) for x in layer) for layer in prompts.layers]
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
        self.padding = None if mask.all() else bias[:, None, None, None]
        self.length = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[1, heads, N, D]`` from queries of that shape and new keys and values ``[1, kv_heads, N, D]``."""
        prompt_keys, prompt_values = self.prompts[layer]
        keys, values = self._with_new(layer, key, value)
        kv_heads, group_size = keys.shape[1:3]
        query = query[0].unflatten(0, (kv_heads, -1)).unflatten(2, (-1, group_size)).permute(2, 0, 3, 1, 4)
        query = (query * query.shape[-1] ** -0.5).contiguous()  # [B, kv_heads, G, rep, D]: one reader per prompt key
        shared = (query.flatten(2, 3) @ prompt_keys.transpose(2, 3)).view(*query.shape[:4], -1)
        shared = shared if self.padding is None else shared + self.padding
        scores = torch.cat([shared, query @ keys.transpose(3, 4)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        shared, own = weights.split([prompt_keys.shape[2], keys.shape[3]], dim=-1)
        output = (shared.flatten(2, 3) @ prompt_values).view(query.shape) + own @ values
        return output.permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)[None]

    def _with_new(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """The layer's keys and values ``[B, kv_heads, G, T, D]`` of all completions, those of the new token included."""
        rooms = self.completions[layer]
        for room, new in zip(rooms, (key, value), strict=True):
            room[:, :, :, self.length] = new[0].unflatten(1, (-1, room.shape[2])).transpose(0, 1)
        return [room[:, :, :, : self.length + 1] for room in rooms]

    def keep(self, prompts: Tensor, members: Tensor) -> None:
        """Drops all completions but some.

        Args:
            prompts: ``[B']`` prompts that have completions left.
            members: ``[B', G']`` which of its completions each of them keeps.
        """
        self.prompts = [tuple(x[prompts] for x in layer) for layer in self.prompts]
        self.padding = None if self.padding is None else self.padding[prompts]
        self.completions = [
            tuple(room[prompts[:, None], :, members].transpose(1, 2).contiguous() for room in layer)
            for layer in self.completions
        ]


def _room(prompt: Tensor, group_size: int, length: int) -> Tensor:
    """``[B, kv_heads, G, length, D]`` for what comes behind ``[B, kv_heads, P, D]``."""
    num_prompts, kv_heads, _, size = prompt.shape
    return prompt.new_zeros(num_prompts, kv_heads, group_size, length, size)
