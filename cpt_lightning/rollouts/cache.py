"""Keys and values for decoding groups: those of a prompt are kept once, whatever the group size."""

from __future__ import annotations

import torch
from torch import Tensor

from cpt_lightning.models.attention import Pattern
from cpt_lightning.types import Prompts, PromptState


class GroupCache(Pattern):
    """The pattern of a decoding step: one new token of each of B * G completions, all in one row.

    A query scores its prompt's keys, which the whole group shares, and those of its own completion; one softmax goes
    over both (bifurcated attention, arXiv 2403.08845). Room for the completions is taken at once. Of it a step reads
    the places that are full, or always the same window, see :meth:`fix_window`.

    Args:
        prompts: B prompts.
        state: What the model made of them.
        group_size: G.
        max_new_tokens: Room for each completion.
    """

    decoding = True

    def __init__(self, prompts: Prompts, state: PromptState, group_size: int, max_new_tokens: int) -> None:
        layers = zip(state.keys, state.values, strict=True)
        self.prompts = [(keys.contiguous(), values.contiguous()) for keys, values in layers]
        sizes = (group_size, max_new_tokens)
        self.completions = [(_room(keys, *sizes), _room(values, *sizes)) for keys, values in self.prompts]
        self.mask = prompts.attention_mask.bool()
        self.has_padding = not self.mask.all()
        self.room = max_new_tokens
        self.length = 0
        self.fix_window(None)

    def fix_window(self, size: int | None) -> None:
        """Lets every step from now on read the same places of each completion, so that it has the same shapes.

        Those that are not full yet are masked. A step past the window is an error.

        Args:
            size: How many; no more than there is room for. ``None`` reads what is full, one place more at each step.
        """
        self.window = None if size is None else min(size, self.room)
        self.place = None if size is None else self.mask.new_tensor([self.length], dtype=torch.long)
        self.bias = None
        if self.window is not None or self.has_padding:
            seen = self.mask.new_ones(len(self.mask), self.window or self.room)
            if self.window is not None:
                seen[:, self.length + 1 :] = False
            seen = torch.cat([self.mask, seen], dim=1)[:, None, None, None]
            self.bias = self.prompts[0][0].new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)

    @property
    def is_full(self) -> bool:
        """Whether there is no place for a token in the window."""
        return self.length == (self.room if self.window is None else self.window)

    def advance(self) -> None:
        """Goes on to the next token."""
        self.length += 1
        if self.place is not None and self.bias is not None and not self.is_full:
            self.place += 1
            self.bias[..., self.mask.shape[1] + self.length] = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[1, heads, N, D]`` from queries of that shape and new keys and values ``[1, kv_heads, N, D]``."""
        prompt_keys, prompt_values = (x.flatten(0, 1) for x in self.prompts[layer])
        keys, values = self._with_new(layer, key, value)
        num_prompts, kv_heads, group_size, _, size = keys.shape
        query = query[0].unflatten(0, (kv_heads, -1)).unflatten(2, (num_prompts, group_size)).permute(2, 0, 3, 1, 4)
        shape = query.shape  # [B, kv_heads, G, rep, D]: all G * rep readers of a prompt's keys stand together
        by_prompt = query.reshape(num_prompts * kv_heads, -1, size)
        by_completion = by_prompt.view(-1, shape[3], size)
        scores = _scores(by_prompt, prompt_keys).view(*shape[:4], -1)
        scores = torch.cat([scores, _scores(by_completion, keys.flatten(0, 2)).view(*shape[:4], -1)], dim=-1)
        if self.bias is not None:
            scores += self.bias[..., : scores.shape[-1]]
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        shared, own = weights.split([prompt_keys.shape[1], keys.shape[3]], dim=-1)
        output = torch.bmm(own.flatten(0, 2), values.flatten(0, 2)).view_as(by_prompt)
        output = torch.baddbmm(output, shared.reshape(*by_prompt.shape[:2], -1), prompt_values)
        # A token's heads side by side, as the output projection wants them: no second copy is made there.
        return output.view(shape).transpose(1, 2).flatten(2, 3).flatten(0, 1).transpose(0, 1)[None]

    def _with_new(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """The layer's keys and values ``[B, kv_heads, G, T, D]`` of all completions, the new token's included."""
        rooms = self.completions[layer]
        for room, new in zip(rooms, (key, value), strict=True):
            new = new[0].unflatten(1, (-1, room.shape[2])).transpose(0, 1)
            if self.place is None:
                room[:, :, :, self.length] = new
            else:
                room.index_copy_(3, self.place, new.unsqueeze(3))
        return [room[:, :, :, : self.window or self.length + 1] for room in rooms]

    def keep(self, prompts: Tensor, members: Tensor) -> None:
        """Drops all completions but some.

        Args:
            prompts: ``[B']`` prompts that have completions left.
            members: ``[B', G']`` which of its completions each of them keeps.
        """
        self.prompts = [(keys[prompts], values[prompts]) for keys, values in self.prompts]
        self.mask = self.mask[prompts]
        self.bias = None if self.bias is None else self.bias[prompts]
        self.completions = [
            (_members(keys, prompts, members), _members(values, prompts, members)) for keys, values in self.completions
        ]


def _members(room: Tensor, prompts: Tensor, members: Tensor) -> Tensor:
    """``[B', kv_heads, G', T, D]`` of ``[B, kv_heads, G, T, D]``."""
    return room[prompts[:, None], :, members].transpose(1, 2).contiguous()


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """``[batch, Q, K]`` scaled products of ``[batch, Q, D]`` and ``[batch, K, D]``."""
    scale = query.shape[-1] ** -0.5
    return torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=scale)


def _room(prompt: Tensor, group_size: int, length: int) -> Tensor:
    """``[B, kv_heads, G, length, D]`` for what comes behind ``[B, kv_heads, P, D]``."""
    num_prompts, kv_heads, _, size = prompt.shape
    return prompt.new_zeros(num_prompts, kv_heads, group_size, length, size)
