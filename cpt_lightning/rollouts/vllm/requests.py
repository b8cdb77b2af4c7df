"""Prompts as vLLM is asked them, and its answers as completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cpt_lightning.models.qwen_vl import encode_images
from cpt_lightning.rollouts.sampling import completed
from cpt_lightning.types import Completions, Prompts

if TYPE_CHECKING:
    from cpt_lightning.models.processor import PromptProcessor
    from cpt_lightning.models.qwen_vl import QwenVL

SEEDS = 2**62
"""How many there are: vLLM adds a completion's number to its prompt's seed, which must not exceed 64 bits."""


@dataclass
class Request:
    """A prompt, and what is wanted of it.

    Args:
        ids: Token ids; each image stands as one ``<|image_pad|>``.
        seed: Of its draws.
        image_features: ``[num_image_tokens, H]`` of its images in order, or ``None``.
        image_grid_thw: ``[num_images, 3]``, or ``None``.
        options: Of vLLM's ``SamplingParams``.
    """

    ids: list[int]
    seed: int
    image_features: Tensor | None = None
    image_grid_thw: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> dict[str, Any]:
        """As vLLM takes it."""
        if self.image_features is None:
            return {"prompt_token_ids": self.ids}
        image = {"image_embeds": self.image_features, "image_grid_thw": self.image_grid_thw}
        return {"prompt_token_ids": self.ids, "multi_modal_data": {"image": image}}


@dataclass
class Answer:
    """A completion as vLLM gives it.

    Args:
        ids: Token ids, with the stop token if there is one.
        logps: Log-probability of each, at the temperature, before bans, top-k and top-p.
        finish_reason: ``stop`` or ``length``.
        prompt_logps: Log-probability of each token of its prompt but the first, where it was asked for.
    """

    ids: list[int]
    logps: list[float]
    finish_reason: str
    prompt_logps: list[float] = field(default_factory=list)


def requests_of(
    model: QwenVL, prompts: Prompts, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> list[Request]:
    """What an engine needs to know of B prompts; images are encoded here, unless the prompts hold their features.

    Args:
        model: The backbone.
        prompts: B prompts.
        generator: Gives each prompt its seed; one for each, or for all.
    """
    features, grids = encode_images(model, prompts), prompts.image_grid_thw
    pictures: list[tuple[Tensor, Tensor] | None] = [None] * len(prompts)
    if features is not None and grids is not None:
        merged = model.config.vision_config.spatial_merge_size**2
        by_prompt = grids.split(prompts.images_per_prompt)
        parts = features.float().cpu().split([int(grid.prod(dim=1).sum()) // merged for grid in by_prompt])
        pictures = [(part, grid.cpu()) if len(part) else None for part, grid in zip(parts, by_prompt, strict=True)]
    generators = generator if isinstance(generator, Sequence) else [generator] * len(prompts)
    requests = []
    for row, (source, picture) in enumerate(zip(generators, pictures, strict=True)):
        ids = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
        seed = torch.randint(SEEDS, (1,), generator=source, device="cpu" if source is None else source.device)
        request = Request(_single_places(ids, model.config.image_token_id), int(seed))
        if picture is not None:
            request.image_features, request.image_grid_thw = picture
        requests.append(request)
    return requests


def _single_places(ids: list[int], image: int) -> list[int]:
    """Each image's run of placeholders as one, which vLLM makes a run of again."""
    return ids[:1] + [token for before, token in pairwise(ids) if not before == token == image]


def completions_of(
    groups: Sequence[Sequence[Answer]],
    prefix: list[int],
    processor: PromptProcessor,
    max_new_tokens: int,
    device: torch.device,
) -> Completions:
    """N completions, group by group, in the form in which our own engine gives them.

    Raises:
        RuntimeError: One of them ended for no reason that it was given, or has a banned token.
    """
    answers = [answer for group in groups for answer in group]
    for answer in answers:
        is_whole = answer.finish_reason == "stop" or len(answer.ids) == max_new_tokens
        if not is_whole or not {*answer.ids}.isdisjoint(processor.banned_token_ids):
            raise RuntimeError(
                f"vLLM gave a completion of {len(answer.ids)} tokens that ended by {answer.finish_reason!r}: "
                f"{processor.tokenizer.decode(answer.ids)!r:.200}; it has a banned token, or is neither ended by a "
                "stop token nor as long as it may be"
            )
    length = max(len(answer.ids) for answer in answers)
    pad = processor.pad_token_id
    ids = torch.tensor([[*answer.ids, *[pad] * (length - len(answer.ids))] for answer in answers], device=device)
    logps = [[*answer.logps, *[0.0] * (length - len(answer.logps))] for answer in answers]
    return completed(ids, torch.tensor(logps, device=device), prefix, processor)
