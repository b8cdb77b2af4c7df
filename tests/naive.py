"""The slow and obvious way, for tests to compare with: one forward of the plain transformers model per completion."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.types import Completions, Prompts


def naive_logprobs(model: QwenVL, prompts: Prompts, completions: Completions) -> Tensor:
    """``[N, T]`` log-probabilities, prompt and image computed anew for every completion, with transformers' own
    forward."""
    rows = []
    for number, logits in enumerate(naive_logits(model, prompts, completions)):
        ids = completions.ids[number, : len(logits), None]
        logps = logits.log_softmax(dim=-1).gather(1, ids).squeeze(1)
        rows.append(torch.nn.functional.pad(logps, (0, completions.ids.shape[1] - len(logits))))
    return torch.stack(rows)


def naive_logits(model: QwenVL, prompts: Prompts, completions: Completions) -> Iterator[Tensor]:
    """``[length, V]`` logits that predict the tokens of each completion."""
    group_size = len(completions) // len(prompts)
    for number, length in enumerate(completions.lengths.tolist()):
        prompt = prompts.select([number // group_size])
        ids = torch.cat([prompt.input_ids, completions.ids[number : number + 1, :length]], dim=1)
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
        )
        yield output.logits[0, prompt.input_ids.shape[1] - 1 : -1]


def random_completions(num: int, length: int, vocabulary: int, generator: torch.Generator) -> Completions:
    """``num`` completions of random ordinary tokens and ragged lengths from 1 to ``length``, both ends included."""
    ids = torch.randint(0, vocabulary, (num, length), generator=generator)
    lengths = torch.randint(1, length + 1, (num,), generator=generator)
    lengths[0], lengths[-1] = length, 1
    return Completions(ids, torch.arange(length) < lengths[:, None])
