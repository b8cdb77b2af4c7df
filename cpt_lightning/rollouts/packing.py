"""Completions to log-probabilities: the prompt and its image are computed once per group."""

from __future__ import annotations

import torch
from torch import Tensor

from cpt_lightning.functional.logprobs import token_logprobs
from cpt_lightning.models.qwen_vl import (
    QwenVL,
    check_model,
    embed,
    embed_prompts,
    encode_images,
    hidden_states,
    output_weight,
    prompt_positions,
)
from cpt_lightning.rollouts.layout import CausalRow, GroupBranches, PromptPass
from cpt_lightning.types import Completions, Prompts, PromptState


def run_prompts(model: QwenVL, prompts: Prompts) -> PromptState:
    """Runs the model over prompts and images, so that any number of completions can go on from there.

    With gradients enabled the state carries them: scored completions send theirs through it into the prompt.
    """
    check_model(model)
    mask = prompts.attention_mask.bool()
    positions = prompt_positions(model, prompts)
    row = PromptPass(prompts)
    embeds = embed_prompts(model, prompts.input_ids[mask][None], encode_images(model, prompts))
    hidden = hidden_states(model, embeds, positions[:, mask][:, None], row)
    keys, values = ([kept[layer] for layer in sorted(kept)] for kept in (row.keys, row.values))
    return PromptState(keys, values, hidden[0], next_position=positions.amax(dim=(0, 2)) + 1)


def completion_logprobs(
    model: QwenVL,
    prompts: Prompts,
    completions: Completions,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Scores groups of completions: the log-probabilities of the naive forward over N separate sequences.

    Nothing is padded. A group's completions go on from one pass over their prompt, or from ``prompts.state`` where that
    is kept; a single completion forms one sequence with its prompt.

    Args:
        model: The backbone.
        prompts: B prompts.
        completions: N = B * G completions, group by group.
        temperature: Divides the logits, as it did while sampling.

    Returns:
        ``[N, T]`` log-probability of each completion token in nats, 0 where masked; carries the gradient.

    Raises:
        ValueError: N is no multiple of B.
    """
    hidden = completion_hidden(model, prompts, completions)
    logps = token_logprobs(hidden, output_weight(model), completions.ids[completions.mask], temperature)
    return completions.unpacked(logps)


def completion_hidden(model: QwenVL, prompts: Prompts, completions: Completions) -> Tensor:
    """``[M, H]`` final hidden states that predict the M tokens of the completions, in the order of their mask.

    Arguments and errors as in :func:`completion_logprobs`.
    """
    if len(completions) % len(prompts):
        raise ValueError(f"{len(completions)} completions cannot be split evenly over {len(prompts)} prompts")
    is_group = len(completions) > len(prompts) or prompts.state is not None
    return (_group_hidden if is_group else _single_hidden)(model, prompts, completions)


def _group_hidden(model: QwenVL, prompts: Prompts, completions: Completions) -> Tensor:
    """``[M, H]`` hidden states that predict the M completion tokens: of the prompts' ends, and of the branches."""
    state = run_prompts(model, prompts) if prompts.state is None else prompts.state
    branches = GroupBranches(state, prompts.lengths, completions.mask)
    ids = completions.ids[completions.mask][branches.is_input]
    if not len(ids):  # every completion is a single token
        return state.hidden.index_select(0, branches.sources)
    hidden = hidden_states(model, embed(model, ids[None]), branches.positions, branches)[0]
    return torch.cat([state.hidden, hidden]).index_select(0, branches.sources)


def _single_hidden(model: QwenVL, prompts: Prompts, completions: Completions) -> Tensor:
    """``[M, H]`` hidden states that predict the M completion tokens, one completion to a prompt."""
    check_model(model)
    positions = prompt_positions(model, prompts)
    steps = torch.arange(completions.ids.shape[1] - 1, device=prompts.device)
    after = (positions.amax(dim=(0, 2)) + 1)[:, None] + steps
    # A completion's last token predicts nothing and is left out: a token is an input if another follows it.
    mask = torch.cat([prompts.attention_mask.bool(), completions.mask[:, 1:]], dim=1)
    ids = torch.cat([prompts.input_ids, completions.ids[:, :-1]], dim=1)[mask]
    positions = torch.cat([positions, after.expand(3, -1, -1)], dim=2)[:, mask]
    row = CausalRow(mask.sum(dim=1).tolist(), completions.lengths.tolist(), prompts.device)
    embeds = embed_prompts(model, ids[None], encode_images(model, prompts))
    return hidden_states(model, embeds, positions[:, None], row)[0]
