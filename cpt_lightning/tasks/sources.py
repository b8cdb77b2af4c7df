"""Sources that read tables: rows of files, and what all such sources share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from cpt_lightning.tasks.checks import check_kinds
from cpt_lightning.tasks.choices import has_options
from cpt_lightning.tasks.columns import IMAGE_COLUMNS, Columns
from cpt_lightning.tasks.files import check_files, open_files
from cpt_lightning.tasks.rows import SPLITS, LazySequence, Row, Source, Split, check_split
from cpt_lightning.tasks.splits import check_fractions, cut_by_group
from cpt_lightning.tasks.tables import Table


@dataclass(kw_only=True)
class TableRows(Source):
    """A source whose splits are tables; a split that it does not have can be cut from the training rows.

    Args:
        columns: Which columns say what, and which rows are left out.
        val_fraction: Without a val split: part of the training rows to set aside for it, in (0, 1).
        test_fraction: Without a test split: part of the training rows to set aside for it.
        group_by: Column whose equal values stay on the same side of such a cut.
        seed: Draws the cut.
        image_folder: What relative image paths are relative to, or that by split.
    """

    columns: Columns = field(default_factory=Columns)
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    group_by: str | None = None
    seed: int = 0
    image_folder: str | dict[str, str] | None = None

    @abstractmethod
    def has(self, split: Split) -> bool:
        """Whether the split is given, rather than cut from the training rows or not there."""

    @abstractmethod
    def open(self, split: Split) -> Table:
        """The table of a split that is given."""

    def split(self, split: Split) -> Sequence[Row]:
        """The rows of a split; their text is at hand, their images are paths or encoded.

        Raises:
            ValueError: The source has no such split, or it cannot be opened, which is not tried twice.
        """
        table, rows = self._table_and_rows(split)
        return LazySequence(len(rows), partial(self._row, table, rows, self._image_folder(self._given(split))))

    def num_left_out(self, split: Split) -> int:
        """Rows that ``columns.required`` and ``columns.where`` leave out of the table that a split is from.

        Raises:
            ValueError: The source has no such split.
        """
        self._table_and_rows(split)
        table, kept = self._kept(self._given(split))
        return len(table) - len(kept)

    def num_without_options(self, split: Split) -> int:
        """Rows of a split that have none of the options that ``columns.options`` promises: open questions.

        Raises:
            ValueError: The source has no such split.
        """
        names = self.columns.options
        if names is None:
            return 0
        table, rows = self._table_and_rows(split)
        columns = [table.column(name) or [None] * len(table) for name in ([names] if isinstance(names, str) else names)]
        return sum(not any(has_options(column[row]) for column in columns) for row in rows)

    def _check_options(self) -> None:
        check_kinds(columns=(self.columns, Columns))
        if isinstance(self.image_folder, dict) and (
            unknown := [name for name in self.image_folder if name not in SPLITS]
        ):
            raise ValueError(f"image_folder names {unknown[0]!r}; there are {', '.join(SPLITS)}")
        for split in SPLITS:
            folder = self._image_folder(split)
            if folder is not None and not folder.is_dir():
                raise ValueError(f"image_folder '{folder}' is not a folder")
        check_fractions(self.val_fraction, self.test_fraction)
        for split in ("val", "test"):
            if self._fractions[split] and self.has(split):
                raise ValueError(f"both {split} and {split}_fraction are given; leave one out")
        if any(self._fractions.values()) and not self.has("train"):
            raise ValueError("val_fraction and test_fraction are cut from train; give it")
        if self.group_by and not any(self._fractions.values()):
            raise ValueError("group_by only matters with val_fraction or test_fraction; set one or leave it out")

    def _given(self, split: Split) -> Split:
        """The split whose table holds a split's rows."""
        return split if self.has(split) else "train"

    def _image_folder(self, split: Split) -> Path | None:
        name = self.image_folder.get(split) if isinstance(self.image_folder, dict) else self.image_folder
        return None if name is None else Path(name).expanduser()

    @property
    def _fractions(self) -> dict[Split, float]:
        return {"val": self.val_fraction, "test": self.test_fraction}

    def _table_and_rows(self, split: Split) -> tuple[Table, np.ndarray]:
        """A split's table, and which of its rows the split has."""
        check_split(split)
        if split != "train" and self.has(split):
            return self._kept(split)
        if self.has("train") and (split == "train" or self._fractions[split]):
            table, kept = self._kept("train")
            return table, kept[self._cut[split]]
        hint = "" if split == "train" else f", or {split}_fraction to set a part of train aside"
        raise ValueError(f"no {split} split; set {split}{hint}")

    @cached_property
    def _opened(self) -> dict[Split, tuple[Table, np.ndarray]]:
        return {}

    @cached_property
    def _failures(self) -> dict[Split, str]:
        return {}

    def _kept(self, split: Split) -> tuple[Table, np.ndarray]:
        """The table of a given split, and its rows that ``columns`` does not leave out."""
        if split in self._failures:
            raise ValueError(self._failures[split])
        if split not in self._opened:
            try:
                table = self.open(split)
                self._opened[split] = table, self._choose(table, split)
            except ValueError as error:
                # A set that cannot be had takes its time to say so, and is asked for at every turn. The text alone is
                # kept: the error would hold on to whatever its frames were reading.
                self._failures[split] = str(error)
                raise
        return self._opened[split]

    def _choose(self, table: Table, split: Split) -> np.ndarray:
        """Indices of the rows that ``columns`` does not leave out."""
        kept = np.ones(len(table), dtype=bool)
        for name in self.columns.required:
            self._check_column(table, name, "required")
            kept &= table.held(name)
        for name, wanted in self.columns.where.items():
            self._check_column(table, name, "where")
            values = wanted if isinstance(wanted, list) else [wanted]
            held = table.column(name) or [None] * len(table)
            kept &= np.array([value in values for value in held], dtype=bool)
        if len(table) and not kept.any():
            raise ValueError(f"columns.required and columns.where leave none of {len(table)} rows of {split}")
        return np.flatnonzero(kept)

    def _check_column(self, table: Table, name: str, option: str) -> None:
        names = table.names()
        if name not in names:
            raise ValueError(f"columns.{option}: there is no column '{name}', only {', '.join(names)}")

    @cached_property
    def _cut(self) -> dict[Split, np.ndarray]:
        """Indices into the kept training rows."""
        table, kept = self._kept("train")
        if not (self.val_fraction or self.test_fraction):
            return {"train": np.arange(len(kept))}
        groups = self._groups(table)
        return cut_by_group([groups[row] for row in kept], self.val_fraction, self.test_fraction, self.seed)

    def _groups(self, table: Table) -> list[str]:
        """What keeps each row together with others: the value of a column, or the paths of its images."""
        name = self._group_column()
        if name:
            self._check_column(table, name, "group_by")
            values = table.column(name) or [None] * len(table)
            keys = [None if value is None else f"group {value}" for value in values]
        else:
            names = [self.columns.images] if isinstance(self.columns.images, str) else IMAGE_COLUMNS
            columns = (table.column(name) for name in names)
            paths = next((column for column in columns if column is not None), [None] * len(table))
            keys = [_paths(value) for value in paths]
        return [key or f"row {index}" for index, key in enumerate(keys)]

    def _group_column(self) -> str | None:
        return self.group_by

    def _row(self, table: Table, rows: np.ndarray, folder: Path | None, index: int) -> Row:
        row = int(rows[index])
        return self.columns.read(table[row], table.row_id(row), folder or table.folder(row))


@dataclass
class FileRows(TableRows):
    """Rows of files: JSON, JSON lines, CSV, TSV, parquet, arrow, and folders of them or of images with metadata.

    Images are paths, encoded bytes, base64, or the hub's ``{"bytes": ..., "path": ...}``, read when the row is used.

    Args:
        train: File or folder, or list of them, of the training split; relative paths start at the working directory.
        val: Likewise for the validation split.
        test: Likewise for the test split.
        columns: Which columns say what, and which rows are left out.
        val_fraction: Without ``val``: part of ``train`` to set aside for it, in (0, 1).
        test_fraction: Without ``test``: part of ``train`` to set aside for it.
        group_by: Column whose equal values stay on the same side of such a cut; by default the images' paths, so that
            no picture is seen in two splits. Rows with encoded images are cut one by one.
        seed: Draws the cut.
        image_folder: What relative image paths are relative to, or that by split; by default the folder of the row's
            own file.

    Raises:
        ValueError: No file at all, a file that is missing or of another kind, or options that contradict each other.
    """

    train: str | list[str] | None = None
    val: str | list[str] | None = None
    test: str | list[str] | None = None

    def __post_init__(self) -> None:
        if not any(self.has(split) for split in SPLITS):
            raise ValueError("no file is given; set train, val or test")
        for split in SPLITS:
            check_files(self._files(split))
        self._check_options()

    def has(self, split: Split) -> bool:
        """Whether files of the split are given."""
        return bool(self._files(split))

    def open(self, split: Split) -> Table:
        """The rows of the split's files."""
        return open_files(self._files(split))

    def _files(self, split: Split) -> list[str]:
        files = {"train": self.train, "val": self.val, "test": self.test}[split]
        given = [files] if isinstance(files, str | PathLike) else files or []
        return [fspath(file) for file in given]  # of pathlib too


def _paths(value: object) -> str | None:
    """A row's images by their paths, ``None`` where there is none or they are not paths."""
    images = value if isinstance(value, list) else [value]
    return f"images {images}" if images and all(isinstance(image, str) for image in images) else None
