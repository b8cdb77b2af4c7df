"""Where checkpoints stand, files or folders, and how one replaces another so that a kill leaves either of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PART = ".part"
"""Ends the name of what is still being written; a later save of the same checkpoint replaces it."""
ASIDE = ".old"
"""Ends the name of the earlier checkpoint while a folder takes its place, which takes two steps."""


def standing(path: str | Path) -> Path:
    """The checkpoint of that name, or the earlier one, if a kill came when it had been put aside for a new one."""
    path = Path(path)
    aside = path.with_name(path.name + ASIDE)
    return aside if aside.exists() and not path.exists() else path


def checkpoints_in(folder: Path) -> list[Path]:
    """The names of a folder's checkpoints, whether files or folders; see :func:`standing`."""
    found = {*folder.glob("*.ckpt"), *(path.with_suffix("") for path in folder.glob(f"*.ckpt{ASIDE}"))}
    return sorted(found)


def others_beside(path: Path) -> str:
    """A clause that names the checkpoints beside this one, or in it if it is a run's folder, the newest first."""
    inside = checkpoints_in(path)
    found = inside or [other for other in checkpoints_in(path.parent) if other != path]
    where = "in" if inside else "beside"
    names = [other.name for other in sorted(found, key=lambda other: standing(other).stat().st_mtime, reverse=True)]
    return f"; {where} it there are {', '.join(names[:5])}" if names else "; there is no other checkpoint beside it"


def put_in_place(part: Path, path: Path) -> None:
    """Moves what is whole and on the disk to its place; the earlier checkpoint goes once that is done."""
    aside = path.with_name(path.name + ASIDE)
    if path.is_dir() or (part.is_dir() and path.exists()):  # no folder is replaced in one step
        remove(aside)
        os.replace(path, aside)
    os.replace(part, path)
    sync_folder(path.parent)
    remove(aside)


def sync_folder(folder: Path) -> None:
    """Makes new names in a folder last through a power cut; not every system opens folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
