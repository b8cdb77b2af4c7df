"""A group as it is packed for scoring, to be looked at: where each token stands, and what it sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpt_lightning.models.qwen_vl import QwenVL, prompt_positions
from cpt_lightning.rollouts.layout import GroupBranches, PromptPass
from cpt_lightning.rollouts.packing import run_prompts
from cpt_lightning.types import Completions, Prompts, PromptState


@dataclass
class PackedGroup:
    """The R tokens ``[prompt | c1 | ... | cG]`` that the model computes to score a group.

    The last token of a completion predicts nothing, so it has no place.

    Args:
        ids: ``[R]`` token ids.
        owners: ``[R]`` the completion that a token belongs to, 0 for the prompt, 1 to G.
        is_image: ``[R]`` bool, whether it stands for a piece of an image.
        positions: ``[3, R]`` M-RoPE positions (time, height, width).
        sees: ``[R, R]`` bool, whether the token of the row looks at the token of the column.
    """

    ids: Tensor
    owners: Tensor
    is_image: Tensor
    positions: Tensor
    sees: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@torch.no_grad()
def pack_group(model: QwenVL, prompts: Prompts, completions: Completions) -> PackedGroup:
    """One prompt and its completions as :func:`~cpt_lightning.rollouts.completion_logprobs` lays them out.

    Positions and attention are asked of the same layout that scores; no mask is ever made there.

    Args:
        model: The backbone.
        prompts: One prompt.
        completions: Its G completions.

    Raises:
        ValueError: Several prompts.
    """
    if len(prompts) != 1:
        raise ValueError(f"a packed group has one prompt, not {len(prompts)}; choose one with prompts.select([0])")
    mask = prompts.attention_mask.bool()
    state = run_prompts(model, prompts)
    branches = GroupBranches(state, prompts.lengths, completions.mask)
    completion, _ = completions.mask.nonzero(as_tuple=True)
    ids = torch.cat([prompts.input_ids[mask], completions.ids[completions.mask][branches.is_input]])
    return PackedGroup(
        ids=ids,
        owners=torch.cat([torch.zeros_like(prompts.input_ids[mask]), 1 + completion[branches.is_input]]),
        is_image=ids == model.config.image_token_id,
        positions=torch.cat([prompt_positions(model, prompts)[:, mask], branches.positions[:, 0]], dim=1),
        sees=_sees(prompts, state, completions, len(ids)),
    )


def _sees(prompts: Prompts, state: PromptState, completions: Completions, size: int) -> Tensor:
    """``[R, R]`` what each token looks at.

    All keys are alike and every value names its place, so that a token's attention is the mean over what it sees.
    """
    alike = torch.zeros(1, 1, size, size, device=prompts.device)
    places = torch.eye(size, device=prompts.device)[None, None]
    start = int(prompts.lengths)
    row = PromptPass(prompts)
    seen = [row.attend(0, alike[:, :, :start], alike[:, :, :start], places[:, :, :start])]
    if start < size:
        named = PromptState([row.keys[0]], [row.values[0]], state.hidden, state.next_position)
        branches = GroupBranches(named, prompts.lengths, completions.mask)
        seen.append(branches.attend(0, alike[:, :, start:], alike[:, :, start:], places[:, :, start:]))
    return torch.cat(seen, dim=2)[0, 0] > 0
