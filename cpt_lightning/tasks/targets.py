"""What SFT learns of a row: templates, and which of several reference answers."""

from __future__ import annotations

import re
from collections import Counter
from string import Formatter

from cpt_lightning.types import Gold


def most_frequent(gold: Gold) -> str:
    """The answer given most often, the first of equals: what SFT learns where people disagree.

    >>> most_frequent(["cat", "dog", "dog"])
    'dog'
    """
    return gold if isinstance(gold, str) else Counter(gold).most_common(1)[0][0]


def template_slots(template: str) -> list[str]:
    """Names of a template's slots, in order.

    Raises:
        ValueError: The braces do not pair, or a slot is not a plain name.

    >>> template_slots("<think>{thought}</think><answer>{answer}</answer>")
    ['thought', 'answer']
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; a literal brace is written twice") from error
    slots = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in slots:
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or spec or conversion:
            raise ValueError(f"template {template!r}: {{{name}}} is not a plain slot name; write a literal brace twice")
    return [name for name, _, _ in slots]


def check_template(template: str) -> None:
    """Refuses a target template that is malformed or has no slot, so that every row would get the same text.

    Raises:
        ValueError: As said.
    """
    if not template_slots(template):
        raise ValueError(f"target {template!r} has no slot, so every row would learn the same text; write {{answer}}")


def fill_template(template: str, values: dict[str, str]) -> str:
    """The template with its slots filled.

    Raises:
        ValueError: A slot that ``values`` lacks; the message names it and those there are.
    """
    missing = [slot for slot in template_slots(template) if slot not in values]
    if missing:
        raise ValueError(f"target {template!r} has the slot {{{missing[0]}}}, the row offers: {', '.join(values)}")
    return template.format(**values)
