"""Whether two formulas are equal, asked of math-verify in a process of its own, which can be stopped."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

MAX_LENGTH = 200
"""Characters of a formula; longer ones are not compared."""


class FormulaServer:
    """Compares formulas within limits of time and memory; starts when first asked, ends with this process.

    A few characters can keep sympy busy for hours (``9^{9^{9^9}}``), mostly in C code, where no Python signal handler
    gets its turn. Math-verify's own limit is such a handler, and works in the main thread only (0.9.0). So the work is
    done in another process, which the system stops; from any thread, in data-loader workers too.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._number = 0

    def equal(self, reference: str, given: str) -> bool:
        """Whether two LaTeX formulas are equal; not where that takes too long, or one of them is not understood.

        Raises:
            RuntimeError: The process cannot be started; what it wrote says why.
        """
        if max(len(reference), len(given)) > MAX_LENGTH:
            return False
        with self._lock:
            for _ in range(2):  # once more in a new process, should somebody have ended the first
                verdict = self._ask(reference.replace("$", ""), given.replace("$", ""))
                if verdict:
                    return verdict == "equal"
                self._close()
        raise RuntimeError("the process that compares formulas ended twice; is math-verify installed?")

    def _ask(self, reference: str, given: str) -> str:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        self._number += 1
        try:
            process.stdin.write(json.dumps([self._number, reference, given]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        for line in process.stdout:
            number, verdict = line.split()
            if int(number) in (0, self._number):  # others answer a request that was given up
                return verdict
        return ""

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            # -P: else this folder's numbers.py would stand in for Python's own.
            program = [sys.executable, "-P", str(Path(__file__).with_name("symbolic_server.py"))]
            pipe = subprocess.PIPE
            # A group of its own, to end it with its child, and because Ctrl-C is for the training alone.
            self._process = subprocess.Popen(program, stdin=pipe, stdout=pipe, encoding="ascii", process_group=0)
            atexit.register(self._close)
        return self._process

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self._close)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an unsent request
                    pipe.close()
        process.wait()

    def after_fork(self) -> None:
        """In a forked process: leaves the server to the parent, and starts an own one when asked."""
        if self._process is not None:
            self._process.returncode = 0  # not a child of this process: nothing to wait for
            self._inherited = self._process  # kept: closing its pipes could send what the parent was about to write
        self._forget()


_server = FormulaServer()
os.register_at_fork(after_in_child=_server.after_fork)


def symbolically_equal(reference: str, given: str) -> bool:
    r"""Whether two LaTeX formulas are equal, see :meth:`FormulaServer.equal`."""
    return _server.equal(reference, given)
