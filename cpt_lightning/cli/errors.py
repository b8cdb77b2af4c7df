"""What was refused, said in a line, without a traceback or the words of the parser around it."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cpt_lightning.cli.console import rank

_PACKAGE = str(Path(__file__).parents[1])
_IN_A_WORKER = "DataLoader worker process"
_PLACE = re.compile(r'File "([^"]+)", line .*\n +(.*)')
_RAISED = re.compile(r"^(?:[\w.]+\.)?\w*Error: ", re.MULTILINE)
_SUBTYPES = "Subtypes: "
_CLASS = re.compile(r"<class '(?:[\w]+\.)*(\w+)'>")
_NO_ALTERNATIVE = re.compile(r"Expected a <class '[\w.]+'>")


def refusal(error: Exception) -> str:
    r"""The complaint of the class whose constructor raised.

    Where an option may be of several types, jsonargparse (4.53) lists what each of them said, and then the whole value;
    of a class within a class that is within the list.

    >>> refusal(ValueError("Does not validate ...\nErrors:\n  - size=1: 2 or more\n  - Expected a <class 'NoneType'>"))
    'size=1: 2 or more'
    >>> refusal(ValueError("No\nErrors:\n  - no such server\n  - Expected a <class 'collections.abc.Iterable'>"))
    'no such server'
    >>> refusal(ValueError("No\nErrors:\n  - No\n    Errors:\n      - Problem with given class_path 'A':\n"
    ...                    "        size=1: 2 or more\n    Given value: 1\n  - Expected a <class 'NoneType'>"))
    "Problem with given class_path 'A':\nsize=1: 2 or more"
    >>> refusal(ValueError("No\nSubtypes: [<class 'int'>, dict[str, int], <class 'NoneType'>]\nErrors:\n"
    ...                    "  - Expected a <class 'int'>\n  - Expected a <class 'NoneType'>"))
    'must be int, dict[str, int] or null'
    """
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    end = next((number for number, line in enumerate(lines) if line.startswith("Given value")), len(lines))
    if "Errors:" not in lines[:end]:
        return str(error)
    begin = max(number for number, line in enumerate(lines[:end]) if line == "Errors:")
    said = [line for line in lines[begin + 1 : end] if line and not _NO_ALTERNATIVE.fullmatch(line)]
    return "\n".join(dict.fromkeys(said)) or _kinds(lines[begin - 1]) or str(error)


def _kinds(subtypes: str) -> str | None:
    """What an option may be, by the types that jsonargparse tried."""
    if not subtypes.startswith(_SUBTYPES):
        return None
    listed = _CLASS.sub(r"\1", subtypes.removeprefix(_SUBTYPES)[1:-1]).replace("NoneType", "null")
    *others, last = re.split(r", (?![^\[]*\])", listed)
    return f"must be {', '.join(others)} or {last}" if others else f"must be {last}"


def is_debugged() -> bool:
    """Whether ``JSONARGPARSE_DEBUG`` asks for tracebacks."""
    return os.environ.get("JSONARGPARSE_DEBUG", "false") != "false"


@contextmanager
def saying_complaints(command: str) -> Iterator[None]:
    """What is refused of the user's rows, files and options, when a run is on its way, is said in a line.

    Args:
        command: What was typed, without its options.

    Raises:
        SystemExit: With 1, after the line; with 143 where SIGTERM ended it.
    """
    try:
        yield
    except (ValueError, FloatingPointError, MisconfigurationException) as error:
        said = complaint(error)
        if said is None or is_debugged():
            raise
        shown = "(JSONARGPARSE_DEBUG=true shows where this was found.)"
        print(f"{command}: error: {said}\n{shown}", file=sys.stderr)
        raise SystemExit(1) from None
    except RuntimeError as error:
        if not is_of_a_lost_rank(error) or is_debugged():
            raise
        print(
            f"{command}: rank {rank()} ends, for another rank is gone: what that one said stands above; if it said "
            "nothing it was killed, perhaps for memory",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except SIGTERMException:  # of Lightning (2.6), where no callback of ours listens; its code is that of success
        raise SystemExit(128 + signal.SIGTERM) from None


def is_of_a_lost_rank(error: RuntimeError) -> bool:
    """Whether gloo or NCCL (torch 2.13) say that another rank is gone; why it is, that rank has said or could not.

    >>> is_of_a_lost_rank(RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:79"))
    True
    """
    said = str(error)
    return ("gloo/transport" in said and "by peer" in said) or "remote process exited" in said


def complaint(error: BaseException) -> str | None:
    """What a line of this package raised while a run was under way; ``None`` if it was a library's, or not meant.

    Such an error is about what the user gave: a row, a file, an option. So is what Lightning says of its own options.
    Of one in a worker of a loader torch tells the traceback in the message.
    """
    if isinstance(error, MisconfigurationException):
        return str(error)
    if not isinstance(error, ValueError | FloatingPointError):
        return None
    last = traceback.extract_tb(error.__traceback__)[-1]
    place, said = (last.filename, last.line or ""), str(error)
    places = _PLACE.findall(said)
    if places and _IN_A_WORKER in said:
        place, said = places[-1], _RAISED.split(said)[-1].strip()
    file, line = place
    return said if file.startswith(_PACKAGE) and line.startswith("raise ") else None
