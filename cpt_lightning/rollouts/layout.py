"""Where every token of groups stands when all of them form one row without padding, and what each looks at."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from cpt_lightning.types import Prompts


@dataclass
class PackedGroups:
    """B groups in one row of L tokens: ``prompt | c1 | ... | cG``, group after group, nothing padded.

    The prompt stands there once, whatever the group size. A completion sees its prompt and itself, never its siblings.
    The last token of a completion predicts nothing, so it has no place in the row.

    Args:
        prompt_mask: ``[B, P]`` bool, the tokens of the left-padded prompts.
        inputs: ``[B, G]`` tokens of each completion that are inputs; G may be 0.
        prompt_places: ``[prompt tokens]`` where the prompts' tokens stand in the row, in order.
        input_places: ``[completion tokens]`` where the completions' tokens stand, in order.
        sources: ``[M]`` place of the hidden state that predicts each of the M tokens to be scored.
        is_input: ``[M]`` bool, whether the token is itself an input: all but each completion's last.
    """

    prompt_mask: Tensor
    inputs: Tensor
    prompt_places: Tensor
    input_places: Tensor
    sources: Tensor
    is_input: Tensor
    _groups: list[_Group] = field(init=False)

    def __post_init__(self) -> None:
        prompts, completions = self.prompt_mask.sum(dim=1).tolist(), self.inputs.tolist()
        self._groups = [_Group(*lengths, device=self.inputs.device) for lengths in zip(prompts, completions)]

    @classmethod
    def of(cls, prompts: Prompts, mask: Tensor | None = None) -> PackedGroups:
        """Lays out prompts, and the completions of the ``[N, T]`` mask behind them."""
        num_prompts, device = len(prompts), prompts.device
        mask = torch.zeros(0, 1, dtype=torch.bool, device=device) if mask is None else mask
        inputs = (mask.sum(dim=1) - 1).clamp(min=0).view(num_prompts, -1)
        parts = torch.cat([prompts.lengths[:, None], inputs], dim=1)
        starts = (parts.flatten().cumsum(dim=0) - parts.flatten()).view_as(parts)
        prompt_mask = prompts.attention_mask.bool()
        places = torch.arange(prompt_mask.shape[1], device=device) - (prompt_mask.shape[1] - prompts.lengths)[:, None]
        completion, step = mask.nonzero(as_tuple=True)
        start = starts[:, 1:].flatten()[completion]
        prompt_end = (starts[:, 0] + prompts.lengths - 1)[completion // max(1, inputs.shape[1])]
        is_input = step < inputs.flatten()[completion]
        return cls(
            prompt_mask=prompt_mask,
            inputs=inputs,
            prompt_places=(starts[:, :1] + places)[prompt_mask],
            input_places=(start + step)[is_input],
            sources=torch.where(step == 0, prompt_end, start + step - 1),
            is_input=is_input,
        )

    def __len__(self) -> int:
        return len(self.prompt_places) + len(self.input_places)

    @property
    def prompt_ends(self) -> Tensor:
        """``[B]`` place of each prompt's last token."""
        return self.prompt_places[self.prompt_mask.sum(dim=1).cumsum(dim=0) - 1]

    def token_ids(self, prompts: Prompts, tokens: Tensor | None = None) -> Tensor:
        """``[1, L]`` ids of the row, from the prompts and the ``[M]`` completion tokens."""
        ids = prompts.input_ids.new_empty(len(self))
        ids[self.prompt_places] = prompts.input_ids[self.prompt_mask]
        if tokens is not None:
            ids[self.input_places] = tokens[self.is_input]
        return ids[None]

    def positions(self, prompt: Tensor) -> Tensor:
        """``[3, 1, L]`` M-RoPE positions from the prompts' ``[3, B, P]``; completions go on where the prompt ended."""
        positions = prompt.new_empty(3, len(self))
        positions[:, self.prompt_places] = prompt[:, self.prompt_mask]
        next_position = prompt.amax(dim=(0, 2)) + 1
        counts = self.inputs.flatten()
        steps = torch.arange(len(self.input_places), device=counts.device)
        steps = steps - (counts.cumsum(dim=0) - counts).repeat_interleave(counts)
        positions[:, self.input_places] = next_position.repeat_interleave(self.inputs.sum(dim=1)) + steps
        return positions[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[1, heads, L, D]``: every group by itself."""
        lengths = [len(group) for group in self._groups]
        parts = zip(self._groups, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([piece for group, *part in parts for piece in group.attend(*part)], dim=2)


class _Group:
    """One group's piece of the row.

    Args:
        prompt_length: Tokens of the prompt.
        inputs: Input tokens of each of the G completions.
        device: Where the row lives.
    """

    def __init__(self, prompt_length: int, inputs: list[int], device: torch.device) -> None:
        self.prompt_length = prompt_length
        self.inputs = inputs
        self.longest = max(inputs, default=0)
        self.is_ragged = any(length < self.longest for length in inputs)
        if self.is_ragged:
            lengths = torch.tensor(inputs, device=device)[:, None]
            steps = torch.arange(self.longest, device=device)
            starts = lengths.cumsum(dim=0) - lengths
            # Behind its end a shorter completion repeats a token that exists; what that gives is dropped again.
            self.padded = (starts + steps).clamp(max=sum(inputs) - 1).flatten()
            self.kept = (steps < lengths).flatten().nonzero().squeeze(1)

    def __len__(self) -> int:
        return self.prompt_length + sum(self.inputs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Pieces of ``[1, heads, len(self), D]``, in order."""
        if len(self.inputs) <= 1:  # a completion without siblings just goes on from its prompt
            return [attention(query, key, value, is_causal=True, enable_gqa=True)]
        end = self.prompt_length
        pieces = [attention(*(x[:, :, :end] for x in (query, key, value)), is_causal=True, enable_gqa=True)]
        if self.longest:
            pieces.append(self._completions(query[0, :, end:], key[0], value[0])[None])
        return pieces

    def _completions(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[heads, C, D]`` for the C input tokens of all completions, from ``[kv_heads, P + C, D]`` keys and values.

        The query heads that share a key head stand one after the other as further queries: keys are not repeated.
        """
        kv_heads, size = key.shape[0], key.shape[2]
        keys, values = self._seen(key), self._seen(value)  # [G, kv_heads, P + T, D]
        queries = self._by_completion(query).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [G, kv_heads, rep * T, D]
        repeats = query.shape[0] // kv_heads
        output = attention(queries, keys, values, attn_mask=self._mask(repeats, query))
        output = output.view(len(self.inputs), -1, self.longest, size).transpose(0, 1).flatten(1, 2)
        return output[:, self.kept] if self.is_ragged else output

    def _seen(self, row: Tensor) -> Tensor:
        prompt, completions = row[:, : self.prompt_length], self._by_completion(row[:, self.prompt_length :])
        return torch.cat([prompt.expand(len(completions), -1, -1, -1), completions], dim=2)

    def _by_completion(self, row: Tensor) -> Tensor:
        """``[G, heads, T, D]`` of ``[heads, C, D]``."""
        padded = row[:, self.padded] if self.is_ragged else row
        return padded.unflatten(1, (len(self.inputs), self.longest)).transpose(0, 1)

    def _mask(self, repeats: int, like: Tensor) -> Tensor:
        """``[rep * T, P + T]`` additive: the prompt, and of the completion what came before."""
        order = torch.arange(self.longest, device=like.device)
        later = (order[:, None] < order[None, :]).repeat(repeats, 1)
        mask = like.new_zeros(len(later), self.prompt_length + self.longest)
        mask[:, self.prompt_length :].masked_fill_(later, -torch.inf)
        return mask
