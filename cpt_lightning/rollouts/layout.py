"""Sequences in one row without padding, and what each token of the row looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpt_lightning.models.attention import Pattern, causal_attention
from cpt_lightning.types import Prompts, PromptState

ALIKE = 0.8
"""Share of the longest's length down to which sequences are attended to together."""


class CausalRow(Pattern):
    """Separate sequences, one after the other in a row of L tokens; each is causal and sees no other.

    A GPU, which a short sequence does not fill, attends to those of about one length together.

    Args:
        lengths: Tokens of each sequence.
        num_wanted: Tokens at the end of each sequence whose final hidden state is wanted.
        device: Where the row lives.
    """

    def __init__(self, lengths: Sequence[int], num_wanted: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.num_wanted = list(num_wanted)
        ends = torch.tensor(self.lengths).cumsum(dim=0)
        counts = torch.tensor(self.num_wanted)
        before_end = counts.cumsum(dim=0).repeat_interleave(counts) - torch.arange(int(counts.sum()))
        self.wanted = (ends.repeat_interleave(counts) - before_end).to(device, non_blocking=True)
        self._together = None if device.type == "cpu" else _Together(self.lengths, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[1, heads, Q, D]`` for queries of all L tokens, or of the wanted ones."""
        is_whole = query.shape[2] == sum(self.lengths)
        if is_whole and self._together is not None:
            return self._together.attend(query[0], key[0], value[0])[None]
        asking = self.lengths if is_whole else self.num_wanted
        parts = zip(query.split(asking, 2), key.split(self.lengths, 2), value.split(self.lengths, 2), strict=True)
        return torch.cat([causal_attention(*part) for part in parts], dim=2)


class PromptPass(CausalRow):
    """Prompts in one row; keeps every layer's keys and values.

    Args:
        prompts: B prompts.
    """

    def __init__(self, prompts: Prompts) -> None:
        super().__init__(prompts.lengths.tolist(), [1] * len(prompts), prompts.device)
        self.shape = prompts.attention_mask.shape
        self.places = prompts.attention_mask.flatten().nonzero().squeeze(1)  # [L] of the tokens among B * P
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[1, heads, Q, D]``, and keeps what completions will look at."""
        # Gradient checkpointing comes here again and has to compute the same; what counts is what came first.
        self.keys.setdefault(layer, self._by_prompt(key))
        self.values.setdefault(layer, self._by_prompt(value))
        return super().attend(layer, query, key, value)

    def _by_prompt(self, row: Tensor) -> Tensor:
        """``[B, kv_heads, P, D]`` of ``[1, kv_heads, L, D]``."""
        if row.shape[2] == self.shape.numel():
            return row[0].unflatten(1, self.shape).transpose(0, 1)
        padded = row.new_zeros(self.shape.numel(), row.shape[1], row.shape[3])
        padded = padded.index_copy(0, self.places, row[0].transpose(0, 1))
        return padded.unflatten(0, self.shape).transpose(1, 2)


class GroupBranches(Pattern):
    """The completions of B groups in one row; each goes on from its prompt and does not see its siblings.

    The last token of a completion predicts nothing, so it has no place in the row.

    Args:
        state: What the model made of the prompts.
        prompt_lengths: ``[B]`` tokens of each prompt.
        mask: ``[N, T]`` tokens of the completions, group by group.
    """

    def __init__(self, state: PromptState, prompt_lengths: Tensor, mask: Tensor) -> None:
        self.state = state
        self.prompt_lengths = prompt_lengths.tolist()
        inputs = (mask.sum(dim=1) - 1).clamp(min=0)
        completion, step = mask.nonzero(as_tuple=True)
        group = completion // (len(mask) // len(self.prompt_lengths))
        starts = inputs.cumsum(dim=0) - inputs
        self.is_input = step < inputs[completion]  # [M] of the M tokens to be scored
        # [M] which of the B prompts' and L completion tokens' hidden states predicts each
        self.sources = torch.where(step == 0, group, len(self.prompt_lengths) + starts[completion] + step - 1)
        self.positions = (state.next_position[group] + step)[self.is_input].expand(3, 1, -1)
        lengths = inputs.view(len(self.prompt_lengths), -1).tolist()
        self._groups = [_Ragged(group, mask.device) for group in lengths]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[1, heads, L, D]``, group by group."""
        sizes = [len(group) for group in self._groups]
        parts = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True)
        groups = [self._group(number, layer, *part) for number, part in enumerate(parts) if sizes[number]]
        return torch.cat(groups, dim=1)[None]

    def _group(self, number: int, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[heads, C, D]`` for the C tokens of a group's completions."""
        ragged = self._groups[number]
        keys, values = (
            torch.cat([prompt.expand(len(ragged.lengths), -1, -1, -1), ragged.pad(own)], dim=2)
            for prompt, own in (
                (self._prompt(self.state.keys[layer], number), key),
                (self._prompt(self.state.values[layer], number), value),
            )
        )
        return ragged.unpad(causal_attention(ragged.pad(query), keys, values))

    def _prompt(self, layer: Tensor, number: int) -> Tensor:
        """``[kv_heads, P, D]`` of a prompt, without padding."""
        return layer[number, :, layer.shape[2] - self.prompt_lengths[number] :]


class _Together:
    """Sequences of a row, those of about one length as one batch: padding on the right is no past of any token.

    Args:
        lengths: Of the sequences.
        device: Where the row lives.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        batches: list[list[int]] = []
        for number in order:
            if not batches or lengths[number] < ALIKE * batches[-1][0]:
                batches.append([])
            batches[-1].append(lengths[number])
        self._batches = [_Ragged(batch, device) for batch in batches]
        self._sorted = self._back = None
        if order != list(range(len(lengths))):
            tokens = torch.arange(sum(lengths)).split(lengths)
            places = torch.cat([tokens[number] for number in order])
            self._sorted, self._back = (each.to(device, non_blocking=True) for each in (places, places.argsort()))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[heads, L, D]``, every sequence causal, from queries, keys and values of all L tokens."""
        sizes = [len(batch) for batch in self._batches]
        by_length = (row if self._sorted is None else row.index_select(1, self._sorted) for row in (query, key, value))
        parts = zip(self._batches, *(row.split(sizes, dim=1) for row in by_length), strict=True)
        heads = [batch.unpad(causal_attention(*map(batch.pad, rows))) for batch, *rows in parts]
        row = heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)
        return row if self._back is None else row.index_select(1, self._back)


class _Ragged:
    """G pieces of a row, and the same padded to the longest, T.

    Args:
        lengths: Of the pieces.
        device: Where the row lives.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.longest = max(lengths)
        self._places = None
        if any(length < self.longest for length in lengths):
            counts = torch.tensor(lengths)[:, None]
            steps = torch.arange(self.longest)
            # Behind its end a shorter piece repeats a token that exists; what that gives is dropped again.
            self._places = (
                (counts.cumsum(dim=0) - counts + steps).clamp(max=len(self) - 1).flatten().to(device, non_blocking=True)
            )
            self._kept = (steps < counts).flatten().nonzero().squeeze(1).to(device, non_blocking=True)

    def __len__(self) -> int:
        return sum(self.lengths)

    def pad(self, row: Tensor) -> Tensor:
        """``[G, heads, T, D]`` of ``[heads, C, D]``."""
        padded = row if self._places is None else row.index_select(1, self._places)
        return padded.unflatten(1, (-1, self.longest)).transpose(0, 1)

    def unpad(self, padded: Tensor) -> Tensor:
        """``[heads, C, D]`` of ``[G, heads, T, D]``."""
        row = padded.transpose(0, 1).flatten(1, 2)
        return row if self._places is None else row.index_select(1, self._kept)
