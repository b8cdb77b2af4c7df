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
    known = [tree for tree in trees if tree is not None]
    flat = [dict(leaves(tree)) for tree in trees]
    names = dict.fromkeys(name for leaves_of in flat for name in leaves_of if name not in left_out)
    if len(known) < 2:
        return {}
    rows = {name: [leaves_of.get(name, "") for leaves_of in flat] for name in names}
    told = [place for place, tree in enumerate(trees) if tree is not None]
    return {name: row for name, row in rows.items() if len({row[place] for place in told}) > 1}


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of what has no parts.

    >>> dict(leaves({"a": {"b": 1}, "c": [{"d": None}], "e": [1, 2]}))
    {'a.b': '1', 'c[0].d': 'null', 'e': '[1, 2]'}
    """
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and any(isinstance(value, Mapping | list) for value in tree):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{path}[{number}]")
    elif path:
        text = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)
        yield path, text if len(text) <= LONGEST else text[:LONGEST] + " …"
