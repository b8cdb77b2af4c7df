"""What was refused, said in a line, without a traceback or the words of the parser around it."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1])
_IN_A_WORKER = "DataLoader worker process"
_NO_ALTERNATIVE = "Expected a <class 'NoneType'>"


def refusal(error: ValueError) -> str:
    r"""The complaint of the class whose constructor raised.

    Where an option may be of several types, jsonargparse (4.53) lists what each of them said, and then the whole value.

    >>> refusal(ValueError("Does not validate ...\nErrors:\n  - size=1: 2 or more\n  - Expected a <class 'NoneType'>"))
    'size=1: 2 or more'
    """
    lines = str(error).splitlines()
    if "Errors:" not in lines:
        return str(error)
    said: list[str] = []
    for line in lines[lines.index("Errors:") + 1 :]:
        if line.startswith("Given value"):
            break
        said.append(line.strip().removeprefix("- "))
    return "\n".join(line for line in said if line and line != _NO_ALTERNATIVE) or str(error)


def is_debugged() -> bool:
    """Whether ``JSONARGPARSE_DEBUG`` asks for tracebacks."""
    return os.environ.get("JSONARGPARSE_DEBUG", "false") != "false"


def complaint(error: BaseException) -> str | None:
    """What this package, and no library below it, refused while a run was under way; ``None`` if it was another.

    Such an error is about what the user gave: a row, a file, an option. Of one in a worker of a loader torch tells the
    traceback in the message.
    """
    if not isinstance(error, ValueError):
        return None
    files = re.findall(r'File "([^"]+)", line', str(error))
    if files and _IN_A_WORKER in str(error):
        said = str(error).rpartition("\nValueError: ")[2]
        return said.strip() if files[-1].startswith(_PACKAGE) else None
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    return str(error) if file.startswith(_PACKAGE) else None
