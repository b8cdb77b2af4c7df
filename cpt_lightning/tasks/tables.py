"""Several files or splits, one after another, as one table whose rows know their names."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from cpt_lightning.tasks.records import Record, Records, kind_of


@dataclass
class Part:
    """The rows of one file or split.

    Args:
        records: Its rows.
        name: What their ids begin with: ``"rows.json:"``, ``"MMMU/MMMU/Art/validation/"``.
        folder: What their relative image paths are relative to.
        first: Number of the first one: rows of a file count from 1, as its lines do in an editor.
    """

    records: Records
    name: str
    folder: Path
    first: int = 0


class Table(Sequence[Record]):
    """The rows of several parts, one after another.

    Args:
        parts: At least one.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.starts = [0, *accumulate(len(part.records) for part in self.parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index):
        part, row = self._locate(index)
        record = part.records[row]
        if not isinstance(record, dict):
            raise ValueError(f"{self.row_id(index)}: the row is {kind_of(record)}, not an object with columns")
        return record

    def row_id(self, index: int) -> str:
        """``"<file>:<row>"``, counted from 1 as lines are, or ``"<source>/<split>/<row>"``, from 0 as datasets are."""
        part, row = self._locate(index)
        return f"{part.name}{row + part.first}"

    def folder(self, index: int) -> Path:
        """What a row's relative image paths are relative to."""
        return self._locate(index)[0].folder

    def names(self) -> list[str]:
        """Every column's name."""
        return list(dict.fromkeys(name for part in self.parts for name in part.records.names()))

    def column(self, name: str) -> list | None:
        """Every row's value of a column, ``None`` where a row has none; ``None`` altogether where no row has any."""
        values = [value for part in self.parts for value in part.records.column(name)]
        return None if all(value is None for value in values) else values

    def held(self, name: str) -> np.ndarray:
        """``[num_rows]`` whether a column holds something."""
        return np.concatenate([part.records.held(name) for part in self.parts])

    def _locate(self, index: int) -> tuple[Part, int]:
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], int(index) - self.starts[part]


class JoinedTable(Table):
    """A table each of whose rows has further columns from the row of another table that its key names.

    Args:
        table: What is joined; its rows keep their names.
        column: Its column that holds the keys.
        other: Where the further columns are from; its keys are read once, its images are not.
        key: Column of ``other`` that holds the keys; of equal ones the first counts.
        columns: Columns of ``other`` that the rows get.

    Raises:
        ValueError: A column is not there.
    """

    def __init__(self, table: Table, column: str, other: Table, key: str, columns: Sequence[str]) -> None:
        super().__init__(table.parts)
        self.key_column = column
        self.other = other
        self.columns = list(columns)
        keys = other.column(key)
        for name, names in ((column, table.names()), *((name, other.names()) for name in (key, *columns))):
            if name not in names:
                raise ValueError(f"join: there is no column '{name}' in {', '.join(names)}")
        self.rows = {value: row for row, value in reversed(list(enumerate(keys or [])))}

    def __getitem__(self, index):
        record = super().__getitem__(index)
        key = record.get(self.key_column)
        if key not in self.rows:
            place = self.other.parts[0].name.rstrip("/:")
            raise ValueError(f"{self.row_id(index)}: no row of {place} has the {self.key_column} {key!r}")
        other = self.other[self.rows[key]]
        return {**record, **{name: other[name] for name in self.columns}}

    def names(self) -> list[str]:
        """Every column's name, joined ones last."""
        return [*super().names(), *self.columns]

    def column(self, name: str) -> list | None:
        """Every row's value of a column; a joined one has it from the row of the other table."""
        if name not in self.columns:
            return super().column(name)
        values = self.other.column(name)
        return values and [None if row is None else values[row] for row in self._rows_of_other()]

    def held(self, name: str) -> np.ndarray:
        """``[num_rows]`` whether a column holds something; a joined one does where the other table has the key."""
        if name not in self.columns:
            return super().held(name)
        held = self.other.held(name)
        return np.array([row is not None and held[row] for row in self._rows_of_other()], dtype=bool)

    def _rows_of_other(self) -> list[int | None]:
        """Which row of the other table each row is joined with, ``None`` where its key is not there."""
        return [self.rows.get(key) for key in super().column(self.key_column) or [None] * len(self)]
