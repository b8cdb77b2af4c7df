"""The parser of options, and how it says what is wrong with one: in which file, and what may have been meant."""

from __future__ import annotations

import os
import re
import textwrap
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from cpt_lightning.cli.errors import refusal
from cpt_lightning.cli.misspelt import did_you_mean, file_with, options_of, refused_option

LONGEST_VALUE = 60
"""Characters of what was given, for it to be said again."""
_NO_OPTIONS = "Unexpected config: "
_LINKED = "Call to compute_fn of link "
_OF_A_CALLABLE = re.compile(r"Type typing\.Callable.* expects a function or a callable class: (.*)\. Got value: .*")


class OptionParser(LightningArgumentParser):
    """A parser that says what is wrong with an option, and in which file, without listing all others."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._file: str | None = None  # that is read
        self._files: list[str] = []  # that were read

    def parse_path(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> Namespace:
        """The options of a file; what is said of them meanwhile names it (jsonargparse, 4.53, does not)."""
        self._file, outer = str(path), self._file
        self._files.append(self._file)
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            self._file = outer

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with 2, after a line or a few."""
        if self.exit_on_error:  # not a parser within, whose message comes back in one of the parser around it
            verb: OptionParser = getattr(ex, "subcommand_parser", None) or self
            option = refused_option(message)
            file = self._file or (option and file_with(option, verb._files))
            where = f"{file}: " if file else ""
            message = where + shortened(message) + did_you_mean(message, options_of(verb))
        super().error(message, ex)
        raise SystemExit(2)


def shortened(message: str) -> str:
    r"""What a parser says of an option, without the types that it tried, and a value only if it is short.

    >>> shortened('Parser key "x":\n  No\n  Errors:\n    - size: 2 or more\n  Given value type: ...\n  Given value: 1')
    'Parser key "x": size: 2 or more (given: 1)'
    >>> shortened("Unexpected config: - a list")
    'a file given with -c has no options in it, but: - a list'
    """
    if message.startswith(_NO_OPTIONS):
        given = message.removeprefix(_NO_OPTIONS).strip()
        what = f"but: {given[:LONGEST_VALUE]}" if given else "it is empty"
        return f"a file given with -c has no options in it, {what}"
    if message.startswith(_LINKED):
        return message.rpartition(" failed: ")[2]
    key, _, rest = message.partition("\n")
    if "\n  Errors:\n" not in message:
        return message
    value = rest.rpartition("  Given value: ")[2]
    shown = f" (given: {value})" if len(value) <= LONGEST_VALUE and "NestedArg(" not in value else ""
    said = _OF_A_CALLABLE.sub(r"\1", refusal(ValueError(textwrap.dedent(rest))))
    return f"{key} {said}{shown}"
