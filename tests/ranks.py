"""Processes that are forked by one that has imported everything: each begins where a fresh one is after five seconds.

The server that forks them is started by the first test of a process that asks for it. It has run no test, so that its
children share with the tests as little as fresh processes would: their memory, warnings and seeds are not theirs.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import multiprocessing

ROOT = Path(__file__).parents[1]
IMPORTED = ["cpt_lightning.cli.lightning_cli", "tests.fake_engine", "tests.fakes"]
"""By the server; the last two are what else is run in other processes."""


def forked() -> ForkServerContext:
    """Of multiprocessing, as ``get_context("spawn")`` is; children of its children are forked by the same server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path):  # wherever the test is
        forkserver._forkserver.ensure_running()
    return context


def run_ranks(target: Callable[..., Any], *arguments: Any, ranks: int = 2, time_limit_s: float = 200) -> None:
    """Calls a function in so many processes at once, which find each other as those do that torchrun starts.

    Raises:
        RuntimeError: One of them failed, and the others were ended; or they took too long. With their last words.
    """
    place = {}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        place |= {"WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = [
            forked().Process(target=_be_rank, args=(log, {**os.environ, **place}, rank, target, arguments))
            for rank, log in enumerate(logs)
        ]
        try:
            for process in processes:
                process.start()
            end, waiting = time.monotonic() + time_limit_s, {process.sentinel: process for process in processes}
            while waiting and (ended := wait(list(waiting), end - time.monotonic())):
                if any(waiting.pop(sentinel).exitcode for sentinel in ended):
                    break  # the others would wait for it
        finally:
            for process in processes:
                process.kill()
                process.join()
        if codes := [process.exitcode for process in processes if process.exitcode]:
            said = [log.read_text()[-3000:] for log in logs if log.exists()]  # one that was ended may not have begun
            raise RuntimeError(f"exit codes {codes}\n" + "\n".join(said))


def _be_rank(log: Path, environment: dict, rank: int, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Here, where there is one thread: after a fork torch (2.13) makes its thread pool anew, and threads that load
    # weights could meet it half made ("Invalid thread pool!").
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    if "WORLD_SIZE" in environment:
        os.environ["LOCAL_RANK"] = str(rank)
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # What a rank starts is forked by the same server; Python (3.11) would start another one.
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running
    target(*arguments)
