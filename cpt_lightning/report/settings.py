"""In what the arms were told to differ, and where they ran."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpt_lightning.report.arms import OWN, Arm

ALWAYS_OTHERS = ("date", "command", "resumed_from", "seed")
"""What of a start differs anyway, or stands among the options."""
LONGEST = 120
"""Letters of a value that are shown."""


def differing_options(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """Options with a value per arm, where these are not all equal; empty text where an arm has no such option."""
    return _differing([arm.first.config for arm in arms], OWN)


def differing_circumstances(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """The same of what is written about where the runs ran, at their last start."""
    return _differing([arm.first.last_start for arm in arms], ALWAYS_OTHERS)


def _differing(trees: Sequence[Any], left_out: Sequence[str] = ()) -> dict[str, list[str]]:
    rows = dict(_rows("", {place: tree for place, tree in enumerate(trees) if tree is not None}))
    return {
        name: [row.get(place, "") for place in range(len(trees))] for name, row in rows.items() if name not in left_out
    }


def _rows(path: str, trees: Mapping[int, Any]) -> Iterator[tuple[str, dict[int, str]]]:
    """Where trees differ, by their places; a part that only some have is one row, not one for each of its leaves."""
    if len({json.dumps(tree, sort_keys=True, default=str) for tree in trees.values()}) < 2:
        return
    parts = {place: found for place, tree in trees.items() if (found := _parts(tree))}
    if len(parts) < len(trees):
        yield path, {place: _text(tree) for place, tree in trees.items()}
    for name in dict.fromkeys(name for found in parts.values() for name in found):
        within = {place: found[name] for place, found in parts.items() if name in found}
        inner = _joined(path, name)
        if len(within) < len(parts):
            yield inner, {place: _text(tree) for place, tree in within.items()}
        yield from _rows(inner, within)


def _parts(tree: Any) -> dict[str, Any]:
    """Those of a mapping, or of a list of mappings or lists, by what is added to its path."""
    if isinstance(tree, Mapping):
        return {str(key): value for key, value in tree.items()}
    if isinstance(tree, list) and any(isinstance(value, Mapping | list) for value in tree):
        return {f"[{number}]": value for number, value in enumerate(tree)}
    return {}


def _joined(path: str, part: str) -> str:
    return f"{path}.{part}" if path and not part.startswith("[") else f"{path}{part}"


def _text(tree: Any) -> str:
    text = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of what has no parts.

    >>> dict(leaves({"a": {"b": 1}, "c": [{"d": None}], "e": [1, 2]}))
    {'a.b': '1', 'c[0].d': 'null', 'e': '[1, 2]'}
    """
    parts = _parts(tree)
    for name, value in parts.items():
        yield from leaves(value, _joined(path, name))
    if path and not parts:
        yield path, _text(tree)
