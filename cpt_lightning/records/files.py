"""Files of a run directory, written so that a kill at any moment leaves the old or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file, or its replacement, in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def append_lines(path: Path, rows: Iterable[dict]) -> None:
    """Adds rows to a JSON lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def keep_lines(path: Path, wanted: Callable[[dict], bool]) -> None:
    """Drops the other rows of a JSON lines file, and a last line that a kill cut off."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if wanted(json.loads(line))]
    if len(kept) < len(lines):
        replace_text(path, "".join(kept))
