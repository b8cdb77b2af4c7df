"""Rows that a program has in memory, such as a data set of the hub that was loaded and filtered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_lightning.tasks.records import ArrowRecords, ListedRecords, kind_of
from cpt_lightning.tasks.rows import SPLITS, Split
from cpt_lightning.tasks.sources import TableRows
from cpt_lightning.tasks.tables import Part, Table


@dataclass
class MemoryRows(TableRows):
    """Rows in memory: a list of mappings from columns to values, or a ``datasets.Dataset``.

    Args:
        train: The rows of the training split.
        val: Likewise of the validation split.
        test: Likewise of the test split.
        columns: Which columns say what, and which rows are left out.
        val_fraction: Without ``val``: part of ``train`` to set aside for it, in (0, 1).
        test_fraction: Without ``test``: part of ``train`` to set aside for it.
        group_by: Column whose equal values stay on the same side of such a cut; by default the images' paths.
        seed: Draws the cut.
        image_folder: What relative image paths are relative to, or that by split; the working directory by default.

    Raises:
        TypeError: Rows that are neither.
        ValueError: No rows at all, or options that contradict each other.

    >>> source = MemoryRows([{"question": "What is 1 + 1?", "answer": 2}])
    >>> source.split("train")[0].answer
    '2'
    """

    train: Any = None
    val: Any = None
    test: Any = None

    def __post_init__(self) -> None:
        if not any(self.has(split) for split in SPLITS):
            raise ValueError("no rows are given; set train, val or test")
        for split in SPLITS:
            rows = self._rows(split)
            if rows is not None and not (isinstance(rows, list) or _is_dataset(rows)):
                raise TypeError(f"{split} is {kind_of(rows)}; give a list of dicts, or one split as a datasets.Dataset")
        self._check_options()

    def has(self, split: Split) -> bool:
        """Whether rows of the split are given."""
        return self._rows(split) is not None

    def open(self, split: Split) -> Table:
        """The split's rows."""
        rows = self._rows(split)
        records = ListedRecords(rows) if isinstance(rows, list) else ArrowRecords(rows)
        return Table([Part(records, f"{split}/", Path.cwd())])

    def _rows(self, split: Split) -> Any:
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def _is_dataset(rows: object) -> bool:
    from datasets import Dataset

    return isinstance(rows, Dataset)
