"""What a task asks and how it grades, in text and settings -> a short name: where names differ, scores do not compare.

Equal names are no proof that they do: the pixels of images and their limits, how an evaluation samples, the code of the
graders, and text and answers of all but 32 rows are not in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType

from cpt_lightning.tasks.rows import Split
from cpt_lightning.tasks.splits import spaced
from cpt_lightning.tasks.task import Task
from cpt_lightning.types import Gold

VERSION = 1
"""Of what goes into a fingerprint; another version gives every task another one."""
NUM_ROWS = 32
"""Rows that are rendered; the others count by their number only."""


def fingerprint(task: Task, split: Split, name: str) -> str:
    """12 hexadecimal digits of what a split asks and how it is graded, as far as settings and 32 of its rows tell.

    They are a SHA-256 of the rendered chat turns and reference answers of up to 32 evenly spaced rows, of the number of
    rows, and of the reward; the same in every process, on every machine and for every Python. Images count by their
    places in the prompt only: they are not decoded, and the same pictures may lie in another folder. Functions count by
    their names. What changes training alone (the target, the order of rows) is left out.

    Args:
        task: The task.
        split: ``"train"``, ``"val"`` or ``"test"``.
        name: The task's name in the stream, for errors; it is not part of the fingerprint.

    Raises:
        ValueError: The split cannot be opened.
    """
    asked = task.asked(split, name)
    content = {
        "version": VERSION,
        "num_rows": len(asked),
        "rows": [_rendered(asked, index) for index in spaced(len(asked), NUM_ROWS)],
        "reward": describe(task.reward),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _rendered(asked: Sequence[tuple[list[dict], Gold]], index: int) -> object:
    try:
        return asked[index]
    except ValueError:  # asking the row says what is wrong with it; where such rows are skipped the others still count
        return None


def describe(value: object) -> object:
    """A setting as JSON: what it is and what it was given, and never where it lies in memory.

    >>> from cpt_lightning.rewards import RewardPart, permutation_hits
    >>> describe(RewardPart(permutation_hits, weight=0.5))["function"]
    'cpt_lightning.rewards.grading.permutation_hits'
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    settings = {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else {}
    return {"class": type(value).__qualname__, **{name: describe(setting) for name, setting in settings.items()}}
