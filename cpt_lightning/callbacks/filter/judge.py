"""Lets the current model try training rows, and counts how often it is right."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from cpt_lightning.callbacks.filter.verdicts import Verdict
from cpt_lightning.models.sharding import gather, release
from cpt_lightning.rewards import is_right
from cpt_lightning.rollouts import Sampling
from cpt_lightning.types import Batch


@dataclass(frozen=True)
class Judge:
    """Tries rows and gives verdicts.

    What a row draws is keyed by the module's seed, the stage and the row, so that a verdict depends neither on the
    batch that the row stands in nor on the number of ranks.

    Args:
        completions_per_row: K, attempts at a row.
        threshold: Accuracy from which an answer is right.
        sampling: How attempts are drawn; the module's own way at temperature 1 by default.
    """

    completions_per_row: int
    threshold: float
    sampling: Sampling | None = None

    def sampling_for(self, module: LightningModule) -> Sampling:
        """How attempts are drawn: if nothing else was said as the module samples (RFT), else as it evaluates (SFT)."""
        return self.sampling or replace(getattr(module, "sampling", module.evaluation), temperature=1.0)

    def verdicts(self, trainer: Trainer, stage: int, loader: DataLoader) -> Iterator[list[Verdict]]:
        """The verdicts on every batch of a loader, in the order of its rows and the same on every rank."""
        model = trainer.lightning_module.model
        gather(model)
        start = time.perf_counter()
        for refs, batch in zip(loader.sampler, loader, strict=True):
            mine = self._judge(trainer, stage, refs, batch)
            rows = [row for rank in range(trainer.world_size) for row in trainer.strategy.broadcast(mine, src=rank)]
            now = time.perf_counter()
            yield [replace(row, time_s=(now - start) / len(rows)) for row in rows]
            start = now
        release(model)

    def _judge(self, trainer: Trainer, stage: int, refs: Sequence[Any], batch: Batch) -> list[Verdict]:
        """This rank's verdicts on the rows of a batch that do not only fill it up."""
        refused = _refused(batch, trainer.datamodule.max_prompt_tokens)
        rows = [row for row, ref in enumerate(refs) if ref.valid]
        tried = [row for row in rows if refused[row] is None]
        attempts = dict(zip(tried, self._attempts(trainer, stage, batch, tried), strict=True))
        return [
            self._verdict(refs[row], batch.prompts.examples[row].row_id, refused[row], attempts.get(row, []))
            for row in rows
        ]

    def _attempts(
        self, trainer: Trainer, stage: int, batch: Batch, rows: list[int]
    ) -> list[list[tuple[str, dict[str, float]]]]:
        """K completions of each row, each with its scores."""
        if not rows:
            return []
        module, size = trainer.lightning_module, self.completions_per_row
        prompts = trainer.strategy.batch_to_device(batch.prompts.select(rows))
        with trainer.precision_plugin.val_step_context():
            _, texts, scores = module.attempt(prompts, size, self.sampling_for(module), stage)
        attempts = list(zip(texts, scores, strict=True))
        return [attempts[start : start + size] for start in range(0, len(attempts), size)]

    def _verdict(
        self, ref: Any, row_id: str, refused: str | None, attempts: list[tuple[str, dict[str, float]]]
    ) -> Verdict:
        texts = [text for text, _ in attempts]
        passed = [text for text, scores in attempts if is_right(scores, self.threshold)]
        mean_reward = sum(scores["total"] for _, scores in attempts) / max(1, len(attempts))
        shown = (passed or texts)[0] if texts else None
        return Verdict(ref.task, ref.row, row_id, len(passed), mean_reward, shown, refused)


def _refused(batch: Batch, max_prompt_tokens: int | None) -> list[str | None]:
    """Why rows cannot be learned from; for fillers it has no meaning."""
    prompts, limit = batch.prompts, max_prompt_tokens
    assert prompts.valid is not None, "the loader of rows to judge says which count"
    return [
        "image refused"
        if not valid
        else f"longer than max_prompt_tokens={limit}"
        if limit is not None and length > limit
        else None
        for valid, length in zip(prompts.valid.tolist(), prompts.lengths.tolist(), strict=True)
    ]
