"""Rows in files: JSON, JSON lines or parquet, in the forms that other trainers and the hub use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from cpt_lightning.tasks.forms import IMAGE_COLUMNS, RowForm
from cpt_lightning.tasks.splits import check_fractions, cut_by_group
from cpt_lightning.tasks.tables import Table, check_files
from cpt_lightning.tasks.task import SPLITS, LazySequence, Row, Source, Split, check_split


@dataclass
class JsonRows(Source):
    """Rows of ``.json``, ``.jsonl`` and ``.parquet`` files, as LLaMA-Factory, ms-swift, EasyR1 and the hub write them.

    A row has either ``messages`` (a chat of one question and, for SFT, its reply) or a question and an answer, and
    ``images``: paths, encoded bytes, or the hub's ``{"bytes": ..., "path": ...}``, read when the row is used. An
    ``<image>`` marker in the question says where an image goes.

    Args:
        train: File, or list of files, of the training split; relative paths start at the working directory.
        val: Likewise for the validation split.
        test: Likewise for the test split.
        val_fraction: Without ``val``: part of ``train`` to set aside for it, in (0, 1).
        test_fraction: Without ``test``: part of ``train`` to set aside for it.
        group_by: Column whose equal values stay on the same side of such a cut; by default the images' paths, so that
            no picture is seen in two splits. Rows with encoded images are cut one by one.
        seed: Draws the cut.
        messages_column: Column of the chat; by default ``messages`` where a row has it.
        question_column: Column of the question of rows without a chat; by default ``problem`` or ``question``.
        answer_column: Column of the reference answer, or of a list of them; by default a chat's reply, else ``answer``,
            ``answers`` or ``solution``.
        images_column: Column of the image or images; by default ``images`` or ``image``; without it rows are text only.
        image_folder: What relative image paths are relative to; by default the folder of the row's own file.
        fields: Columns that a task's target template may use as slots.

    Raises:
        ValueError: No file at all, a file that is missing or of another kind, or options that contradict each other.
    """

    train: str | list[str] | None = None
    val: str | list[str] | None = None
    test: str | list[str] | None = None
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    group_by: str | None = None
    seed: int = 0
    messages_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    images_column: str | None = None
    image_folder: str | None = None
    fields: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not any(self._files(split) for split in SPLITS):
            raise ValueError("no file is given; set train, val or test")
        if self.messages_column and self.question_column:
            raise ValueError("messages_column and question_column exclude each other: a row is a chat or a question")
        if self.image_folder is not None and not Path(self.image_folder).expanduser().is_dir():
            raise ValueError(f"image_folder {self.image_folder!r} is not a folder")
        for split in SPLITS:
            check_files(self._files(split))
        check_fractions(self.val_fraction, self.test_fraction)
        self._check_cut()

    def _check_cut(self) -> None:
        cut = {"val": self.val_fraction, "test": self.test_fraction}
        for split in ("val", "test"):
            if cut[split] and self._files(split):
                raise ValueError(f"both {split} and {split}_fraction are given; leave one out")
        if any(cut.values()) and not self.train:
            raise ValueError("val_fraction and test_fraction are cut from train; give it")
        if self.group_by and not any(cut.values()):
            raise ValueError("group_by only matters with val_fraction or test_fraction; set one or leave it out")

    def split(self, split: Split) -> Sequence[Row]:
        """The rows of a split; their text is at hand, their images are paths or bytes."""
        check_split(split)
        if split != "train" and self._files(split):
            table = Table(self._files(split))
            indices = np.arange(len(table))
        elif self.train and (split == "train" or {"val": self.val_fraction, "test": self.test_fraction}[split]):
            table, indices = self._train_table, self._cut[split]
        else:
            hint = "" if split == "train" else f", or {split}_fraction to set a part of train aside"
            raise ValueError(f"no {split} split; set {split} to a file{hint}")
        return LazySequence(len(indices), partial(self._row, table, indices))

    @cached_property
    def _train_table(self) -> Table:
        return Table(self._files("train"))

    @cached_property
    def _cut(self) -> dict[Split, np.ndarray]:
        if not (self.val_fraction or self.test_fraction):
            return {"train": np.arange(len(self._train_table))}
        return cut_by_group(self._groups(), self.val_fraction, self.test_fraction, self.seed)

    def _groups(self) -> list[str]:
        """What keeps each training row together with others: the ``group_by`` value, or the paths of its images."""
        names = [self.group_by] if self.group_by else [self.images_column] if self.images_column else IMAGE_COLUMNS
        columns = (self._train_table.column(name) for name in names if name)
        values = next((column for column in columns if column is not None), None)
        if values is None and self.group_by:
            raise ValueError(f"group_by: there is no column '{self.group_by}' in {', '.join(self._files('train'))}")
        if values is None:
            values = [None] * len(self._train_table)
        keys = [None if value is None else f"group {value}" if self.group_by else _paths(value) for value in values]
        return [key or f"row {index}" for index, key in enumerate(keys)]

    def _files(self, split: Split) -> list[str]:
        files = {"train": self.train, "val": self.val, "test": self.test}[split]
        return [files] if isinstance(files, str) else list(files or [])

    @cached_property
    def _form(self) -> RowForm:
        return RowForm(
            self.messages_column, self.question_column, self.answer_column, self.images_column, list(self.fields)
        )

    def _row(self, table: Table, indices: np.ndarray, index: int) -> Row:
        row = int(indices[index])
        folder = Path(self.image_folder).expanduser() if self.image_folder else table.folder(row)
        return self._form.read(table[row], table.row_id(row), folder)


def _paths(value: object) -> str | None:
    """A row's images by their paths, ``None`` where there is none or they are not paths."""
    images = value if isinstance(value, list) else [value]
    return f"images {images}" if images and all(isinstance(image, str) for image in images) else None
