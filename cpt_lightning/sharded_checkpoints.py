"""A checkpoint as a folder: every rank writes its shards of weights and optimizer, the first one all the rest.

The shards are those of ``torch.distributed.checkpoint`` (DCP); the rest, in ``meta.pt``, is the checkpoint as it would
be in one file, with tensors on the meta device where the shards hold the data. Read, both are data only: DCP's own
reader (torch 2.13) unpickles its table of contents as it is, and runs what stands there.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from cpt_lightning.checkpoint_files import PART, put_in_place, remove, sync_folder

REST, CONTENTS = "meta.pt", ".metadata"
"""The files beside the shards: Lightning's name and DCP's."""
PARTS = ("state_dict", "optimizer_states")
"""Of a checkpoint: what is kept in shards."""
Place = tuple[str | int, ...]
"""Of a tensor: ``("state_dict", name)``, or ``("optimizer_states", optimizer, number of the parameter, name)``."""
HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip
"""What a table of contents may name, beside dtypes: plain records, whose making does nothing else."""


def save_shards(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Saves; every rank must ask, with its own shards. The earlier checkpoint stays until the new one is whole.

    Raises:
        OSError: The disk is full, or another reason, on any rank; the earlier checkpoint is as it was.
    """
    tensors: dict[str, Tensor] = {}

    def taken_out(place: Place, tensor: Tensor) -> Tensor:
        tensors[_key(place)] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    rest = with_tensors(checkpoint, taken_out)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process
            dcp.save(tensors, storage_writer=_Writer(path, rest))
    except CheckpointException as error:
        shutil.rmtree(path.with_name(path.name + PART), ignore_errors=True)  # by whichever rank comes first
        rank, (reason, _) = min(error.failures.items())
        raise OSError(
            getattr(reason, "errno", None) or errno.EIO,
            f"{path} could not be saved (rank {rank}: {reason}); the checkpoint that stood there before is untouched: "
            "make room, then resume from it",
        ) from error


class _Writer(dcp.FileSystemWriter):
    """Writes beside the checkpoint's place. Of its steps the first rank takes those that concern all files.

    What fails there DCP raises on all ranks.
    """

    def __init__(self, path: Path, rest: dict[str, Any]) -> None:
        self.part = path.with_name(path.name + PART)
        super().__init__(self.part)
        self.final, self.rest = path, rest

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan  # without looking at what a kill left of an earlier save

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        remove(self.part)
        self.part.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        with (self.part / REST).open("wb") as file:
            torch.save(self.rest, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.part)
        put_in_place(self.part, self.final)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # DCP's own names the folder, as a class that other versions of Python do not have


def problem_of(folder: Path) -> str:
    """What keeps a folder from being a whole checkpoint; empty if nothing does."""
    if missing := [name for name in (REST, CONTENTS) if not (folder / name).is_file()]:
        return f"this folder is not a checkpoint, it has no {missing[0]}"
    try:
        files = {
            (str(each.relative_path), int(each.offset + each.length))
            for each in _contents(folder).storage_data.values()
        }
    except Exception as error:  # whatever a strange or damaged pickle leads to
        return f"{CONTENTS} is damaged or not DCP's ({error or type(error).__name__})"
    for name, size in sorted(files):
        if Path(name).name != name:
            return f"{CONTENTS} names a file elsewhere, {name}"
        if not (folder / name).is_file():
            return f"the shard {name} is missing; copy all files of the folder"
        if (folder / name).stat().st_size < size:
            return f"the shard {name} is cut off"
    return ""


def fill(
    folder: Path,
    rest: Mapping[str, Any],
    parts: Collection[str] = PARTS,
    empty: Callable[[Place, Tensor], Tensor] = lambda _, meta: torch.empty_like(meta, device="cpu"),
) -> dict[str, Any]:
    """The checkpoint with data in its tensors; each rank reads what its tensors hold, and waits for no other.

    Args:
        folder: A folder without a problem.
        rest: The content of its ``meta.pt``.
        parts: Those of ``PARTS`` to read; tensors of the other stay on the meta device.
        empty: Makes the tensor to read into, whole or a shard, of one on the meta device.

    Raises:
        ValueError: The shards do not hold what they should.
    """
    if "state_dict" not in rest:
        raise ValueError(f"{folder} is another program's sharded checkpoint: {REST} does not say what the shards hold")
    targets: dict[str, Tensor] = {}

    def put(place: Place, meta: Tensor) -> Tensor:
        return targets.setdefault(_key(place), empty(place, meta))

    checkpoint = with_tensors(rest, put, parts)
    reader = _Reader(folder)
    known = reader.contents.state_dict_metadata
    for key, target in targets.items():
        saved = known.get(key)
        if not isinstance(saved, TensorStorageMetadata) or saved.size != target.shape:
            raise ValueError(f"{folder} is damaged: its shards hold no {key} of the shape {list(target.shape)}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(targets, storage_reader=reader, no_dist=True)
    except (CheckpointException, pickle.UnpicklingError, RuntimeError, OSError) as error:
        reason = min(error.failures.items())[1][0] if isinstance(error, CheckpointException) else error
        raise ValueError(f"{folder} is damaged ({str(reason).splitlines()[0]})") from error
    return checkpoint


def with_tensors(
    checkpoint: Mapping[str, Any], put: Callable[[Place, Tensor], Tensor], parts: Collection[str] = PARTS
) -> dict[str, Any]:
    """A copy of a checkpoint with other tensors in its parts; what is no tensor there stays."""

    def each(place: Place, values: Mapping[Any, Any]) -> dict[Any, Any]:
        tensors = {name: put((*place, name), value) for name, value in values.items() if isinstance(value, Tensor)}
        return {**values, **tensors}

    changed = dict(checkpoint)
    if "state_dict" in parts:
        changed["state_dict"] = each(("state_dict",), checkpoint["state_dict"])
    if "optimizer_states" in parts and "optimizer_states" in checkpoint:
        changed["optimizer_states"] = [
            {**state, "state": {n: each(("optimizer_states", i, n), values) for n, values in state["state"].items()}}
            for i, state in enumerate(checkpoint["optimizer_states"])
        ]
    return changed


class _Reader(dcp.FileSystemReader):
    """DCP's reader with a table of contents that has run nothing; shards it reads as data only anyway."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.contents = _contents(folder)

    def read_metadata(self) -> Metadata:  # without DCP's options, with which it would try other files
        return self.contents


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in HARMLESS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, and reading it might run code")


def _contents(folder: Path) -> Metadata:
    with (folder / CONTENTS).open("rb") as file:
        contents = _Unpickler(file).load()
    if not isinstance(contents, Metadata):
        raise pickle.UnpicklingError(f"it is a {type(contents).__name__}")
    contents.storage_meta = StorageMeta()
    return contents


def _key(place: Place) -> str:
    return ".".join(map(str, place))
