"""How a checkpoint is written, so that a kill leaves the old file or the new one, and how it is read: as data only."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

PART = ".part"
"""Ends the name of a file that is still being written; a later save of the same checkpoint replaces it."""
NEEDED_BY_A_RUN = ("loops", "callbacks", "optimizer_states", "lr_schedulers")
"""Keys of a Lightning checkpoint without which a run cannot go on."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then moves it there; reads tensors and plain values, never code.

    Lightning's own (2.6) keeps a second copy in memory, writes it to the system's temporary folder and copies it from
    there, in which a kill leaves half a file. Paths such as ``s3://...`` are left to it.
    :class:`~cpt_lightning.callbacks.TaskCheckpoint` gives this one to every Trainer that has no other.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves; the earlier file of that name stays until the new one is whole and on the disk.

        Raises:
            OSError: The disk is full, or another reason; the earlier file is as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + PART)
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch (2.13) reports a failed write as either
            part.unlink(missing_ok=True)
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"{path} could not be saved ({error}); the checkpoint that stood there before is untouched: make room, "
                "then resume from it",
            ) from error
        os.replace(part, path)
        _sync_folder(path.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint, as :func:`read_checkpoint` does, whatever ``weights_only`` says.

        Raises:
            ValueError: It is not a whole checkpoint.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain values; a file that would run code is refused.

    Args:
        path: The file.
        map_location: Where tensors go, as in ``torch.load``.
        mmap: Leave tensors on the disk until they are used, which makes it quick to look at the rest.

    Raises:
        ValueError: There is none, it is cut off, or no checkpoint of Lightning; says what else is there.
    """
    path = Path(path)
    if problem := _problem(path):
        raise ValueError(f"{path}: {problem}{_others(path)}")
    try:
        checkpoint = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values: it is not one of our checkpoints, and reading it might "
            f"run code{_others(path)}"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}){_others(path)}") from error
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a run{_others(path)}")
    return checkpoint


def check_resumable(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Refuses to go on from a file that holds weights only.

    Raises:
        ValueError: It does.
    """
    if missing := [key for key in NEEDED_BY_A_RUN if key not in checkpoint]:
        raise ValueError(
            f"{path} has no {missing[0]}: it was saved with checkpoint.save_weights_only, and can be evaluated (cpt "
            f"test) but not gone on from{_others(Path(path))}"
        )


def next_step(checkpoint: dict[str, Any]) -> int:
    """The step under which the batch after a checkpoint will be logged."""
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]["current"]
    # Within a task it is saved before its own batch counts as completed.
    within = batches["completed"] < batches["processed"]
    return loop["epoch_loop.state_dict"]["_batches_that_stepped"] + within


def _problem(path: Path) -> str:
    if not path.is_file():
        return "there is no such checkpoint"
    if path.stat().st_size == 0:
        return "the file is empty"
    with path.open("rb") as file:
        begins_like_one = file.read(4) == b"PK\x03\x04"
    if not begins_like_one:
        return "this is not a checkpoint"
    # The table of contents of a zip file comes last.
    return "" if is_zipfile(path) else "the file is cut off, its end is missing"


def _others(path: Path) -> str:
    """The checkpoints beside this one, the newest first."""
    found = [other for other in path.parent.glob("*.ckpt") if other.is_file() and other != path]
    names = [other.name for other in sorted(found, key=lambda other: other.stat().st_mtime, reverse=True)]
    return f"; beside it there are {', '.join(names[:5])}" if names else "; there is no other checkpoint beside it"


def _sync_folder(folder: Path) -> None:
    """Makes the new name last through a power cut; not every system opens folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
