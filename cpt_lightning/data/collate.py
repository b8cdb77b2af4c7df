"""Rows to the batches that modules take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from cpt_lightning.types import Batch, Completions, Example, Prompts


class Processor(Protocol):
    """What turns text and images into tensors."""

    def encode(self, messages: Sequence[list[dict]], images: Sequence[list], row_ids: Sequence[str]) -> Prompts:
        """B chats, up to where the assistant begins to speak, as left-padded prompts."""
        ...

    def encode_targets(
        self, texts: Sequence[str], ids: Sequence[list[int] | None], row_ids: Sequence[str]
    ) -> Completions:
        """Reference completions, each as its ids or with its end-of-turn token, right-padded."""
        ...


@dataclass
class Collate:
    """Makes a batch of examples; errors name the row.

    Args:
        processor: Encodes prompts and targets.
        max_prompt_tokens: Rows with a longer prompt are left out and counted in ``Batch.num_skipped``; nothing is ever
            cut. ``None`` takes all rows.
        with_targets: Whether to encode reference completions, where every row has one.
        keep_images: Whether examples keep their pictures beside the pixels, to be written down again.
    """

    processor: Processor
    max_prompt_tokens: int | None = None
    with_targets: bool = True
    keep_images: bool = False

    def __call__(self, examples: Sequence[Example], valid: Sequence[bool] | None = None) -> Batch:
        """The batch.

        Args:
            examples: B rows.
            valid: ``[B]`` whether a row counts; all do by default.

        Raises:
            ValueError: No row is short enough, or a row cannot be encoded.
        """
        names = [_name(example) for example in examples]
        images = [example.images for example in examples]
        prompts = self.processor.encode([example.messages for example in examples], images, names)
        # From here on images are pixels.
        prompts.examples = list(examples) if self.keep_images else [replace(example, images=[]) for example in examples]
        prompts.valid = None if valid is None else torch.tensor(list(valid))
        kept = self._short_enough(prompts, names)
        if len(kept) < len(examples):
            prompts = prompts.select(kept)
        return Batch(prompts, self._targets(prompts.examples), num_skipped=len(examples) - len(kept))

    def _short_enough(self, prompts: Prompts, names: Sequence[str]) -> list[int]:
        lengths = prompts.lengths.tolist()
        limit = self.max_prompt_tokens
        kept = [row for row, length in enumerate(lengths) if limit is None or length <= limit]
        if not kept:
            shortest = min(range(len(lengths)), key=lengths.__getitem__)
            raise ValueError(
                f"every prompt of a batch of {len(lengths)} is longer than max_prompt_tokens={limit}: "
                f"{names[shortest]} has {lengths[shortest]} tokens; "
                "raise the limit, lower backbone.max_pixels, or use a larger prompts_per_step"
            )
        return kept

    def _targets(self, examples: Sequence[Example]) -> Completions | None:
        texts = [example.target for example in examples if example.target is not None]
        if not self.with_targets or len(texts) < len(examples):
            return None
        ids = [example.target_ids for example in examples]
        return self.processor.encode_targets(texts, ids, [_name(example) for example in examples])


def _name(example: Example) -> str:
    return f"task '{example.task}', {example.row_id}"
