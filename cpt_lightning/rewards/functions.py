"""Reward functions that others write: what they may take, and what they may give."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from cpt_lightning.types import Gold

RewardFunction = Callable[[str, Gold], float]
"""A completion's text and the reference answer -> a number; importable, so that it can be named in YAML."""

_BATCHED = ("prompts", "completions")
"""What TRL calls the first parameter of a reward function, which gets a whole batch."""


def check_function(function: object, what: str) -> None:
    """Refuses what cannot be called as a :data:`RewardFunction`, as those of other trainers.

    Args:
        function: What was given.
        what: Names it.

    Raises:
        TypeError: It cannot be called at all.
        ValueError: It takes something else; the message shows what.
    """
    if not callable(function):
        raise TypeError(f"{what} is {function!r}; give a function (completion, gold) -> float")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some functions that are written in C
        return
    try:
        signature.bind("a completion", "a reference answer")
        fits = next(iter(signature.parameters)) not in _BATCHED
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{what}, {function_name(function)}, takes {signature}; it is called once for each completion, as "
            "(completion, gold) -> float: write a function of one text and its reference answer"
        )


def function_name(function: object) -> str:
    """What a function is called; an object that can be called goes by its class."""
    return getattr(function, "__name__", type(function).__name__)


def called(function: RewardFunction, completion: str, gold: Gold, what: str) -> float:
    """What the function gives.

    Raises:
        ValueError: No finite number.
    """
    value = function(completion, gold)
    try:
        number = float(value)
    except (TypeError, ValueError):  # a list, say
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} is {value!r}; give a finite number")
    return number
