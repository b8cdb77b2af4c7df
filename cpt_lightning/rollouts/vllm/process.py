"""An engine in a process of its own, which can be ended when it hangs, and tells its last words when it dies."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from torch import multiprocessing

LAST_LINES = 20
"""Of the engine's log, told with an error."""
PARENT_CHECK_S = 1.0
"""How often an engine looks whether the training that it serves still exists."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Of the training; an engine would take them for its own."""


class EngineProcess:
    """Starts an engine beside this process and calls its methods.

    Args:
        make_engine: Makes the engine, in the other process; with its module it must be importable there.
        options: Its arguments.
        environment: Variables of the other process, besides those of this one.
        time_limit_s: Longest time that the start, or a call, may take.

    Raises:
        RuntimeError: The engine did not start; with the last lines of its log.
    """

    def __init__(
        self, make_engine: Callable[..., Any], options: dict[str, Any], environment: dict[str, str], time_limit_s: float
    ) -> None:
        self.time_limit_s = time_limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="cpt_engine_")
        self.log = Path(self._folder.name) / "log"
        self.log.touch()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve,
            args=(theirs, make_engine, options, environment, str(self.log)),
            daemon=True,
            name="sampling engine",
        )
        self._process.start()
        theirs.close()  # or its end would not be noticed
        # Not weakref's: a child of multiprocessing first waits for its daemons, and this one ignores SIGTERM.
        self.close = Finalize(self, _end, (self._process, self._connection, self._folder), exitpriority=10)
        self._exchange("start", None)

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        return self._process.pid

    @property
    def is_open(self) -> bool:
        """Whether it can still be called."""
        return self.close.still_active()

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the engine returns.

        Raises:
            RuntimeError: It raised an error, died, or took longer than ``time_limit_s``; the engine is gone then, and
                the message ends with the last lines of its log.
        """
        return self._exchange(method, (method, arguments))

    def _exchange(self, what: str, message: Any) -> Any:
        start = time.monotonic()
        guard = threading.Timer(self.time_limit_s, self._process.kill)  # whoever waits for its pipe wakes up then
        guard.daemon = True
        guard.start()
        try:
            if message is not None:
                self._connection.send(message)
            is_error, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(PARENT_CHECK_S)
            code, seconds = self._process.exitcode, time.monotonic() - start
            late = seconds >= self.time_limit_s
            said = f"no answer within time_limit_s={self.time_limit_s:g}" if late else f"it died, exit code {code}"
            raise self._failure(what, said) from None
        finally:
            guard.cancel()
        if is_error:
            raise self._failure(what, value)
        return value

    def _failure(self, what: str, said: str) -> RuntimeError:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        self.close()
        return RuntimeError(f"sampling engine, {what}: {said}\nThe last lines of its log:\n" + "\n".join(lines))


def _end(process: BaseProcess, connection: Connection, folder: tempfile.TemporaryDirectory) -> None:
    process.kill()
    process.join()
    connection.close()
    folder.cleanup()


# -- in the other process ----------------------------------------------------------------------------------------------


def serve(
    connection: Connection,
    make_engine: Callable[..., Any],
    options: dict[str, Any],
    environment: dict[str, str],
    log: str,
) -> None:
    """Answers calls until the other end is closed, or the process that began this one is gone."""
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they ask the training to stop, which finishes its batch first
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        engine = _answer(connection, make_engine, **options)
        while engine is not None:
            method, arguments = connection.recv()
            _answer(connection, getattr(engine, method), *arguments)


def _answer(connection: Connection, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Sends back what the function returns, or its error; an engine itself stays here."""
    try:
        value = function(*arguments, **options)
    except Exception as error:  # whatever it is, the other side has to hear of it
        traceback.print_exc()
        connection.send((True, f"{type(error).__name__}: {error}"))
        return None
    connection.send((False, None if isinstance(function, type) else value))
    return value


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)
