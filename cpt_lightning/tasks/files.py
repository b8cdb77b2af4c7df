"""Files and folders of rows: JSON, JSON lines, CSV, parquet, arrow, saved data sets, image folders."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cpt_lightning.tasks.records import ArrowRecords, ListedRecords, Record, Records, kind_of
from cpt_lightning.tasks.tables import Part, Table

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
"""How files are named that hold a split, or a part of one: ``train-00000-of-00002.parquet``."""
_NOT_ROWS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


def open_files(paths: Sequence[str]) -> Table:
    """The rows of several files or folders, one after another.

    Args:
        paths: Files ending in ``.json`` (a list of rows, or an object with one such list), ``.jsonl`` (a row per line),
            ``.csv`` or ``.tsv`` (names in the first line; every value is text), ``.parquet`` or ``.arrow``; or folders:
            saved by ``save_to_disk``, of images with ``metadata.csv`` or ``metadata.jsonl``, or of such files, taken in
            alphabetical order.

    Raises:
        ValueError: A file is malformed; the message names it and the line or row.
    """
    return Table([part for path in paths for part in _parts(path)])


def check_files(paths: Sequence[str]) -> None:
    """Refuses files that are missing or of a kind that cannot be read, and folders that hold none.

    Raises:
        ValueError: As said, naming the file.
    """
    for name in paths:
        path = Path(name).expanduser()
        if not path.exists():
            raise ValueError(f"file {name!r} does not exist (relative paths start at {Path.cwd()})")
        if not path.is_dir() and path.suffix.lower() not in _READERS:
            raise ValueError(f"file {name!r} is none of {', '.join(_READERS)}")
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            raise ValueError(f"folder {name!r} holds the splits {', '.join(splits)}; name one, as '{name}/{splits[0]}'")
        if path.is_dir() and not (is_saved(path) or _has_metadata(path)):
            _check_folder(path, name)


def _check_folder(path: Path, name: str) -> None:
    """A folder of files that are read one after another."""
    files = _files_of(path)
    if not files:
        raise ValueError(f"folder {name!r} holds no saved data set, no metadata.csv and no {', '.join(_READERS)}")
    splits = {found[1].lower(): file.name for file in reversed(files) if (found := _SPLIT.match(file.name))}
    if len(splits) > 1:
        raise ValueError(
            f"folder {name!r} holds files of several splits, such as {', '.join(sorted(splits.values()))}; name the "
            "files of one, or read the folder with HubRows"
        )


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk`` and holds one split."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _parts(name: str) -> list[Part]:
    path = Path(name).expanduser()
    if not path.is_dir():
        return [Part(_READERS[path.suffix.lower()](path), f"{name}:", path.parent, first=1)]
    if is_saved(path):
        return [Part(_read_saved(path), f"{name}:", path, first=1)]
    if _has_metadata(path):
        return [Part(_read_images(path), f"{name}:", path, first=1)]
    return [part for file in _files_of(path) for part in _parts(f"{name.rstrip('/')}/{file.name}")]


def _files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _READERS and file.name not in _NOT_ROWS)


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _METADATA)


def _read_json(path: Path) -> Records:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path)) from error
    except ValueError as error:
        hint = "; for a row per line name it .jsonl" if str(error).startswith("Extra data") else ""
        raise ValueError(f"{path}: not a JSON file: {error}{hint}") from error
    if isinstance(rows, dict):  # {"info": ..., "questions": [...]}, as CLEVR and the VQA sets have it
        lists = [value for value in rows.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(
                f"{path}: holds an object with {', '.join(rows)}; a list of rows is expected, or an object with one "
                "list (for a row per line name it .jsonl)"
            )
        rows = lists[0]
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds {kind_of(rows)}; a list of rows is expected")
    return ListedRecords(rows)


def _read_json_lines(path: Path) -> Records:
    rows: list[Record] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path)) from error
    return ListedRecords(rows)


def _read_csv(path: Path, delimiter: str = ",") -> Records:
    limit = csv.field_size_limit(sys.maxsize)  # a picture in base64 is longer than the usual one
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            rows = [_checked_line(row, path, reader) for row in reader]
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path)) from error
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.reader.line_num} cannot be read: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return ListedRecords(rows)


def _checked_line(row: dict, path: Path, reader: csv.DictReader) -> Record:
    if None in row or None in row.values():  # how the reader says that there are more values than names, or fewer
        names = ", ".join(reader.fieldnames or [])
        raise ValueError(f"{path}: line {reader.line_num} has not one value for each of {names}; quote or fill it in")
    return row


def _not_utf8(path: Path) -> str | None:
    """Where a file stops being UTF-8: Python's error about a file that is read in pieces counts from the piece."""
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return (
            f"{path}: line {line} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}); save it as UTF-8"
        )
    return None


# `datasets` takes over a second to import, and files of text do not need it.


def _read_parquet(path: Path) -> Records:
    from datasets import Dataset

    return _read_arrow_rows(path, Dataset.from_parquet)


def _read_arrow(path: Path) -> Records:
    from datasets import Dataset

    return _read_arrow_rows(path, Dataset.from_file)


def _read_saved(folder: Path) -> Records:
    from datasets import load_from_disk

    return _read_arrow_rows(folder, load_from_disk)


def _read_images(folder: Path) -> Records:
    from datasets import load_dataset

    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file() and (problem := _not_utf8(folder / name)):
            raise ValueError(problem)
    # Named outright, all files are one split: a sub-folder called "train" would otherwise become one of its own.
    return _read_arrow_rows(
        folder, lambda name: load_dataset("imagefolder", data_files={"train": [f"{name}/**"]}, split="train")
    )


def _read_arrow_rows(path: Path, read: Callable[[str], Any]) -> Records:
    """What a function of ``datasets`` reads from a path; its complaints do not name the file."""
    from datasets.exceptions import DatasetsError

    try:
        return ArrowRecords(read(str(path)))
    except (OSError, ValueError, LookupError, RuntimeError, DatasetsError) as error:
        cause = error.__cause__ or error  # "An error occurred while generating the dataset" says nothing
        raise ValueError(f"{path}: cannot be read: {type(cause).__name__}: {' '.join(str(cause).split())}") from error


_READERS: dict[str, Callable[[Path], Records]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
