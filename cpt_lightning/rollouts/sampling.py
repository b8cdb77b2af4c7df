"""Sampling of groups: the prompt and its image are run once, then G completions grow from the same state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import (
    QwenVL,
    embed_prompts,
    embed_tokens,
    hidden_states,
    output_weight,
    prompt_positions,
)
from cpt_lightning.types import Completions, Prompts


@dataclass
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: Longest completion, end-of-turn token included; a longer one is cut off there (truncated).
        temperature: Divides the logits; 0 takes the most probable token (greedy).
        top_p: Draws from the smallest set of tokens with at least this probability (nucleus sampling); 1 is off.
        top_k: Draws from the k most probable tokens; 0 is off.
        prefix: Text that every completion is made to begin with, such as the base's ``<think>`` phrase.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative (0 is off)")

    def pick(
        self, logits: Tensor, banned: list[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws from ``[N, V]`` logits, never a banned token.

        Returns:
            ``[N]`` tokens and their log-probabilities before bans, top-k and top-p, as an update computes them.
        """
        logps = (logits / self.temperature if self.temperature else logits).log_softmax(dim=-1)
        allowed = logps.index_fill(1, torch.tensor(banned, device=logits.device), -torch.inf) if banned else logps
        token = self._draw(allowed, generator)
        return token, logps.gather(1, token[:, None]).squeeze(1)

    def _draw(self, logps: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.temperature == 0:
            return logps.argmax(dim=-1)
        if self.top_k and self.top_k < logps.shape[-1]:
            kth = logps.topk(self.top_k, dim=-1).values[:, -1:]
            logps = logps.masked_fill(logps < kth, -torch.inf)
        if self.top_p < 1:
            logps = _nucleus(logps, self.top_p)
        return torch.multinomial(logps.softmax(dim=-1), 1, generator=generator).squeeze(1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Rules out every token that stands behind others with at least ``top_p`` probability together."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    behind = probability.cumsum(dim=-1) - probability >= top_p
    return logits.masked_fill(behind.scatter(1, order, behind), -torch.inf)


def keyed_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator whose stream is fixed by a key such as (seed, task, step, rank).

    Nothing about it needs to be kept in a checkpoint: a resumed run makes the same one.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


class GroupCache:
    """Keys and values of B prompts, then of N = B * G completions that grow from them.

    Room for the whole completion is taken at once; a step writes one column and reads a view.

    Args:
        group_size: G.
        max_new_tokens: Columns behind the prompt.
    """

    def __init__(self, group_size: int, max_new_tokens: int):
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._lengths: list[int] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        """Takes new keys and values ``[batch, heads, new, head_dim]`` and returns all there are of this layer."""
        if layer_idx == len(self._layers):
            self._layers.append((self._room(keys), self._room(values)))
            self._lengths.append(keys.shape[2])
            return keys, values
        start, end = self._lengths[layer_idx], self._lengths[layer_idx] + keys.shape[2]
        all_keys, all_values = self._layers[layer_idx]
        all_keys[:, :, start:end], all_values[:, :, start:end] = keys, values
        self._lengths[layer_idx] = end
        return all_keys[:, :, :end], all_values[:, :, :end]

    def _room(self, prompt: Tensor) -> Tensor:
        """The prompt's keys or values, once for each completion of its group, with room behind them."""
        num_prompts, heads, length, size = prompt.shape
        room = prompt.new_zeros(num_prompts * self.group_size, heads, length + self.max_new_tokens, size)
        room[:, :, :length] = prompt.repeat_interleave(self.group_size, dim=0)
        return room


@contextmanager
def sampling_mode(model: QwenVL) -> Iterator[None]:
    """Eval mode without gradients; what was in train mode goes back to it."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: what LoRA or FSDP keeps from it, autograd would refuse later.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def sample_groups(
    model: QwenVL,
    processor: PromptProcessor,
    prompts: Prompts,
    group_size: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Completions:
    """Samples ``group_size`` completions of every prompt.

    The image is encoded and the prompt run once per group; decoding stops when all completions have ended. Vision
    tokens are never sampled.

    Args:
        model: The backbone.
        processor: Knows which tokens end a turn and which must not be sampled.
        prompts: B prompts.
        group_size: G.
        sampling: How tokens are drawn.
        generator: Source of randomness, on the model's device.

    Returns:
        N = B * G completions, group by group, right-padded.
    """
    prefix = processor.tokenizer.encode(sampling.prefix, add_special_tokens=False) if sampling.prefix else []
    with sampling_mode(model):
        ids, logps = _decode(model, processor, _with_prefix(prompts, prefix), group_size, sampling, generator)
    ids = torch.cat([ids.new_tensor(prefix).expand(len(ids), -1), ids], dim=1)
    logps = torch.cat([logps.new_zeros(len(ids), len(prefix)), logps], dim=1)
    ended = torch.isin(ids, ids.new_tensor(processor.stop_token_ids))
    mask = ended.cumsum(dim=1) - ended.long() == 0
    return Completions(ids.masked_fill(~mask, processor.pad_token_id), mask, logps.masked_fill(~mask, 0.0))


def _with_prefix(prompts: Prompts, prefix: list[int]) -> Prompts:
    """The prompts, with the forced beginning of the completion behind them."""
    if not prefix:
        return prompts
    ids = prompts.input_ids.new_tensor(prefix).expand(len(prompts), -1)
    return replace(
        prompts,
        input_ids=torch.cat([prompts.input_ids, ids], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, torch.ones_like(ids)], dim=1),
    )


def _decode(
    model: QwenVL,
    processor: PromptProcessor,
    prompts: Prompts,
    group_size: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """``[N, T]`` sampled ids and their log-probabilities; what stands behind a stop token has no meaning."""
    cache = GroupCache(group_size, sampling.max_new_tokens)
    positions = prompt_positions(model, prompts)
    prompt_mask = prompts.attention_mask.bool()
    hidden = hidden_states(model, embed_prompts(model, prompts), positions, _causal(prompt_mask), cache)[:, -1]
    hidden = hidden.repeat_interleave(group_size, dim=0)
    position = (positions.amax(dim=(0, 2)) + 1).repeat_interleave(group_size)  # [N] of the next token
    prompt_mask = prompt_mask.repeat_interleave(group_size, dim=0)
    allowed = torch.cat([prompt_mask, prompt_mask.new_ones(len(hidden), sampling.max_new_tokens)], dim=1)[:, None, None]
    stops, banned = prompts.input_ids.new_tensor(processor.stop_token_ids), processor.banned_token_ids
    finished = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    ids, logps = [], []
    while True:
        logits = (hidden @ output_weight(model).T).float()
        token, logp = sampling.pick(logits, banned, generator)
        ids.append(token)
        logps.append(logp)
        finished |= torch.isin(token, stops)
        if len(ids) == sampling.max_new_tokens or finished.all():
            return torch.stack(ids, dim=1), torch.stack(logps, dim=1)
        length = prompt_mask.shape[1] + len(ids)
        embeds = embed_tokens(model, token[:, None])
        hidden = hidden_states(model, embeds, position.expand(3, -1).unsqueeze(-1), allowed[..., :length], cache)[:, -1]
        position = position + 1


def _causal(mask: Tensor) -> Tensor:
    """``[B, 1, P, P]`` causal pattern over left-padded prompts; a padding query sees itself."""
    order = torch.arange(mask.shape[1], device=mask.device)
    seen = (order[:, None] >= order[None, :]) & mask[:, None, :]
    return (seen | (order[:, None] == order[None, :])).unsqueeze(1)
