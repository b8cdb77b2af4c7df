"""Multiple choice as data sets write it -> option lines for the prompt, and the letter that is right."""

from __future__ import annotations

import ast
import json
import re
from string import ascii_uppercase

from cpt_lightning.tasks.records import is_held
from cpt_lightning.types import Gold

_NOT_SAID = re.compile(r"[(\[]?\s*[A-Za-z]\s*[)\]]?[.:]?|<image(?: \d+)?>")


def listed_texts(text: str) -> list | None:
    """The list that a text writes out in Python or JSON, ``None`` if it writes none; nothing is evaluated.

    >>> listed_texts("['$6', '<image 1>']"), listed_texts('["a", null]'), listed_texts("[see above]")
    (['$6', '<image 1>'], ['a', None], None)
    """
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (ast.literal_eval, json.loads):
        try:
            values = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(values, list) and not any(isinstance(value, list) for value in values):
            return values
    return None


def has_options(value: object) -> bool:
    """Whether a column's value brings options, as a list, as text that writes one, or as one option's text.

    >>> [has_options(value) for value in (["a", "b"], "['a']", "March", "[]", [], None)]
    [True, True, True, False, False, False]
    """
    written = listed_texts(value.strip()) if isinstance(value, str) else None
    return is_held(value if written is None else written)


def option_lines(texts: list[str]) -> str:
    r"""The options as they are asked, a line each.

    Raises:
        ValueError: There are more options than letters.

    >>> option_lines(["March", "June"])
    'A. March\nB. June'
    """
    if len(texts) > len(ascii_uppercase):
        raise ValueError(f"{len(texts)} options are more than there are letters")
    return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False))


def right_option(answer: object, texts: list[str]) -> Gold:
    """The reference answer of a multiple-choice row: the right option's letter, then its text.

    The letter comes first, since SFT learns the first of several equals; it comes alone where the text is an image, or
    itself a letter, which could not be told from a choice.

    Args:
        answer: An index from 0, a letter, or one option's text, in this order of preference.
        texts: The options' texts.

    Raises:
        ValueError: It is none of them.

    >>> [right_option(answer, ["March", "June"]) for answer in (1, "(a)", "June")]
    [['B', 'June'], ['A', 'March'], ['B', 'June']]
    >>> right_option("B", ["A", "C"])
    'B'
    """
    index = _index(answer, texts)
    if index is None:
        raise ValueError(f"the answer {answer!r} is neither index, letter nor text of one of the {len(texts)} options")
    letter, text = ascii_uppercase[index], texts[index]
    return letter if _NOT_SAID.fullmatch(text) else [letter, text]


def _index(answer: object, texts: list[str]) -> int | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(texts) else None
    if not isinstance(answer, str):
        return None
    bare = answer.strip(" ().").upper()
    if len(bare) == 1 and bare in ascii_uppercase[: len(texts)]:
        return ascii_uppercase.index(bare)
    matches = [index for index, text in enumerate(texts) if text.strip() == answer.strip()]
    return matches[0] if len(matches) == 1 else None
