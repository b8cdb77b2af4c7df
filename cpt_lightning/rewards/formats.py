"""Whether a completion keeps to the style that was asked for."""

from __future__ import annotations

import re
from typing import Literal, get_args

from cpt_lightning.rewards.answers import last_boxed

FormatStyle = Literal["none", "think_answer", "think_boxed"]
FORMAT_STYLES: tuple[str, ...] = get_args(FormatStyle)

_TAG = re.compile(r"</?(?:think|answer)>")


def has_format(completion: str, style: str) -> bool:
    r"""Whether the completion keeps to the style: exactly, with nothing repeated.

    ``think_answer``: ``<think>..</think><answer>..</answer>`` with only white space around and between (arXiv
    2506.23508). ``think_boxed``: a think block, then a reply that holds a ``\boxed{}`` (arXiv 2507.05386). The answer
    must not be blank. ``none``: every completion does.

    Raises:
        ValueError: Unknown style.

    >>> has_format("<think>round</think><answer>circle</answer>", "think_answer")
    True
    """
    if style not in FORMAT_STYLES:
        raise ValueError(f"format {style!r} is unknown; there are {', '.join(FORMAT_STYLES)}")
    if style == "none":
        return True
    text = completion.strip()
    tags = _TAG.findall(text)
    if not text.startswith("<think>"):
        return False
    if style == "think_boxed":
        return tags == ["<think>", "</think>"] and bool((last_boxed(text.split("</think>")[1]) or "").strip())
    if tags != ["<think>", "</think>", "<answer>", "</answer>"] or not text.endswith("</answer>"):
        return False
    between, _, rest = text.split("</think>")[1].partition("<answer>")
    return not between.strip() and bool(rest.removesuffix("</answer>").strip())
