"""Where a run writes: one folder per run, and no run into another's."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from cpt_lightning.checkpoint_files import standing
from cpt_lightning.records.run import CONFIG, MATRIX

MARKS = (CONFIG, MATRIX)
"""What tells a run's folder from another."""
INSPECTION = "inspect"
"""Folder in a run's, for what ``cpt inspect`` leaves there; with nothing else in it the run's folder is free."""


def run_directory(wanted: str, ckpt_path: str | None, named: bool) -> Path:
    """The folder to write to.

    Args:
        wanted: Folder asked for.
        ckpt_path: Checkpoint to start from.
        named: Whether the folder was named on the command line; then a checkpoint's own folder does not replace it.

    Returns:
        The folder of the checkpoint's run, so that it goes on there; else ``wanted``, or the first of ``wanted_2``,
        ``wanted_3``, ... that is free.
    """
    if ckpt_path is not None:
        home = Path(ckpt_path).parent
        if home.resolve() == Path(wanted).resolve() or (not named and any((home / mark).exists() for mark in MARKS)):
            return home
    first = folder = Path(wanted)
    numbers = count(2)
    while folder.is_dir() and any(entry.name != INSPECTION for entry in folder.iterdir()):
        folder = first.with_name(f"{first.name}_{next(numbers)}")
    return folder


def last_checkpoint(run_dir: str) -> str | None:
    """The last checkpoint of a run, if it has one yet: ``--ckpt_path last`` starts, or goes on, whichever is due.

    It starts in the folder of that name even if it is not empty: there a run was killed before its first checkpoint.
    """
    path = Path(run_dir) / "last.ckpt"
    return str(path) if standing(path).exists() else None
