"""The update's forward pass: groups of completions to log-probabilities, prompt and image computed once per group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpt_lightning.functional.logprobs import token_logprobs
from cpt_lightning.models.qwen_vl import QwenVL, embed, encode_images, hidden_states, output_weight, prompt_positions
from cpt_lightning.rollouts.layout import PackedGroups
from cpt_lightning.types import Completions, Prompts


@dataclass
class Scored:
    """What the policy thinks of given completions.

    Args:
        logps: ``[N, T]`` log-probability of each completion token in nats, 0 where masked; carries the gradient.
        entropies: ``[N, T]`` entropy of the distribution at each completion token in nats, 0 where masked.
    """

    logps: Tensor
    entropies: Tensor


def completion_logprobs(
    model: QwenVL,
    prompts: Prompts,
    completions: Completions,
    *,
    temperature: float = 1.0,
) -> Scored:
    """Scores groups of completions: the log-probabilities of the naive forward over N separate sequences.

    All groups form one row without padding, see :class:`PackedGroups`.

    Args:
        model: The backbone.
        prompts: B prompts.
        completions: N = B * G completions, group by group.
        temperature: Divides the logits, as it did while sampling.

    Returns:
        Log-probabilities and entropies, ``[N, T]`` each.

    Raises:
        ValueError: N is no multiple of B.
    """
    if len(completions) % len(prompts):
        raise ValueError(f"{len(completions)} completions cannot be split evenly over {len(prompts)} prompts")
    layout = PackedGroups.of(prompts, completions.mask)
    tokens = completions.ids[completions.mask]
    embeds = embed(model, layout.token_ids(prompts, tokens), encode_images(model, prompts))
    hidden = hidden_states(model, embeds, layout.positions(prompt_positions(model, prompts)), layout)
    logps, entropies = token_logprobs(hidden[0, layout.sources], output_weight(model), tokens, temperature)
    zeros = torch.zeros(completions.mask.shape, device=logps.device)
    return Scored(
        logps=zeros.masked_scatter(completions.mask, logps), entropies=zeros.masked_scatter(completions.mask, entropies)
    )
