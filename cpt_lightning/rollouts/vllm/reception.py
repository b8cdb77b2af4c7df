"""Where the ranks that share an engine are answered, each when its turn comes."""

from __future__ import annotations

import contextlib
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from cpt_lightning.rollouts.vllm.requests import Answer, Request

IN_ORDER = {"use", "generate"}
"""Calls that do not overtake their like."""


@dataclass(eq=False)
class Call:
    """What a rank waits for.

    Args:
        caller: Its end of the line.
        method: Of the engine, or of the reception.
        arguments: Of the method.
    """

    caller: Connection
    method: str
    arguments: tuple[Any, ...]


class Reception:
    """Answers the calls of all ranks that share an engine; no rank needs another one to be there.

    Whoever wants completions says by which weights (``use``). If the engine has these, all who want them draw together,
    and whoever comes meanwhile is let in between two tokens. If not, the caller has the engine for itself until it has
    handed them over (``has``). Nobody else's weights come before all have said ``end``.

    Args:
        listener: Where ranks connect.
    """

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.callers: list[Connection] = []
        self.waiting: list[Call] = []
        self.weights: list[int] | None = None  # the fingerprint of those that the engine has
        self.users: set[Connection] = set()
        self.awake: set[Connection] = set()  # who used the engine, and did not say since that it may sleep
        self.freed: int | None = None  # bytes, while it sleeps
        self.temperature = 1.0
        self.drawn: dict[Call, list[int]] = {}
        self.answers: dict[int, list[Answer]] = {}

    def serve(self, engine: Any) -> None:
        """Answers until all who came have gone."""
        self.engine = engine
        ways: dict[str, Callable[..., bool]] = {
            "start": self._start, "use": self._use, "has": self._has, "end": self._end, "generate": self._generate,
            "sleep": self._sleep,
        }  # fmt: skip
        self._listen(None)
        while self.callers:
            while self._let_in(ways):
                pass
            if self.drawn:
                self._draw()
                self._listen(0)
            else:
                self._listen(None)

    def give_up(self, reason: str) -> None:
        """Tells all who are connected; what they called, or call next, is an error."""
        while wait([self.listener], 0):
            self._accept()
        for caller in self.callers:
            _send(caller, (True, reason))

    # -- who calls ---------------------------------------------------------------------------------------------------

    def _listen(self, timeout_s: float | None) -> None:
        """Notes who has come, gone or called."""
        for line in wait([self.listener, *self.callers], timeout_s):
            if isinstance(line, Connection):
                self._hear(line)
            else:
                self._accept()

    def _accept(self) -> None:
        self.callers.append(Connection(self.listener.accept()[0].detach()))

    def _hear(self, caller: Connection) -> None:
        try:
            method, arguments = hear(caller)
        except (EOFError, OSError):
            self.callers.remove(caller)
            self._has_gone(caller)
            return
        if method == "sleep":
            self.awake.discard(caller)
        self.waiting.append(Call(caller, method, arguments))

    def _has_gone(self, caller: Connection) -> None:
        self.users.discard(caller)
        self.awake.discard(caller)
        self.waiting = [call for call in self.waiting if call.caller is not caller]

    # -- whose turn it is --------------------------------------------------------------------------------------------

    def _let_in(self, ways: dict[str, Callable[..., bool]]) -> bool:
        """Begins what can be begun; whether there was any."""
        kept: list[Call] = []
        waiting, self.waiting = self.waiting, kept
        for call in waiting:
            is_behind = call.method in IN_ORDER and any(call.method == other.method for other in kept)
            if is_behind or not ways.get(call.method, self._directly)(call, *call.arguments):
                kept.append(call)
        return len(kept) < len(waiting)

    def _start(self, call: Call) -> bool:
        return _answer(call, None)

    def _use(self, call: Call, fingerprint: list[int]) -> bool:
        if self.users and fingerprint != self.weights:
            return False
        if self.freed is not None:
            self.engine.wake_up()
            self.freed = None
        if fingerprint != self.weights:
            self.weights = None  # until all of them are there it has none
        self.users.add(call.caller)
        self.awake.add(call.caller)
        return _answer(call, self.weights is not None)

    def _has(self, call: Call, fingerprint: list[int]) -> bool:
        self.weights = fingerprint
        return _answer(call, None)

    def _end(self, call: Call) -> bool:
        self.users.discard(call.caller)
        return _answer(call, None)

    def _generate(self, call: Call, requests: list[Request], temperature: float) -> bool:
        if self.drawn and temperature != self.temperature:
            return False
        self.temperature = temperature
        self.drawn[call] = self.engine.begin(requests, temperature)
        return True

    def _sleep(self, call: Call, level: int) -> bool:
        if self.awake:
            return False
        if self.freed is None:
            self.freed = self.engine.sleep(level)
            if level == 2:
                self.weights = None
        return _answer(call, self.freed)

    def _directly(self, call: Call, *arguments: Any) -> bool:
        return _answer(call, getattr(self.engine, call.method)(*arguments))

    # -- completions -------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """A token of each completion; answers the calls whose completions have all ended."""
        self.answers |= self.engine.step()
        for call, numbers in list(self.drawn.items()):
            if self.answers.keys() >= set(numbers):
                del self.drawn[call]
                _answer(call, [self.answers.pop(number) for number in numbers])


def _answer(call: Call, value: Any) -> bool:
    _send(call.caller, (False, value))
    return True


def _send(caller: Connection, message: tuple[bool, Any]) -> None:
    with contextlib.suppress(OSError):  # it is gone
        tell(caller, message)


def tell(line: Connection, message: Any) -> None:
    """Sends a message, tensors by value: handles of shared memory open to a process's own children alone."""
    line.send_bytes(pickle.dumps(message))


def hear(line: Connection) -> Any:
    """The next message."""
    return line.recv()
