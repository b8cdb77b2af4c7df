"""Evaluation by generated answers: the model is asked, and its answers are graded and counted."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from cpt_lightning.models import Backbone
from cpt_lightning.modules.task_adapters import TaskAdapters
from cpt_lightning.rewards import score, with_ratios
from cpt_lightning.rollouts import Attempts, Sampler, Sampling, completion_logprobs, sample_groups
from cpt_lightning.rollouts.attempts import repeated
from cpt_lightning.rollouts.sampling import keyed_generator, row_generators, with_prefix
from cpt_lightning.types import Batch, Completions, Evaluation, Prompts

if TYPE_CHECKING:
    from cpt_lightning.models.processor import PromptProcessor
    from cpt_lightning.models.qwen_vl import QwenVL

DRAWN_AT_ONCE = 8
"""Rows that :meth:`Evaluating.drawn` samples together: their images and keys must fit beside what training holds."""


class Evaluating(TaskAdapters):
    """The half of every module that answers: in validation, test and prediction, and for callbacks that ask it."""

    backbone: Backbone
    model: QwenVL
    evaluation: Sampling
    forced_prefix: str | None
    attempts: Attempts | None
    sampler: Sampler | None

    def __init__(self) -> None:
        super().__init__()
        self.sums = nn.ModuleDict()

    @cached_property
    def processor(self) -> PromptProcessor:
        """Turns messages and images into prompts, and completions into text; the data module uses it too."""
        return self.backbone.load_processor()

    def evaluate(self, batch: Batch) -> Evaluation:
        """Lets the model answer every prompt once and grades the answers.

        What is sampled (not greedy) depends on the seed and the row alone, and not on what else is evaluated.

        Args:
            batch: B rows; of one task, where each has its own adapters.
        """
        prompts = batch.prompts
        valid = [True] * len(prompts) if prompts.valid is None else prompts.valid.tolist()
        with self.adapters_of(prompts.examples[0].task):
            _, texts, scores = self.attempt(prompts, 1, self.evaluation)
            if self.forced_prefix is not None:
                forced = self.attempt(prompts, 1, replace(self.evaluation, prefix=self.forced_prefix))[2]
                scores = [
                    {**free, "forced_accuracy": other["accuracy"]} for free, other in zip(scores, forced, strict=True)
                ]
        return Evaluation(prompts.examples, texts, scores, valid)

    def attempt(
        self, prompts: Prompts, group_size: int, sampling: Sampling, *key: int
    ) -> tuple[Completions, list[str], list[dict[str, float]]]:
        """Lets the model answer every prompt ``group_size`` times, without learning from it.

        Args:
            prompts: B prompts.
            group_size: G.
            sampling: How answers are drawn.
            key: What the draws of a row depend on, besides the seed and the row.

        Returns:
            N = B * G completions, group by group, their texts and their named scores.
        """
        generators = row_generators(self.device, prompts, self.seed, *key)
        sample = sample_groups if self.sampler is None else self.sampler.sample
        completions = sample(self.model, self.processor, prompts, group_size, sampling, generators)
        texts = self.processor.decode(completions)
        return completions, texts, score(texts, repeated(prompts.examples, group_size))

    def evaluate_attempts(self, batch: Batch, attempts: Attempts) -> Evaluation:
        """Answers each row several times, shown a hint if so wanted, and grades all of it.

        Args:
            batch: B rows; of one task, where each has its own adapters.
            attempts: How often, and how.

        Returns:
            N = B * G completions, group by group, and what they are worth.
        """
        prompts, size = batch.prompts, attempts.group_size
        shown = attempts.hint.show(self.processor, prompts) if attempts.hint else prompts
        with self.adapters_of(prompts.examples[0].task):
            completions, texts, scores = self.attempt(shown, size, attempts.sampling)
        valid = [True] * len(prompts) if prompts.valid is None else prompts.valid.tolist()
        counted = [counts for counts in valid for _ in range(size)]
        return Evaluation(repeated(prompts.examples, size), texts, scores, counted, completions)

    def drawn(self, batch: Batch, sampling: Sampling, *key: int) -> Batch:
        """The batch with completions that the policy draws, one of each row, in the place of its targets.

        Always by our own engine: callbacks measure the policy by them. What evaluations have them begin with
        (``evaluation.prefix``) belongs to the prompts of the result.

        Args:
            batch: B rows.
            sampling: How the policy draws.
            key: What the draws depend on, besides the seed and a row's place: the same on every rank.
        """
        completions = []
        prefix = self.processor.encode_prefix(self.evaluation.prefix)
        batch = replace(batch, prompts=with_prefix(batch.prompts, prefix))
        for rows in torch.arange(len(batch)).split(DRAWN_AT_ONCE):
            generators = [keyed_generator(self.device, self.seed, *key, row) for row in rows.tolist()]
            prompts = batch.prompts.select(rows.tolist())
            completions.append(sample_groups(self.model, self.processor, prompts, 1, sampling, generators))
        return replace(batch, targets=Completions.cat(completions, self.processor.pad_token_id))

    def log_likelihoods(self, batch: Batch) -> Tensor:
        """``[B]`` log-probability of every row's target, in nats; callbacks measure the policy by its gradient.

        Raises:
            ValueError: A row has no target.
        """
        # Not by `logprobs`: this is looked at, and not learned from.
        return completion_logprobs(self.model, batch.prompts, batch.required_targets()).sum(dim=1)

    def validation_step(self, batch: Batch, batch_idx: int) -> Evaluation:
        """Answers and grades one batch of one task."""
        return self._evaluation_step(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Evaluation:
        """Answers and grades one batch of one task."""
        return self._evaluation_step(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Evaluation:
        """Answers and grades one batch, each row several times if ``attempts`` says so."""
        if self.attempts is None:
            return self.evaluate(batch)
        return self.evaluate_attempts(batch, self.attempts)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/<task>/accuracy`` and the other scores of every task."""
        if self.sampler is not None:
            self.sampler.sleep()
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Logs ``test/<task>/accuracy`` and the other scores of every task."""
        self._log_scores("test")

    def _evaluation_step(self, batch: Batch) -> Evaluation:
        evaluation = self.evaluate(batch)
        valid = torch.tensor(evaluation.valid, dtype=torch.float64)
        for task in dict.fromkeys(example.task for example in evaluation.examples):
            counts = valid * torch.tensor([example.task == task for example in evaluation.examples])
            # A row that only fills up a rank's share still makes its sums exist there: all ranks reduce the same.
            self._sum(f"{task}/num_samples").update(counts.sum())
            for name in evaluation.scores[0]:
                values = torch.tensor([scores[name] for scores in evaluation.scores], dtype=torch.float64)
                self._sum(f"{task}/{name}").update((counts * values).sum())
        return evaluation

    def _sum(self, key: str) -> SumMetric:
        # A mean of batch means is wrong when batches differ in size, so sums and counts are kept; over ranks too.
        if key not in self.sums:
            self.sums[key] = SumMetric(nan_strategy="disable").set_dtype(torch.float64).to(self.device)
        return cast(SumMetric, self.sums[key])

    def _log_scores(self, stage: str) -> None:
        sums: dict[str, dict[str, Tensor]] = {}
        for key in sorted(self.sums):
            task, _, name = key.rpartition("/")
            sums.setdefault(task, {})[name] = self._sum(key).compute()
        self.sums.clear()
        for task, totals in sums.items():
            num_samples = totals.pop("num_samples")
            if not num_samples:
                raise ValueError(
                    f"task '{task}': no row is left to evaluate, for all their images were refused (bad_images: skip); "
                    "cpt inspect says why"
                )
            means = with_ratios({name: (total / num_samples).item() for name, total in totals.items()})
            for name, value in {**means, "num_samples": num_samples.item()}.items():
                self.log(f"{stage}/{task}/{name}", value)
