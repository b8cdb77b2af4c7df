"""What a constructor refused, said without the words of the parser around it."""

from __future__ import annotations

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
