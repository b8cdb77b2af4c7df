"""The update's forward pass: one packed row ``[prompt | c1 | c2 | ... | cG]`` per group.

The prompt and its image are computed once, whatever the group size. A tree mask lets every completion see the prompt
and itself, never its siblings, and its M-RoPE positions go on where the prompt ended, as if it stood there alone: the
log-probabilities are those of the naive forward over G separate sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpt_lightning.functional.logprobs import token_logprobs
from cpt_lightning.models.qwen_vl import (
    QwenVL,
    embed_prompts,
    embed_tokens,
    hidden_states,
    output_weight,
    prompt_positions,
)
from cpt_lightning.types import Completions, Prompts

PADDING, PROMPT = -1, 0
"""Branches that are no completion; completion g of a group is branch g + 1."""


@dataclass
class Scored:
    """What the policy thinks of given completions.

    Args:
        logps: ``[N, T]`` log-probability of each completion token in nats, 0 where masked; carries the gradient.
        entropies: ``[N, T]`` entropy of the distribution at each completion token in nats, 0 where masked.
    """

    logps: Tensor
    entropies: Tensor


@dataclass
class GroupLayout:
    """Where every token of B groups stands in B packed rows of length S.

    The last token of a completion predicts nothing, so it has no place in a row.

    Args:
        branch: ``[B, S]`` which completion a column belongs to; PROMPT and PADDING besides.
        steps: ``[B, S]`` place of a token in its completion, 0 in the prompt.
        row: ``[M]`` row of each of the M completion tokens to be scored, in the order of ``completions.ids[mask]``.
        source: ``[M]`` column whose hidden state predicts that token.
        inputs: ``[M]`` bool, whether the token is itself an input (all but each completion's last).
        column: ``[M]`` column of the token where it is an input.
    """

    branch: Tensor
    steps: Tensor
    row: Tensor
    source: Tensor
    inputs: Tensor
    column: Tensor

    @classmethod
    def of(cls, prompts: Prompts, mask: Tensor) -> GroupLayout:
        """Lays out the completions with the ``[N, T]`` mask behind their prompts."""
        num_prompts, prompt_length = prompts.input_ids.shape
        inputs_per_completion = (mask.sum(dim=1) - 1).clamp(min=0).view(num_prompts, -1)
        ends = inputs_per_completion.cumsum(dim=1)
        starts = prompt_length + ends - inputs_per_completion  # [B, G] column of each completion's first token
        completion, step = mask.nonzero(as_tuple=True)
        group_size = len(mask) // num_prompts
        row = completion // group_size
        column = starts.view(-1)[completion] + step
        inputs = step < inputs_per_completion.view(-1)[completion]
        length = prompt_length + int(ends[:, -1].max())
        branch = torch.full((num_prompts, length), PADDING, device=mask.device)
        branch[:, :prompt_length] = torch.where(prompts.attention_mask.bool(), PROMPT, PADDING)
        branch[row[inputs], column[inputs]] = completion[inputs] % group_size + 1
        steps = torch.zeros_like(branch)
        steps[row[inputs], column[inputs]] = step[inputs]
        source = torch.where(step == 0, prompt_length - 1, column - 1)  # prompts are left-padded: theirs end together
        return cls(branch, steps, row, source, inputs, column)

    def tree_mask(self) -> Tensor:
        """``[B, 1, S, S]`` bool: true where a query (third axis) may look at a key (fourth axis)."""
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        order = torch.arange(self.branch.shape[1], device=self.branch.device)
        earlier = order[:, None] >= order[None, :]
        seen = earlier & ((key == PROMPT) | ((key == query) & (key != PADDING)))
        # A padding query must see something, or softmax gives NaN: itself.
        return (seen | (order[:, None] == order[None, :])).unsqueeze(1)

    def positions(self, prompt: Tensor) -> Tensor:
        """``[3, B, S]`` M-RoPE positions, from the prompts' ``[3, B, P]``; completions restart after the prompt."""
        after_prompt = prompt.amax(dim=(0, 2)) + 1
        completion = (after_prompt[:, None] + self.steps)[:, prompt.shape[2] :]
        return torch.cat([prompt, completion.expand(3, -1, -1)], dim=2)


def completion_logprobs(
    model: QwenVL,
    prompts: Prompts,
    completions: Completions,
    *,
    temperature: float = 1.0,
) -> Scored:
    """Scores groups of completions, prompt and image computed once per group.

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
    layout = GroupLayout.of(prompts, completions.mask)
    tokens = completions.ids[completions.mask]
    embeds = _packed_embeds(model, prompts, tokens, layout)
    positions = layout.positions(prompt_positions(model, prompts))
    hidden = hidden_states(model, embeds, positions, layout.tree_mask())
    logps, entropies = token_logprobs(hidden[layout.row, layout.source], output_weight(model), tokens, temperature)
    zeros = torch.zeros(completions.mask.shape, device=logps.device)
    return Scored(
        logps=zeros.masked_scatter(completions.mask, logps), entropies=zeros.masked_scatter(completions.mask, entropies)
    )


def _packed_embeds(model: QwenVL, prompts: Prompts, tokens: Tensor, layout: GroupLayout) -> Tensor:
    """``[B, S, H]`` input embeddings of the packed rows, zero on padding behind the completions."""
    embeds = embed_prompts(model, prompts)
    num_prompts, length = layout.branch.shape
    tail = embeds.new_zeros(num_prompts, length - embeds.shape[1], embeds.shape[2])
    embeds = torch.cat([embeds, tail], dim=1)
    place = (layout.row[layout.inputs], layout.column[layout.inputs])
    return embeds.index_put(place, embed_tokens(model, tokens[layout.inputs]).to(embeds.dtype))
