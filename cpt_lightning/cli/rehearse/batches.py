"""The largest batches that a stream may give: what is rehearsed in its place."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from cpt_lightning.cli.plan.phases import Workload
from cpt_lightning.cli.plan.worst_batch import full_completions, longest_prompts
from cpt_lightning.modules import PostTraining
from cpt_lightning.types import Batch, Example


class EveryOther:
    """A reward for every other completion, whatever it says: then every group has something to teach."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, completion: str, gold: str | list[str]) -> dict[str, float]:
        """1 or 0."""
        self.count += 1
        return {"total": self.count % 2, "accuracy": self.count % 2}


class LargestBatches(L.LightningDataModule):
    """One stage of the largest batches, and one such batch to evaluate.

    Args:
        task_names: Tasks of the stream.
        learned: Those whose batches are learned, one kind after the other.
        workload: How large they are.
        num_batches: Of each kind.
    """

    def __init__(self, task_names: Sequence[str], learned: Sequence[str], workload: Workload, num_batches: int) -> None:
        super().__init__()
        self.task_names = list(task_names)
        self.learned = list(learned)
        self.workload = workload
        self.num_batches = num_batches

    @property
    def stages(self) -> list[list[str]]:
        """As of a stream."""
        return [self.learned]

    def train_dataloader(self) -> DataLoader:
        """``num_batches`` of each kind."""
        kinds = [task for task in self.learned for _ in range(self.num_batches)]
        return self._loader(kinds, self.workload.prompts_per_step)

    def val_dataloader(self) -> DataLoader:
        """One batch."""
        return self._loader(self.learned[:1], self.workload.eval_prompts_per_step)

    def _loader(self, kinds: list[str], num_prompts: int) -> DataLoader:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        share = -(-num_prompts // self.trainer.world_size)
        return DataLoader(_Batches(module, kinds, share, self.workload), batch_size=None)


class _Batches(Dataset):
    """Batches of a device, each made when its turn comes."""

    def __init__(self, module: PostTraining, kinds: list[str], num_prompts: int, workload: Workload) -> None:
        self.module, self.kinds, self.num_prompts, self.workload = module, kinds, num_prompts, workload

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> Batch:
        sizes, model = self.workload, self.module.model
        largest = self.module.backbone.max_pixels
        prompts = longest_prompts(model, self.num_prompts, sizes.prompt_tokens, largest, sizes.num_images)
        if prompts.pixel_values is not None:
            prompts.pixel_values = torch.rand(prompts.pixel_values.shape)
        task, reward = self.kinds[index], EveryOther()
        prompts.examples = [
            Example(task, f"largest/{index}/{row}", [{"role": "user", "content": "?"}], gold="?", reward=reward)
            for row in range(self.num_prompts)
        ]
        return Batch(prompts, full_completions(model, self.num_prompts, sizes.target_tokens))
