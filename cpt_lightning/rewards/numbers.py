"""Numbers as people and models write them -> value, percent sign and unit.

Reads decimals, thousands commas, percent, fractions, mixed numbers, ratios, powers, roots and pi, plain or in LaTeX, in
the digits 0 to 9 of ASCII and the superscripts and fractions that Unicode makes of them.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from cpt_lightning.rewards.answers import without_markup
from cpt_lightning.rewards.arithmetic import value_of
from cpt_lightning.rewards.normalization import number_of_word, without_thousands_commas

MAX_LENGTH = 120
"""Characters; no reference answer that is a number comes near it."""
TOLERANCE = 1e-4
"""Relative error that a number may have which is not whole: five digits say enough of a root."""

_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w^.{/:])-?(?:[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)(?:[/:][0-9]++)?+(?:\s*%)?+(?![\w{/:]|\s*[-+]\s*$)"
)
_WORD = re.compile(r"(?<![\w-])[A-Za-z]+(?:-[A-Za-z]+)?(?![\w-])")
_LARGER_WORD = re.compile(r"\b(?:dozens?|hundreds?|thousands?|[mb]illions?|half|quarters?)\b", re.IGNORECASE)
STATES = re.compile(r"=|\u2248|\\approx|\b(?:is|equals)\b")
"""Behind it a text states a value."""
_ALTERNATIVES = re.compile(r"[0-9]\S*(?: [a-z]+)? or (?:\w+ ?= ?)?[-0-9\\]")
_FRACTION = re.compile(r"(?:(?<![0-9])([0-9]+) ?)?([\u00bc-\u00be\u2150-\u215e])")
_SUPERSCRIPT = re.compile(r"[\u00b2\u00b3\u00b9\u2070\u2074-\u207b]+")
_SPELLINGS = [
    (re.compile(r"^\s*(?:about|around|approximately|roughly|\\approx|\u2248)\s*", re.IGNORECASE), ""),
    (re.compile(r"\\left|\\right|\\[!,;: ]|~"), " "),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"([0-9]+)\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r"(\1+\2/\3)"),  # a mixed number
    (re.compile(r"([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)"), r"(\1+\2/\3)"),
    (re.compile(r"^\s*([0-9]+) (?:to|out of) ([0-9]+)\.?\s*$"), r"\1/\2"),
    (re.compile(r"\\cdot|\\times|\u00d7|\u00b7"), "*"),
    (re.compile(r"\\div|\u00f7|:"), "/"),
    (re.compile(r"(?<!\\)sqrt|\u221a"), r"\\sqrt"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])|\u03c0"), r"\\pi"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\\degree|\\circ|\u00b0"), " "),
    (re.compile(r"\u2212|\u2013"), "-"),
    (re.compile(r"\u2220"), r"\\angle "),
    (re.compile(r"\u2245"), r"\\cong "),
    (re.compile(r"^\s*(?:\\?\$|\u20ac|\u00a3)"), ""),
    (re.compile(r"\s*\\?%|\s*\bper ?cent\b"), "%"),
]
_UNITS = {
    spelled: names.split()[0]
    for names in (
        *("mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre"),
        *("in inch inche", "ft foot feet", "yd yard", "mi mile", "mph", "km/h kmh", "m/s"),
        *("mg milligram", "g gram", "kg kilogram", "lb pound", "oz ounce", "ml milliliter millilitre", "l liter litre"),
        *("s sec second", "min minute", "h hr hour", "day", "year", "rad radian", "degree", "unit", "dollar", "cent"),
    )
    for spelled in names.split()
}
_UNIT = re.compile(
    r"(?<=[0-9)}\s])(?P<before>square |sq |cubic )?(?P<name>"
    + "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
    + r")s?(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?|(?P<superscript>[\u00b2\u00b3]))?$",
    re.IGNORECASE,
)
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "\u00b2": "2", "\u00b3": "3"}


@dataclass(frozen=True)
class Number:
    """A number as written: 50 % has the value 50, 3 square metres the unit ``m2``."""

    value: float
    percent: bool = False
    unit: str = ""

    def equals(self, reference: Number, tolerance: float = TOLERANCE) -> bool:
        """Whether this number means the reference.

        Whole numbers must be equal, others to the tolerance, relative to the reference; a tolerance above the usual one
        is for both. Where only one side has a percent sign the other may be the percentage or the fraction, since
        questions ask for either. Where both have a unit it must be the same one; nothing is converted.
        """
        if self.unit and reference.unit and self.unit != reference.unit:
            return False
        if _close(self.value, reference.value, tolerance):
            return True
        if self.percent == reference.percent:
            return False
        given, wanted = (number.value / 100 if number.percent else number.value for number in (self, reference))
        return _close(given, wanted, tolerance)


def _close(given: float, reference: float, tolerance: float) -> bool:
    if tolerance <= TOLERANCE and given.is_integer() and reference.is_integer():
        return given == reference
    return abs(given - reference) <= tolerance * abs(reference) + 1e-9


def parse_number(text: str) -> Number | None:
    r"""The number that the whole text is, a unit allowed, or ``None``.

    >>> parse_number("1,250.5").value, parse_number(r"\frac{3}{4}").value, parse_number("twelve").value
    (1250.5, 0.75, 12.0)
    >>> parse_number("50 %"), parse_number("12 cm^2"), parse_number("a cat")
    (Number(value=50.0, percent=True, unit=''), Number(value=12.0, percent=False, unit='cm2'), None)
    """
    if len(text) > MAX_LENGTH:
        return None
    text, unit = _split_unit(spelled_plainly(text).rstrip(". "))
    word = number_of_word(text)
    if word is not None:
        return Number(float(word), unit=unit)
    percent = text.endswith("%")
    value = value_of(text[:-1] if percent else text)
    return None if value is None else Number(value, percent, unit)


def spelled_plainly(text: str) -> str:
    """A formula in one spelling: LaTeX for roots and fractions, without degree signs and spacing commands."""
    text = in_ascii(without_thousands_commas(without_markup(text)))
    for spelling, plain in _SPELLINGS:
        text = spelling.sub(plain, text)
    return text.strip()


def in_ascii(text: str) -> str:
    """Superscripts, fractions and minus signs of one character each, written out.

    >>> in_ascii("x\u00b2 \u2212 1\u00bd")
    'x^{2} - (1+1/2)'
    """
    text = _FRACTION.sub(lambda found: f"({found[1] + '+' if found[1] else ''}{_decomposed(found[2])})", text)
    return _SUPERSCRIPT.sub(lambda found: f"^{{{_decomposed(found[0])}}}", text).replace("\u2212", "-")


def _decomposed(characters: str) -> str:
    return unicodedata.normalize("NFKC", characters).replace("\u2044", "/")


def _split_unit(text: str) -> tuple[str, str]:
    found = _UNIT.search(text)
    if found is None:
        return text, ""
    power = found["power"] or _POWERS.get((found["before"] or found["superscript"] or "").strip().lower(), "")
    return text[: found.start()].rstrip(), _UNITS[found["name"].lower()] + power


def find_number(text: str) -> Number | None:
    """The one number that a sentence states: what follows its last "=" or "is", else its only number.

    >>> [number and number.value for number in map(find_number, ("x = 4 + 1 = 5", "There are 3 red cars.", "3 or 4"))]
    [5.0, 3.0, None]
    """
    if _ALTERNATIVES.search(text):
        return None
    states = list(STATES.finditer(text))
    stated = parse_number(text[states[-1].end() :]) if states else None
    if stated is not None:
        return stated
    text = without_thousands_commas(text).replace("\u2212", "-")
    written = set(_NUMBER_IN_TEXT.findall(text))
    if not written and not _LARGER_WORD.search(text):
        written = {word for word in _WORD.findall(text) if number_of_word(word) is not None}
    numbers = {parse_number(number) for number in written} if len(written) < 10 else set()
    return numbers.pop() if len(numbers) == 1 else None
