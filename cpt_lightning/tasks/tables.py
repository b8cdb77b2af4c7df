"""Files of rows -> one table: JSON, JSON lines and parquet, read when first needed."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

Record = dict[str, object]
"""One row as its file has it: a value under each column's name."""


class ParquetRecords(Sequence[Record]):
    """The rows of a parquet file: memory-mapped by ``datasets``, images left encoded.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        from datasets import Dataset  # takes over a second to import, and only parquet needs it

        # Arrow values keep images as {"bytes", "path"}, so that our own reader decodes them and names bad rows.
        self.dataset = Dataset.from_parquet(str(path)).with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index].to_pylist()[0]

    def column(self, name: str) -> list:
        """All values of a column; encoded images stay unread and count as missing, as a column that is not there."""
        if name not in self.dataset.column_names or _holds_binary(self.dataset.data.schema.field(name).type):
            return [None] * len(self)
        return self.dataset.data.column(name).to_pylist()


class Table(Sequence[Record]):
    """The rows of several files, one after another.

    Args:
        paths: Files ending in ``.json`` (a list of rows), ``.jsonl`` (a row per line) or ``.parquet``.

    Raises:
        ValueError: A file is malformed; the message names it and the line or row.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.parts = [_READERS[_suffix(path)](Path(path).expanduser()) for path in paths]
        self.starts = [0, *accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index):
        part, row = self._locate(index)
        record = self.parts[part][row]
        if not isinstance(record, dict):
            raise ValueError(f"{self.row_id(index)}: the row is a {type(record).__name__}, not an object with columns")
        return record

    def row_id(self, index: int) -> str:
        """``"<file>:<row>"``, rows counted from 0 in each file."""
        part, row = self._locate(index)
        return f"{self.paths[part]}:{row}"

    def column(self, name: str) -> list | None:
        """Every row's value of a column, ``None`` where a row has none; ``None`` altogether where no row has any."""
        values: list = []
        for part in self.parts:
            values += part.column(name) if isinstance(part, ParquetRecords) else [_value(row, name) for row in part]
        return None if all(value is None for value in values) else values

    def folder(self, index: int) -> Path:
        """Folder of the file that holds a row."""
        return Path(self.paths[self._locate(index)[0]]).expanduser().parent

    def _locate(self, index: int) -> tuple[int, int]:
        part = bisect_right(self.starts, index) - 1
        return part, index - self.starts[part]


def _value(record: object, name: str) -> object:
    return record.get(name) if isinstance(record, dict) else None


def _holds_binary(arrow_type) -> bool:
    """Whether a column would bring encoded files into memory."""
    return "binary" in str(arrow_type)


def check_files(paths: Sequence[str]) -> None:
    """Refuses files that are missing or of a kind that cannot be read.

    Raises:
        ValueError: As said, naming the file.
    """
    for path in paths:
        if _suffix(path) not in _READERS:
            raise ValueError(f"file {path!r} is none of {', '.join(_READERS)}")
        if not Path(path).expanduser().is_file():
            raise ValueError(f"file {path!r} does not exist (relative paths start at {Path.cwd()})")


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _read_json(path: Path) -> list[Record]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(rows, list):
        held = f"an object with {', '.join(rows)}" if isinstance(rows, dict) else f"a {type(rows).__name__}"
        raise ValueError(f"{path}: holds {held}; a list of rows is expected (for a row per line name it .jsonl)")
    return rows


def _read_json_lines(path: Path) -> list[Record]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
    return rows


_READERS: dict[str, Callable[[Path], Sequence[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": ParquetRecords,
}
