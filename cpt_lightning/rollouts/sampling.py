"""Sampling of groups: the prompt and its image are run once, then G completions grow from the same state."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import QwenVL, output_weight
from cpt_lightning.rollouts.cache import GroupCache
from cpt_lightning.rollouts.decoding import decoding_steps
from cpt_lightning.rollouts.packing import run_prompts
from cpt_lightning.types import Completions, Prompts

KEPT_WHILE_ALIVE = 0.5
"""Finished completions are dropped from the batch when no more than this share of it goes on."""


ONE = 2**61
"""See :func:`_fixed_point`; a vocabulary's probabilities may come to a little more than 1, and must not overflow."""


@dataclass
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: Longest completion, end-of-turn token included and ``prefix`` not; a longer one is cut off there
            (truncated).
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
        self, logits: Tensor, banned: Tensor, uniform: Tensor, greedy: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws from ``[N, V]`` logits, never a banned token.

        Args:
            logits: ``[N, V]`` float32.
            banned: Token ids.
            uniform: ``[N]`` random numbers in [0, 1), one for each row: so what a row draws does not depend on others.
            greedy: ``[N]`` bool, rows that take the most probable token instead.

        Returns:
            ``[N]`` tokens and their log-probabilities before bans, top-k and top-p, as an update computes them.
        """
        logps = (logits / self.temperature if self.temperature else logits).log_softmax(dim=-1)
        allowed = logps.index_fill(1, banned, -torch.inf)
        token = self._draw(allowed, uniform)
        if greedy is not None:
            token = torch.where(greedy, allowed.argmax(dim=-1), token)
        return token, logps.gather(1, token[:, None]).squeeze(1)

    def _draw(self, logps: Tensor, uniform: Tensor) -> Tensor:
        if self.temperature == 0:
            return logps.argmax(dim=-1)
        if self.top_k and self.top_k < logps.shape[-1]:
            kth = logps.topk(self.top_k, dim=-1).values[:, -1:]
            logps = logps.masked_fill(logps < kth, -torch.inf)
        if self.top_p < 1:
            logps = _nucleus(logps, self.top_p)
        # The inverse of the distribution function; on the right of equal values, or a token of probability 0 could be
        # drawn.
        cumulated = _fixed_point(logps.exp()).cumsum(dim=-1)
        height = (uniform.double()[:, None] * cumulated[:, -1:]).long()
        token = torch.searchsorted(cumulated, height, right=True).squeeze(1)
        # Of NaN there is no token. Any will do, for the update will not be made; and on a GPU an index that does not
        # exist ends the process without a word of why.
        return token.clamp(max=logps.shape[-1] - 1)


def _fixed_point(probability: Tensor) -> Tensor:
    """Probabilities as whole numbers of which ``ONE`` is 1: their sums are exact, the same on every device.

    Of floating-point numbers they would round away the tail of a large vocabulary, and on a GPU their order is left
    open, which ``Trainer(deterministic=True)`` refuses.
    """
    return (probability.double() * ONE).long()


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Rules out every token that stands behind others with at least ``top_p`` probability together."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = _fixed_point(ordered.softmax(dim=-1))
    behind = probability.cumsum(dim=-1) - probability >= int(top_p * ONE)
    return logits.masked_fill(behind.scatter(1, order, behind), -torch.inf)


def keyed_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator whose stream is fixed by a key such as (seed, task, step, rank).

    Nothing about it needs to be kept in a checkpoint: a resumed run makes the same one.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def row_generators(device: torch.device | str, prompts: Prompts, *key: int) -> list[torch.Generator]:
    """A generator for each prompt, keyed by its row too: what it draws depends on no other row, and on no rank."""
    rows = (zlib.crc32(f"{example.task}/{example.row_id}".encode()) for example in prompts.examples)
    return [keyed_generator(device, *key, row) for row in rows]


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


@contextmanager
def casts_kept(device: torch.device) -> Iterator[None]:
    """Under autocast each trained weight is cast once, and not at every token, as Lightning's would (it keeps none)."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=True):
        try:
            yield
        finally:
            torch.clear_autocast_cache()  # these casts have no graph, which an update's must have


def sample_groups(
    model: QwenVL,
    processor: PromptProcessor,
    prompts: Prompts,
    group_size: int,
    sampling: Sampling,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    with_greedy: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> Completions:
    """Samples ``group_size`` completions of every prompt.

    The image is encoded and the prompt run once per group, and not at all where ``prompts.state`` is kept; completions
    leave the batch when they have ended. Vision tokens are never sampled.

    Args:
        model: The backbone.
        processor: Knows which tokens end a turn and which must not be sampled.
        prompts: B prompts.
        group_size: G.
        sampling: How tokens are drawn.
        generator: Source of randomness, on the model's device; one for each prompt, or for all.
        with_greedy: Whether each group has one completion more, its last, that always takes the most probable token.
        on_token: Is told how many tokens the longest completion has so far.

    Returns:
        N = B * G completions, or B * (G + 1), group by group, right-padded.

    Raises:
        ValueError: A group without completions, or generators for another number of prompts.
    """
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1")
    group_size += with_greedy
    prefix = processor.encode_prefix(sampling.prefix)
    with sampling_mode(model), casts_kept(prompts.device):
        prompts = with_prefix(prompts, prefix)
        ids, logps = _decode(model, processor, prompts, group_size, sampling, generator, with_greedy, on_token)
    return completed(ids, logps, prefix, processor)


def completed(ids: Tensor, logps: Tensor, prefix: list[int], processor: PromptProcessor) -> Completions:
    """Completions of what was sampled behind a prefix, each up to its first stop token.

    Args:
        ids: ``[N, T]`` sampled tokens; what stands behind a stop token has no meaning.
        logps: ``[N, T]`` their log-probabilities.
        prefix: Tokens before them, with which every completion was made to begin.
        processor: Knows the stop tokens.
    """
    ids = torch.cat([ids.new_tensor(prefix).expand(len(ids), -1), ids], dim=1)
    logps = torch.cat([logps.new_zeros(len(ids), len(prefix)), logps], dim=1)
    ended = torch.isin(ids, ids.new_tensor(processor.stop_token_ids))
    mask = ended.cumsum(dim=1) - ended.long() == 0
    return Completions(ids.masked_fill(~mask, processor.pad_token_id), mask, logps.masked_fill(~mask, 0.0))


def with_prefix(prompts: Prompts, prefix: list[int]) -> Prompts:
    """The prompts, with the forced beginning of the completion behind them."""
    if not prefix:
        return prompts
    ids = prompts.input_ids.new_tensor(prefix).expand(len(prompts), -1)
    return replace(
        prompts,
        state=None,
        input_ids=torch.cat([prompts.input_ids, ids], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, torch.ones_like(ids)], dim=1),
    )


def _decode(
    model: QwenVL,
    processor: PromptProcessor,
    prompts: Prompts,
    group_size: int,
    sampling: Sampling,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    with_greedy: bool,
    on_token: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor]:
    """``[N, T]`` sampled ids and their log-probabilities; what stands behind a stop token has no meaning.

    B' prompts with G' completions each are in the batch; as completions end, both become fewer.
    """
    state = run_prompts(model, prompts) if prompts.state is None else prompts.state
    steps = decoding_steps(model, GroupCache(prompts, state, group_size, sampling.max_new_tokens))
    hidden = state.hidden.repeat_interleave(group_size, dim=0)  # [B' * G', hidden]
    positions = state.next_position.repeat_interleave(group_size)  # [N]
    weight, banned = output_weight(model), prompts.input_ids.new_tensor(processor.banned_token_ids)
    stops = prompts.input_ids.new_tensor(processor.stop_token_ids)
    rows = torch.arange(len(hidden), device=hidden.device).view(-1, group_size)  # [B', G'] of N
    alive = torch.ones_like(rows, dtype=torch.bool)  # [B', G']
    uniform = _uniform(len(prompts), group_size, sampling.max_new_tokens, generator, hidden.device)
    is_greedy = rows.flatten() % group_size == group_size - 1 if with_greedy else None  # [N]
    ids = rows.new_full(uniform.shape, processor.pad_token_id)
    logps = torch.zeros_like(uniform)
    for step in range(sampling.max_new_tokens):
        if on_token is not None:
            on_token(step)
        row = rows.flatten()  # [B' * G']
        greedy = None if is_greedy is None else is_greedy[row]
        token, logp = sampling.pick(linear(hidden, weight).float(), banned, uniform[row, step], greedy)
        ids[row, step], logps[row, step] = token, logp
        alive &= ~torch.isin(token, stops).view_as(alive)
        num_alive = int(alive.sum())
        if num_alive == 0 or step + 1 == sampling.max_new_tokens:
            return ids[:, : step + 1], logps[:, : step + 1]
        if num_alive <= KEPT_WHILE_ALIVE * alive.numel():
            kept, members = _still_alive(alive)
            steps.keep(kept, members)
            token = token.view_as(rows)[kept].gather(1, members).flatten()
            rows, alive = rows[kept].gather(1, members), alive[kept].gather(1, members)
        hidden = steps(token, positions[rows.flatten()] + step)
    raise AssertionError("unreachable: the last step returns")


def _uniform(num_prompts: int, group_size: int, length: int, generator, device: torch.device) -> Tensor:
    """``[N, length]`` random numbers in [0, 1); in float32 whatever the default dtype, for bfloat16 knows but 256."""
    generators = [generator] if generator is None or isinstance(generator, torch.Generator) else generator
    if len(generators) not in (1, num_prompts):
        raise ValueError(f"{len(generators)} generators for {num_prompts} prompts; give one for each, or one for all")
    rows = num_prompts * group_size // len(generators)
    return torch.cat(
        [torch.rand(rows, length, generator=each, device=device, dtype=torch.float32) for each in generators]
    )


def _still_alive(alive: Tensor) -> tuple[Tensor, Tensor]:
    """``[B']`` prompts with completions that go on, and ``[B', G']`` which; a prompt with fewer than G' fills up."""
    kept = alive.any(dim=1).nonzero().squeeze(1)
    longest = int(alive.sum(dim=1).max())
    return kept, alive[kept].int().argsort(dim=1, descending=True, stable=True)[:, :longest]
