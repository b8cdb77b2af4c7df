"""An engine in a process of its own, which can be ended when it hangs, and tells its last words when it dies."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, TextIO

from torch import multiprocessing

from cpt_lightning.rollouts.vllm.reception import Reception, hear, tell

LAST_LINES = 30
"""Of the engine's log, told with an error."""
PARENT_CHECK_S = 1.0
"""How often an engine looks whether the training that it serves still exists."""
PATIENCE_S = 30.0
"""How long an engine that is closed on the rank that began it may still answer other ranks."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Of the training; an engine would take them for its own."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""They ask the training to stop, which finishes its batch first."""


@dataclass(frozen=True)
class Address:
    """Where an engine is.

    Args:
        folder: Of its socket, its log and its temporary files.
        pid: Of its process, which leads a process group that its workers are in too.
        node: Name of its machine.
    """

    folder: str
    pid: int
    node: str


class Begun:
    """The engine's process, as the rank has it that begins it.

    Args:
        make_engine: Makes the engine, in the other process; with its module it must be importable there.
        options: Its arguments.
        environment: Variables of the other process, besides those of this one.
        is_shared: Whether other ranks call it too.
    """

    def __init__(
        self, make_engine: Callable[..., Any], options: dict[str, Any], environment: dict[str, str], is_shared: bool
    ) -> None:
        folder = tempfile.TemporaryDirectory(prefix="cpt_engine_", ignore_cleanup_errors=True)
        log, listener = Path(folder.name) / "log", socket.socket(socket.AF_UNIX)
        log.touch()
        listener.bind(str(Path(folder.name) / "socket"))
        listener.listen()  # now, so that whoever reads the address can connect
        # Not a daemon of multiprocessing, which could not have workers.
        self.process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(listener, make_engine, options, environment, folder.name), name="sampling engine"
        )
        self.process.start()
        listener.close()
        assert self.process.pid is not None
        self.address = Address(folder.name, self.process.pid, platform.node())
        # Not weakref's: a child of multiprocessing first waits for its children, and this one ignores SIGTERM.
        self.end = Finalize(self, _end, (self.process, folder, PATIENCE_S if is_shared else 0), exitpriority=10)


class EngineProcess:
    """Calls the methods of an engine that this rank or another one of its machine began.

    Args:
        address: Where it is.
        time_limit_s: Longest time that the start, or a call, may take.
        begun: Its process, if this rank began it.

    Raises:
        RuntimeError: The engine did not start; with the last lines of its log.
    """

    def __init__(self, address: Address, time_limit_s: float, begun: Begun | None = None) -> None:
        self.time_limit_s = time_limit_s
        self.pid = address.pid
        self._begun = begun
        self._connection, self._log = _dial(Path(address.folder))
        self._hang_up = Finalize(self, _hang_up, (self._connection, self._log), exitpriority=11)
        self.call("start")

    @property
    def is_open(self) -> bool:
        """Whether it can still be called."""
        return self._hang_up.still_active()

    def close(self) -> None:
        """Calls it no more; it ends with the last rank that does so, or soon after the one that began it."""
        if self.is_open:
            self._hang_up()
            if self._begun is not None:
                self._begun.end()

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the engine returns.

        Raises:
            RuntimeError: It raised an error, died, or took longer than ``time_limit_s``; the engine is gone then, and
                the message ends with the last lines of its log.
        """
        start = time.monotonic()
        guard = threading.Timer(self.time_limit_s, _kill, [self.pid])  # whoever waits for an answer wakes up then
        guard.daemon = True
        guard.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it may have said why before it ended
                tell(self._connection, (method, arguments))
            is_error, value = hear(self._connection)
        except (EOFError, OSError):
            _kill(self.pid)
            raise self._failure(method, self._end_of_line(time.monotonic() - start)) from None
        finally:
            guard.cancel()
        if is_error:
            raise self._failure(method, value)
        return value

    def _end_of_line(self, seconds: float) -> str:
        if seconds >= self.time_limit_s:
            return f"no answer within time_limit_s={self.time_limit_s:g}"
        if self._begun is None:
            return "it died"
        self._begun.process.join(PARENT_CHECK_S)
        return f"it died, exit code {self._begun.process.exitcode}"

    def _failure(self, method: str, said: str) -> RuntimeError:
        self._log.seek(0)
        lines = self._log.read().splitlines()[-LAST_LINES:]
        self.close()  # after an error it ends by itself, when all ranks have heard of it
        return RuntimeError(f"sampling engine, {method}: {said}\nThe last lines of its log:\n" + "\n".join(lines))

    def kill(self) -> None:
        """Ends it at once, for all ranks that share it."""
        _kill(self.pid)
        self.close()


def _dial(folder: Path) -> tuple[Connection, TextIO]:
    """A line to an engine, and its log, which outlives its folder."""
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(str(folder / "socket"))
        return Connection(line.detach()), (folder / "log").open(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ConnectionRefusedError) as error:
        line.close()
        raise RuntimeError("sampling engine, start: it has ended before this rank called it") from error


def _hang_up(connection: Connection, log: TextIO) -> None:
    connection.close()
    log.close()


def _end(process: BaseProcess, folder: tempfile.TemporaryDirectory, patience_s: float) -> None:
    wait([process.sentinel], patience_s)
    if process.pid is not None:
        _kill(process.pid)
    process.join()
    folder.cleanup()


def _kill(pid: int) -> None:
    """Ends a process and its group, which it leads as soon as it runs."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


# -- in the other process ----------------------------------------------------------------------------------------------


def serve(
    listener: socket.socket,
    make_engine: Callable[..., Any],
    options: dict[str, Any],
    environment: dict[str, str],
    folder: str,
) -> None:
    """Answers calls until no rank is connected any more, or the process that began this one is gone."""
    with open(Path(folder) / "log", "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    _track_memory()
    os.setpgid(0, 0)
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({**environment, "TMPDIR": folder})
    tempfile.tempdir = None  # asks the variable again
    ignore_stop_signals()
    threading.Thread(target=_follow, args=(os.getppid(), folder), daemon=True).start()
    reception = Reception(listener)
    try:
        reception.serve(make_engine(**options))
    except Exception as error:  # whatever it is, all ranks have to hear of it
        traceback.print_exc(limit=-4)  # all of vLLM's would hide in the log's last lines what was said before
        reception.give_up(f"{type(error).__name__}: {error}")
    _leave(folder)


def _track_memory() -> None:
    """Has a process look after the shared memory of the engine and its workers, which removes what a kill leaves.

    Spawned, an engine has that of the training (Python 3.11 to 3.13), which waits for the training's end. This one is
    begun outside of the engine's process group, so that it is not killed with it.
    """
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None
    resource_tracker.ensure_running()


def _leave(folder: str) -> None:
    """Ends all of the engine, and what it has written, which nobody else may be there to remove."""
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # vLLM's workers would take their time


def ignore_stop_signals() -> None:
    """For engines and their workers, which the training ends when it ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _follow(parent: int, folder: str) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    _leave(folder)
