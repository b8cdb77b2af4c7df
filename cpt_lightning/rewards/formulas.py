"""Whether an answer gives the reference formula: by its characters, by its value, at last by algebra."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cpt_lightning.rewards.answers import readings
from cpt_lightning.rewards.numbers import STATES, in_ascii, parse_number, spelled_plainly
from cpt_lightning.rewards.symbolic import symbolically_equal

_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_FUNCTION = re.compile(r"sqrt|frac|pi|infty|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|exp|det|max|min|mod|gcd|lcm", re.I)
_ASSIGNED = re.compile(r"\s*\\?[A-Za-z]\w*\s*=")
_ALTERNATIVES = re.compile(r"\bor\b")
_BRACED_CHARACTER = re.compile(r"\{(\w)\}")


def is_formula(text: str) -> bool:
    r"""Whether a text is no words: a number with its unit, or signs, letters, LaTeX commands, names of functions.

    >>> [is_formula(text) for text in (r"5 \sqrt { 3 }", "m + n - 180", "12 inches", "rhombus", "A D and B E")]
    [True, True, True, False, False]
    """
    plain = spelled_plainly(text)
    return parse_number(text) is not None or all(map(_FUNCTION.fullmatch, _WORD.findall(plain)))


def grade_formula(answer: str, gold: str) -> float:
    """1 if the answer is the formula but for its spelling, has its value, or is equal to it by algebra; else 0.

    The answer may stand behind "x =" or end a sentence. Algebra (math-verify, within limits) is asked only where not
    both are numbers.

    Args:
        answer: As extracted, without markup.
        gold: A formula, see :func:`is_formula`.
    """
    answer, gold = in_ascii(answer), in_ascii(gold)
    wanted = _ASSIGNED.sub("", gold, count=1) if _ASSIGNED.match(gold) else gold
    given = [side for reading in readings(answer) for side in _sides(reading)]
    if not {characters(side) for side in given}.isdisjoint((characters(wanted), characters(gold))):
        return 1.0
    value = parse_number(wanted)
    numbers = [number for side in given if (number := parse_number(side))]
    if value and numbers:
        return float(any(number.equals(value) for number in numbers))
    formulas = [side for side in given if _is_comparable(side, wanted)]
    return float(bool(formulas) and symbolically_equal(wanted, formulas[-1]))  # the last says most narrowly what it is


def _is_comparable(side: str, wanted: str) -> bool:
    """Whether algebra may tell; for math-verify (0.9.0) the equation a + b = 90 and the number 90 are the same."""
    return any(map(str.isalnum, side)) and is_formula(side) and ("=" in side or "=" not in wanted)


def _sides(reading: str) -> Iterator[str]:
    """A reading, and what stands behind its last "=" or "is"; not of "x = 3 or x = 5", which says both."""
    yield reading
    states = list(STATES.finditer(reading))
    if states and not _ALTERNATIVES.search(reading):
        yield reading[states[-1].end() :].strip().rstrip(".")


def characters(formula: str) -> str:
    """A formula's characters without what does not change it: spaces, a full stop, braces around one character."""
    return _BRACED_CHARACTER.sub(r"\1", "".join(spelled_plainly(formula).rstrip(". ").split()))
