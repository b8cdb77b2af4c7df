"""What every benchmark writes beside its numbers: when, on what, with which versions, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "lightning", "peft", "trl")


def write_record(path: Path, results: dict) -> None:
    """Writes ``results`` with their circumstances as JSON, and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**circumstances(), **results}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


def circumstances() -> dict:
    """Date, command, commit, hardware and versions of this run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "hardware": {
            "cpu": _cpu_name(),
            "num_cpus": os.cpu_count(),
            "num_threads": torch.get_num_threads(),
            "load_1min": round(os.getloadavg()[0], 2),  # what else ran beside it
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "versions": {"python": platform.python_version(), **_package_versions()},
    }


def _package_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit, and whether anything but results differs from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)benchmarks/results")
    return f"{head}-dirty" if head and changed else head


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _git(*args: str) -> str | None:
    try:
        result = subprocess.run(["git", *args], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or no git
        return None
    return result.stdout.strip()
