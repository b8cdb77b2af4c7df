"""The largest batches that a stream may give: what is rehearsed in its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpt_lightning.cli.plan.phases import Workload
from cpt_lightning.cli.plan.worst_batch import full_completions, longest_prompts
from cpt_lightning.data import TaskStream
from cpt_lightning.modules import PostTraining
from cpt_lightning.rewards import Reward
from cpt_lightning.tasks import Row, Source, Split, Task
from cpt_lightning.tasks.rows import LazySequence
from cpt_lightning.types import Completions, Prompts

NUM_EVALUATED = 10**6
"""Rows that an evaluation could ask; the Trainer of a rehearsal stops behind the first batch."""


class LargestBatches(TaskStream):
    """A stream with the names of another, each of whose batches is of the largest rows.

    Args:
        stream: The other.
        stages: Names of its tasks, stage by stage.
        workload: How large rows and batches are.
        module: Whose model the rows are made for, once it is loaded.
        num_steps: Batches of a stage.
    """

    def __init__(
        self, stream: TaskStream, stages: list[list[str]], workload: Workload, module: PostTraining, num_steps: int
    ) -> None:
        # All rows of a task are one evaluation batch: so many the filter judges at once.
        task = Task(_Rows(num_train=workload.eval_prompts_per_step), reward=EveryOther())
        super().__init__(
            tasks=dict.fromkeys(stream.task_names, task),
            probes=dict.fromkeys(stream.probe_names, task),
            prompts_per_step=workload.prompts_per_step,
            steps=num_steps,
            eval_prompts_per_step=workload.eval_prompts_per_step,
            seed=stream.seed,
        )
        self.stages = stages
        self.task_names = list(stream.task_names)  # those that no stage has are no probes
        self.processor = LargestRows(module, workload)


class LargestRows:
    """In the place of a processor: makes the largest row of whatever it is given.

    Args:
        module: Whose model it is for.
        workload: How large that is.
    """

    def __init__(self, module: PostTraining, workload: Workload) -> None:
        self.module, self.workload = module, workload

    def encode(self, messages: Sequence[list[dict]], images: Sequence[list], row_ids: Sequence[str]) -> Prompts:
        """B prompts of the longest length, with images of noise."""
        sizes, largest = self.workload, self.module.backbone.max_pixels
        prompts = longest_prompts(self.module.model, len(messages), sizes.prompt_tokens, largest, sizes.num_images)
        if prompts.pixel_values is not None:
            prompts.pixel_values = torch.rand(prompts.pixel_values.shape)
        return prompts

    def encode_targets(
        self, texts: Sequence[str], ids: Sequence[list[int] | None], row_ids: Sequence[str]
    ) -> Completions:
        """B targets of the longest length."""
        return full_completions(self.module.model, len(texts), self.workload.target_tokens)


class EveryOther(Reward):
    """A reward for every other completion, whatever it says: then every group has something to teach."""

    count = 0

    def __call__(self, completion: str, gold: str | list[str]) -> dict[str, float]:
        """1 or 0."""
        self.count += 1
        return {"total": self.count % 2, "accuracy": self.count % 2}


class _Rows(Source):
    """Rows that say nothing.

    Args:
        num_train: How many are learned from.
    """

    def __init__(self, num_train: int) -> None:
        self.num_train = num_train

    def split(self, split: Split) -> Sequence[Row]:
        """As many as there may be."""
        num_rows = self.num_train if split == "train" else NUM_EVALUATED
        return LazySequence(num_rows, lambda index: Row(f"largest/{split}/{index}", question="?", answer="?"))
