"""How batches are loaded, and how loading goes on in the middle of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Generator
from torch.utils.data import DataLoader, Dataset

from cpt_lightning.data.collate import Collate
from cpt_lightning.data.sampler import RowRef, StageSampler
from cpt_lightning.tasks import SkippedRow
from cpt_lightning.types import Batch, Example


class KeptRows(Sequence[Example]):
    """The rows of a task that are shown, where not all are.

    Args:
        rows: All rows.
        kept: Numbers of those that are shown.
    """

    def __init__(self, rows: Sequence[Example], kept: Sequence[int]) -> None:
        self.rows = rows
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self.rows[self.kept[index]]


class StreamBatches(Dataset[Batch]):
    """Map-style over whole batches: a list of row references gives the batch of these rows.

    Args:
        rows: Examples of each task, by its name.
        collate: Makes the batch.
        keep_places: Whether a row that its task skips, because of an image, keeps its place as invalid filler, as
            evaluation needs: then all ranks have the same batches. Otherwise it is left out.
    """

    def __init__(self, rows: Mapping[str, Sequence[Example]], collate: Collate, keep_places: bool = False) -> None:
        self.rows = rows
        self.collate = collate
        self.keep_places = keep_places

    def __getitem__(self, refs: Sequence[RowRef]) -> Batch:
        """The batch; skipped rows are counted in it.

        Raises:
            ValueError: Something is wrong with a row; the message names task and row. Or every row is skipped.
        """
        examples, valid, skipped = [], [], []
        for ref in refs:
            try:
                examples.append(self.rows[ref.task][ref.row])
                valid.append(ref.valid)
            except SkippedRow as error:
                skipped.append(error)
                if self.keep_places:
                    examples.append(error.filler)
                    valid.append(False)
        if not examples:
            message = f"every row of a batch of {len(refs)} has an image that is refused; {skipped[0]}"
            raise ValueError(message) from skipped[0]
        batch = self.collate(examples, valid)
        return replace(batch, num_skipped=batch.num_skipped + len(skipped))


class StageLoader(DataLoader):
    """Loads the training batches of a stage; Lightning keeps its state, the step, in every checkpoint.

    Since a batch follows from its step alone, the step is all there is to keep: a resumed run may have another number
    of workers or ranks. (The state of torchdata's ``StatefulDataLoader`` is tied to its workers, and refuses that.)

    Args:
        batches: Makes a batch of row references.
        sampler: Says which rows each batch has.
        num_workers: Processes that load; 0 loads in this one.
        pin_memory: Whether a GPU fetches the batches.
    """

    sampler: StageSampler

    def __init__(
        self, batches: StreamBatches, sampler: StageSampler, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        # Items of the sampler are whole batches: Lightning re-makes batch samplers, and knows only one kind of them.
        # A loader without a generator of its own draws its workers' seed from torch's, each time it starts: a resumed
        # run, which starts it once more, would then train on other dropout.
        super().__init__(
            batches, sampler=sampler, batch_size=None, num_workers=num_workers, generator=Generator(),
            pin_memory=pin_memory,
        )  # fmt: skip
        self._num_loaded = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._num_loaded = self.sampler.first_step
        for batch in super().__iter__():
            self._num_loaded += 1
            yield batch

    def state_dict(self) -> dict:
        """The step, and what makes a step mean the same rows."""
        return {"step": self._num_loaded, "num_steps": len(self.sampler), **self.sampler.identity}

    def load_state_dict(self, state: dict) -> None:
        """Goes to the step at which another loader stood; a finished one leaves nothing to go on with.

        Raises:
            ValueError: In the middle of a stage of other data.
        """
        if state["step"] >= state["num_steps"]:
            return
        check_same_stage(state, self.sampler.identity, len(self.sampler))
        self.sampler.first_step = self._num_loaded = state["step"]


def check_same_stage(state: Mapping[str, Any], identity: Mapping[str, Any], num_steps: int) -> None:
    """Refuses to go on in the middle of a stage of other data, or behind its end.

    Args:
        state: Of a loader, from the checkpoint.
        identity: Of the stage's sampler now; parts that are not known yet may be missing.
        num_steps: Its batches now.

    Raises:
        ValueError: Names the option.
    """
    mend = "or resume from a checkpoint at the end of a task"
    for name, now in identity.items():
        before: Any = state.get(name)  # checkpoints from before there was replay do not speak of it
        if before != now:
            if name == "key":  # whose other part is the stage
                name, before, now = "seed_everything", before[0], now[0]
            raise ValueError(
                f"the checkpoint was written in the middle of a stage with {name}={before}, now it is {now}; restore "
                f"it, {mend}"
            )
    if state["step"] >= num_steps:
        raise ValueError(
            f"the checkpoint was written after {state['step']} of the {state['num_steps']} batches of a stage, which "
            f"now has no more than {num_steps} (data.steps, data.passes); give it more, {mend}"
        )
