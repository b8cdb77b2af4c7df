"""Where a run writes: one folder per run, and no run into another's."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from itertools import count
from pathlib import Path

from cpt_lightning.checkpoint_files import standing
from cpt_lightning.records.run import is_run

INSPECTION = "inspect"
"""Folder in a run's, for what ``cpt inspect`` leaves there; with nothing else in it the run's folder is free."""
LOCK = ".lock"
"""File in a run's folder that the process holds which writes there."""


class Claim:
    """The folder that a process writes a run into, as long as it does: no other one begins or goes on with one there.

    Where the file system has no locks (POSIX), as on some networks, every folder is free.
    """

    def __init__(self) -> None:
        self._held: tuple[Path, int] | None = None

    def __call__(self, folder: Path) -> bool:
        """Whether this process has it now."""
        path = folder / LOCK
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT)
            if _is_held(file):
                os.close(file)
                return False
            if _is_at(file, path):
                self._held = path, file
                return True
            os.close(file)  # another process took the file away when it released the folder

    def release(self) -> None:
        """Leaves it to others; if nothing was written there, it is gone."""
        if self._held is None:
            return
        path, file = self._held
        self._held = None
        path.unlink(missing_ok=True)
        os.close(file)
        with suppress(OSError):
            path.parent.rmdir()


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _is_held(file: int) -> bool:
    """Whether another process holds a file; if not, this one does now."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def run_directory(wanted: str, ckpt_path: str | None, named: bool, claim: Claim | None = None) -> Path:
    """The folder to write to.

    Args:
        wanted: Folder asked for.
        ckpt_path: Checkpoint to start from.
        named: Whether the folder was named on the command line; then a checkpoint's own folder does not replace it.
        claim: Claims the folder, if a run is to be written there.

    Returns:
        The folder of the checkpoint's run, so that it goes on there; else ``wanted``, or the first of ``wanted_2``,
        ``wanted_3``, ... that is free.

    Raises:
        ValueError: Another process writes the run of the checkpoint.
    """
    if ckpt_path is not None:
        home = Path(ckpt_path).parent
        if home.resolve() == Path(wanted).resolve() or (not named and is_run(home)):
            check_claimed(home, claim)
            return home
    first = folder = Path(wanted)
    numbers = count(2)
    while _is_taken(folder) or (claim is not None and not claim(folder)):
        folder = first.with_name(f"{first.name}_{next(numbers)}")
    return folder


def check_claimed(folder: Path, claim: Claim | None) -> None:
    """Refuses to go on with a run that another process is writing.

    Raises:
        ValueError: It does.
    """
    if claim is not None and not claim(folder):
        raise ValueError(f"another process is writing the run in {folder}; wait for its end, or stop it")


def _is_taken(folder: Path) -> bool:
    return folder.is_dir() and any(entry.name not in (INSPECTION, LOCK) for entry in folder.iterdir())


def last_checkpoint(run_dir: str) -> str | None:
    """The last checkpoint of a run, if it has one yet: ``--ckpt_path last`` starts, or goes on, whichever is due.

    It starts in the folder of that name even if it is not empty: there a run was killed before its first checkpoint.
    """
    path = Path(run_dir) / "last.ckpt"
    return str(path) if standing(path).exists() else None
