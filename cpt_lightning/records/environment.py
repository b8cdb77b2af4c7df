"""With what a run was made: ``environment.json``, an entry for each time that it was started or gone on with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import torch

import cpt_lightning
from cpt_lightning.records.files import replace_text

FILENAME = "environment.json"
VERSION = 1
"""Of the JSON form."""

LIBRARIES = (
    "torch", "lightning", "transformers", "peft", "bitsandbytes", "torchmetrics", "datasets", "tensorboard", "numpy",
    "pillow",
)  # fmt: skip
"""Whose versions are told, where they are installed."""


class Git(TypedDict):
    """The checkout that the program ran from: ``dirty`` if a file of it differed from the commit."""

    commit: str
    dirty: bool


class Device(TypedDict):
    """What a rank computes on, and how many of them each machine has."""

    kind: str
    name: str
    count: int


class Surroundings(TypedDict):
    """What program and machine decide; ``git`` is ``null`` where the program was no checkout."""

    date: str
    cpt_lightning: str
    git: Git | None
    python: str
    platform: str
    libraries: dict[str, str]
    cuda: str | None
    cpu: str
    num_cpus: int
    num_threads: int


class Start(Surroundings):
    """One start of a run: what was typed when and where, and what it ran with.

    ``resumed_from`` is the checkpoint that it went on from.
    """

    command: str
    resumed_from: str | None
    seed: int | None
    device: Device
    strategy: str
    precision: str
    num_nodes: int
    world_size: int


def surroundings() -> Surroundings:
    """What this process runs with; never environment variables, which may hold secrets."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpt_lightning": cpt_lightning.__version__,
        "git": checkout(Path(cpt_lightning.__file__)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count() or 1,
        "num_threads": torch.get_num_threads(),
    }


def checkout(file: Path) -> Git | None:
    """Commit of the checkout that a file belongs to, and whether tracked files differ from it; ``None`` without one."""
    folder = str(file.resolve().parent)
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:  # as in a virtual environment inside another's
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a file system that hangs: not worth stopping a run for
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """What the processor is called."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# -- the file --------------------------------------------------------------------------------------------------------


def record_start(folder: str | Path, start: Start) -> None:
    """Adds a start to those of the run; one that is not resumed begins the file anew.

    Args:
        folder: Of the run.
        start: The newest one.
    """
    path = Path(folder) / FILENAME
    earlier = read_starts(path) if start["resumed_from"] is not None and path.exists() else []
    record = {"version": VERSION, "starts": [*earlier, start]}
    replace_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_starts(path: str | Path) -> list[Start]:
    """The starts of a run, oldest first.

    Args:
        path: Of the file.

    Raises:
        ValueError: This is not such a file, or of another version.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        found = record["version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no {FILENAME} ({error}); move it away, and it is begun anew") from None
    if found != VERSION:
        raise ValueError(f"{path} is of version {found!r}; this program reads version {VERSION}")
    return record["starts"]
