"""What a run makes replies begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpt_lightning.rollouts.sampling import Sampling

USES = {"sampling": "rollouts", "evaluation": "evaluations"}
"""What is drawn as an option of a module says."""


def prefixes_of(options: Mapping[str, Any]) -> dict[str, str]:
    """What replies are made to begin with, by the option that says so; an option that forces nothing is no part.

    Args:
        options: Those of a module, by name: the objects, or as a run's configuration has them.

    >>> prefixes_of({"sampling": Sampling(prefix="<think>"), "evaluation": {"prefix": ""}, "group_size": 8})
    {'sampling.prefix': '<think>'}
    """
    given = {option: options.get(option) or {} for option in USES}
    texts = {
        f"{option}.prefix": each.prefix if isinstance(each, Sampling) else each.get("prefix")
        for option, each in given.items()
    }
    return {option: text for option, text in texts.items() if text}
