"""Runs notebooks in this Python, with this tree first on its path.

python -m tests.notebooks [NOTEBOOK ...]     # runs those named, or all, and stores what they show
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUIET = {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
"""What libraries say to each other is not for readers, and nothing is downloaded."""


class ThisPython(KernelSpecManager):
    """Knows one kernel: what is installed elsewhere under its name does not count."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, name=kernel_name, display_name="Python 3", language="python")


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(notebook: NotebookNode, folder: Path, timeout: float) -> None:
    """Runs the cells in ``folder``, and puts what they show in the place of what they showed.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
        nbclient.exceptions.CellTimeoutError: A cell took longer than ``timeout`` seconds.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **QUIET, "PYTHONPATH": path, "IPYTHONDIR": str(folder / ".ipython")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    where = {"metadata": {"path": str(folder)}}
    # Sockets are files: open ports would be refused in some places, and warned of in others. Their names must be short.
    with tempfile.TemporaryDirectory() as sockets:
        connection = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
        manager = AsyncKernelManager(kernel_spec_manager=ThisPython(), **connection)
        # A slow machine sends what is printed in several parts.
        options = {"resources": where, "record_timing": False, "coalesce_streams": True}
        client = NotebookClient(notebook, km=manager, timeout=timeout, **options)
        client.execute(env=environment, cleanup_kc=True)  # else a kernel of a given manager lives on


def store(paths: list[Path]) -> None:
    """Runs notebooks and writes them with what they show, without what differs from machine to machine."""
    for path in paths:
        notebook, start = read(path), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder), timeout=600)
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    store([Path(name) for name in sys.argv[1:]] or NOTEBOOKS)
