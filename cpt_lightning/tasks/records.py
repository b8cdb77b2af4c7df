"""Rows as a file has them: a value under each column's name, in memory or memory-mapped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Record = dict[str, object]
"""One row as its file has it: a value under each column's name."""


class Records(Protocol):
    """Rows of one file or one split of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """A row: a :data:`Record`, if the file is right."""
        ...

    def names(self) -> list[str]:
        """Every column's name."""
        ...

    def column(self, name: str) -> list:
        """All values of a column; ``None`` where a row has none, and for encoded images, which stay unread."""
        ...

    def held(self, name: str) -> np.ndarray:
        """``[num_rows]`` whether the column holds something; images are not decoded for it."""
        ...


def is_held(value: object) -> bool:
    """Whether a value says something: not nothing, blank text, an empty list, or an image without bytes and path.

    >>> [is_held(value) for value in (0, " ", [], [""], {"bytes": None, "path": None}, {"answer": "a"})]
    [True, False, False, False, False, True]
    """
    if isinstance(value, float):
        return not math.isnan(value)  # how pandas writes nothing in a column of numbers
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, (list, tuple)):
        return any(is_held(entry) for entry in value)
    if isinstance(value, dict):
        return any(is_held(entry) for entry in value.values())
    return value is not None


def kind_of(value: object) -> str:
    """What a value is, as an error says it.

    >>> [kind_of(value) for value in (None, 3, [])]
    ['nothing', 'an int', 'a list']
    """
    if value is None:
        return "nothing"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


class ListedRecords(list):
    """Rows that are in memory; they need not all have the same columns."""

    def names(self) -> list[str]:
        """Every column's name."""
        return list(dict.fromkeys(name for row in self if isinstance(row, dict) for name in row))

    def column(self, name: str) -> list:
        """All values of a column, ``None`` where a row has none."""
        return [row.get(name) if isinstance(row, dict) else None for row in self]

    def held(self, name: str) -> np.ndarray:
        """``[num_rows]`` whether the column holds something."""
        return np.array([is_held(value) for value in self.column(name)], dtype=bool)


class ArrowRecords(Sequence[Record]):
    """The rows of a ``datasets.Dataset``: memory-mapped, images left encoded, class labels by their names.

    Args:
        dataset: A ``datasets.Dataset``.
    """

    def __init__(self, dataset) -> None:
        # Arrow values keep images as {"bytes", "path"}, so that our own reader decodes them and names bad rows.
        self.dataset = dataset.with_format("arrow")
        self.labels = {name: kind.names for name, kind in dataset.features.items() if _is_label(kind)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        record = self.dataset[int(index)].to_pylist()[0]
        for name, labels in self.labels.items():
            record[name] = _label(record[name], labels)
        return record

    def names(self) -> list[str]:
        """Every column's name."""
        return list(self.dataset.column_names)

    def column(self, name: str) -> list:
        """All values of a column; encoded images count as missing, and so does a column that is not there."""
        if name not in self.dataset.column_names or _is_binary(self._arrow(name).type):
            return [None] * len(self)
        values = self._arrow(name).to_pylist()
        return [_label(value, self.labels[name]) for value in values] if name in self.labels else values

    def held(self, name: str) -> np.ndarray:
        """``[num_rows]`` whether the column holds something; images are only looked at for being there."""
        import pyarrow.compute as pc

        if name not in self.dataset.column_names:
            return np.zeros(len(self), dtype=bool)
        values = self._arrow(name)
        kind = str(values.type)
        if not _is_binary(values.type):
            return np.array([is_held(value) for value in values.to_pylist()], dtype=bool)
        if kind.startswith("struct"):
            parts = [pc.struct_field(values, part) for part in ("bytes", "path")]
            held = pc.or_(parts[0].is_valid(), parts[1].is_valid())
        elif "list" in kind:
            held = pc.greater(pc.fill_null(pc.list_value_length(values), 0), 0)
        else:
            held = values.is_valid()
        return np.asarray(held.to_pylist(), dtype=bool)

    def _arrow(self, name: str) -> pa.ChunkedArray:
        return self.dataset.data.column(name)


def _is_label(kind: object) -> bool:
    from datasets import ClassLabel

    return isinstance(kind, ClassLabel)


def _label(value: int | None, names: list[str]) -> str | None:
    """A label's name; -1 stands for none."""
    return None if value is None or value < 0 else names[value]


def _is_binary(kind: pa.DataType) -> bool:
    """Whether a column would bring encoded files into memory."""
    return "binary" in str(kind)
