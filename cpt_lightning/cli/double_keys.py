"""A key that is written twice in a file of options: YAML takes the last one in silence, and a task would be gone."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one of jsonargparse: ten times as fast where libyaml is there."""
_load = get_loader("yaml")


def refuse_double_keys() -> None:
    """Has every file of options checked that jsonargparse reads."""
    set_loader("yaml", _load_checked, exceptions=(yaml.YAMLError,))


def check_keys(text: str) -> None:
    r"""Looks for a key that is there twice.

    Raises:
        yaml.YAMLError: There is one, and it and both lines are named; or the text is malformed.

    >>> check_keys("tasks:\n  one: 1\n  one: 2")
    Traceback (most recent call last):
    yaml.error.YAMLError: 'one' is there twice, in lines 2 and 3: take one of them out, or give it another name
    """
    _check(yaml.compose(text, Loader=_LOADER))


def _load_checked(text: str) -> Any:
    if "\n" in text or "{" in text:
        check_keys(text)
    return _load(text)


def _check(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"{name!r} is there twice, in lines {lines[name]} and {line}: take one of them out, or give it "
                    "another name"
                )
            lines[name] = line
            _check(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check(value)
