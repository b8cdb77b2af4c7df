"""How a checkpoint is written, so that a kill leaves the old file or the new one, and how it is read: as data only."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.serialization import get_unsafe_globals_in_checkpoint

from cpt_lightning.checkpoint_files import PART, others_beside, put_in_place, remove, standing
from cpt_lightning.models.folders import MODEL_CONFIGS
from cpt_lightning.sharded_checkpoints import PARTS, REST, fill, problem_of

NEEDED_BY_A_RUN = ("loops", "callbacks", "optimizer_states", "lr_schedulers")
"""Keys of a Lightning checkpoint without which a run cannot go on."""
RECORD = "ContinualLearning"
"""Under what name a checkpoint's ``callbacks`` hold the record of learning and forgetting."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then moves it there; reads tensors and plain values, never code.

    Lightning's own (2.6) keeps a second copy in memory, writes it to the system's temporary folder and copies it from
    there, in which a kill leaves half a file; and it unpickles what it reads. Paths such as ``s3://...`` are left to
    it. Every module and :class:`~cpt_lightning.callbacks.TaskCheckpoint` give this one to a Trainer that has no other.
    """

    @classmethod
    def take_over(cls, strategy: Strategy) -> None:
        """Takes the place of Lightning's own in a strategy; one that the Trainer was given stays."""
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = cls()

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
        remove(part)  # what a kill left there may be a folder
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
        if unsafe := get_unsafe_globals_in_checkpoint(part):
            rank_zero_warn(
                f"{path} holds {', '.join(unsafe)}, and no run can go on from it, for checkpoints are read as tensors "
                "and plain values only: have the state_dict of callbacks and data modules give nothing else"
            )
        put_in_place(part, path)

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


def read_checkpoint(path: str | Path, map_location: Any = "cpu", parts: Collection[str] = PARTS) -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain values; one that would run code is refused.

    Args:
        path: The file, or the folder of a sharded one, whose tensors are read whole into main memory.
        map_location: Where a file's tensors go, as in ``torch.load``.
        parts: Of ``state_dict`` and ``optimizer_states``, those whose tensors will be used. Others stay on the disk,
            which makes it quick to look at the rest: from a folder they come without data, on the meta device.

    Raises:
        ValueError: There is none, it is cut off, or no checkpoint of Lightning; says what else is there.
    """
    path, found = Path(path), standing(path)
    try:
        if found.is_dir():
            return _read_folder(found, parts)
        return _read_file(found, map_location, mmap=set(parts) < set(PARTS))
    except ValueError as error:
        is_model = any((path / name).is_file() for name in MODEL_CONFIGS)
        mend = "; a model for transformers or PEFT is given as model.backbone.path" if is_model else others_beside(path)
        raise ValueError(f"{error}{mend}") from error


def _read_folder(folder: Path, parts: Collection[str]) -> dict[str, Any]:
    if problem := problem_of(folder):
        raise ValueError(f"{folder}: {problem}")
    return fill(folder, _read_file(folder / REST), parts)


def _read_file(path: Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    if problem := _problem(path):
        raise ValueError(f"{path}: {problem}")
    try:
        checkpoint = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = ", ".join(get_unsafe_globals_in_checkpoint(path))
        raise ValueError(
            f"{path} holds more than tensors and plain values ({unsafe}): it is not one of our checkpoints, and "
            "reading it might run code"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]})") from error
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a run")
    return checkpoint


def check_resumable(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Refuses to go on from a file that holds weights only, or was saved when a batch was half learned.

    Raises:
        ValueError: It is one.
    """
    if missing := [key for key in NEEDED_BY_A_RUN if key not in checkpoint]:
        raise ValueError(
            f"{path} has no {missing[0]}: it was saved with checkpoint.save_weights_only, and can be evaluated (cpt "
            f"test) but not gone on from{others_beside(Path(path))}"
        )
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    if batches["ready"] > batches["processed"]:
        raise ValueError(
            f"{path} was saved in the middle of a batch, which would be left out: it can be evaluated but not gone on "
            f"from{others_beside(Path(path))}"
        )


def record_of(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the callback ``ContinualLearning`` had recorded; ``None`` if there was none."""
    return checkpoint.get("callbacks", {}).get(RECORD)


def next_step(checkpoint: dict[str, Any]) -> int:
    """The step under which the batch after a checkpoint will be logged."""
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]["current"]
    # Within a task it is saved before its own batch counts as completed.
    within = batches["completed"] < batches["processed"]
    return loop["epoch_loop.state_dict"]["_batches_that_stepped"] + within


def is_within_task(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was written in the middle of a task, some of whose batches are to come."""
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    return any(loader["step"] < loader["num_steps"] for loader in loaders)


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
