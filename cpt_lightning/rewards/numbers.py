"""Numbers as people and models write them -> their value, by a small parser of its own: nothing is ever evaluated.

Reads decimals, thousands commas, percent, fractions, mixed numbers, ratios, powers, roots and pi, plain or in LaTeX.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cpt_lightning.rewards.answers import number_of_word, without_markup, without_thousands_commas

MAX_LENGTH = 120
"""Characters; no reference answer that is a number comes near it."""
MAX_DEPTH = 12
RELATIVE_TOLERANCE = 1e-4

_TOKEN = re.compile(r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+|\\frac|\\sqrt|\\pi|[-+*/^(){}\[\]]")
_NUMBER_IN_TEXT = re.compile(r"(?<![\w^.{/:])-?(?:\d+(?:\.\d+)?|\.\d+)(?:[/:]\d+)?(?:\s*%)?(?![\w{/:])")
_WORD = re.compile(r"[A-Za-z]+")
_LARGER_WORD = re.compile(
    r"\b(?:thirty|forty|fifty|sixty|seventy|eighty|ninety|dozens?|hundreds?|thousands?|[mb]illions?|half|quarters?)\b",
    re.IGNORECASE,
)
_EQUALS = re.compile(r"=|\u2248|\\approx|\bis\b")
_SPELLINGS = [
    (re.compile(r"\\left|\\right|\\[!,;: ]|~"), " "),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(\d+)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"(\1+\2/\3)"),  # a mixed number
    (re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)"), r"(\1+\2/\3)"),
    (re.compile(r"\\cdot|\\times|\u00d7|\u00b7"), "*"),
    (re.compile(r"\\div|\u00f7|:"), "/"),
    (re.compile(r"(?<!\\)sqrt|\u221a"), r"\\sqrt"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])|\u03c0"), r"\\pi"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\\degree|\\circ|\u00b0"), " "),
    (re.compile(r"\u2212|\u2013"), "-"),
    (re.compile(r"^\s*(?:\\?\$|\u20ac|\u00a3)"), ""),
]
_UNIT = re.compile(
    r"(?<=[\d)}\s])(?:square |cubic |sq )?(?:units?|degrees?|radians?|inch(?:es)?|feet|foot|ft|yards?|miles?|[mck]?m|"
    r"(?:milli|centi|kilo)?met(?:er|re)s?|[mk]?g|grams?|seconds?|minutes?|hours?|dollars?|percent)"
    r"(?:\s*(?:\^\s*\{?\s*[23]\s*\}?|\u00b2|\u00b3))?\s*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Number:
    """A number as written: 50 % has the value 50."""

    value: float
    percent: bool = False

    def equals(self, other: Number) -> bool:
        """Whether both mean the same number.

        Whole numbers must be equal, others to a relative 1e-4. Where only one side has a percent sign the other may be
        the percentage or the fraction, since questions ask for either.
        """
        if _close(self.value, other.value):
            return True
        if self.percent == other.percent:
            return False
        percent, plain = (self, other) if self.percent else (other, self)
        return _close(percent.value / 100, plain.value)


def _close(a: float, b: float) -> bool:
    if a.is_integer() and b.is_integer():
        return a == b
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)


def parse_number(text: str) -> Number | None:
    r"""The number that the whole text is, a unit allowed, or ``None``.

    >>> parse_number("1,250.5"), parse_number(r"\frac{3}{4}"), parse_number("twelve").value, parse_number("a cat")
    (Number(value=1250.5, percent=False), Number(value=0.75, percent=False), 12.0, None)
    """
    if len(text) > MAX_LENGTH:
        return None
    text = spelled_plainly(text).rstrip(". ")
    word = number_of_word(text)
    if word is not None:
        return Number(float(word))
    percent = text.endswith("%")
    value = _evaluate(text[:-1].rstrip("\\ ") if percent else text)
    return None if value is None else Number(value, percent)


def spelled_plainly(text: str) -> str:
    """A formula in one spelling: LaTeX for roots and fractions, without units, degree signs and spacing commands."""
    text = without_thousands_commas(without_markup(text)).strip()
    if text.endswith(("percent", "per cent")):
        text = text.rsplit("per", 1)[0].rstrip() + "%"
    text = _UNIT.sub("", text.replace("\\%", "%"))
    for spelling, plain in _SPELLINGS:
        text = spelling.sub(plain, text)
    return text.strip()


def find_number(text: str) -> Number | None:
    """The one number that a sentence states: what follows its last "=" or "is", else its only number.

    >>> find_number("x = 4 + 1 = 5"), find_number("There are 3 red vehicles."), find_number("3 or 4")
    (Number(value=5.0, percent=False), Number(value=3.0, percent=False), None)
    """
    after = list(_EQUALS.finditer(text))
    stated = parse_number(text[after[-1].end() :]) if after else None
    if stated is not None:
        return stated
    text = without_thousands_commas(text)
    written = set(_NUMBER_IN_TEXT.findall(text))
    if not written and not _LARGER_WORD.search(text):
        written = {word for word in _WORD.findall(text) if number_of_word(word) is not None}
    numbers = {parse_number(number) for number in written} if len(written) < 10 else set()
    return numbers.pop() if len(numbers) == 1 else None


def _evaluate(text: str) -> float | None:
    try:
        parser = _Parser(text)
        value = parser.sum(0)
        parser.end()
    except (_NotANumber, ArithmeticError, ValueError):
        return None
    return value if math.isfinite(value) else None


class _NotANumber(Exception):
    pass


class _Parser:
    """Recursive descent over sum > product > signed > power > atom; every method returns the value it has read."""

    def __init__(self, text: str) -> None:
        if _TOKEN.sub("", text).strip():
            raise _NotANumber
        self.tokens = _TOKEN.findall(text)
        self.position = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise _NotANumber
        self.position += 1
        return token

    def end(self) -> None:
        if self.peek():
            raise _NotANumber

    def sum(self, depth: int) -> float:
        if depth > MAX_DEPTH:
            raise _NotANumber
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            value = value + self.product(depth) if self.take() == "+" else value - self.product(depth)
        return value

    def product(self, depth: int) -> float:
        value = self.signed(depth)
        while True:
            if self.peek() == "/":
                self.take()
                value /= self.signed(depth)
            elif self.peek() == "*":
                self.take()
                value *= self.signed(depth)
            elif self.peek() in ("(", "\\frac", "\\sqrt", "\\pi"):  # 5\sqrt{3}
                value *= self.power(depth)
            else:
                return value

    def signed(self, depth: int) -> float:
        sign = 1.0
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign * self.power(depth)

    def power(self, depth: int) -> float:
        base = self.atom(depth)
        if self.peek() != "^":
            return base
        self.take()
        return math.pow(base, self.group("{", "}", depth) if self.peek() == "{" else self.signed_atom(depth))

    def signed_atom(self, depth: int) -> float:
        sign = -1.0 if self.peek() == "-" and self.take() else 1.0
        return sign * self.atom(depth)

    def atom(self, depth: int) -> float:
        token = self.peek()
        if token == "(":
            return self.group("(", ")", depth)
        if token == "{":
            return self.group("{", "}", depth)
        self.take()
        if token == "\\pi":
            return math.pi
        if token == "\\frac":
            return self.group("{", "}", depth) / self.group("{", "}", depth)
        if token == "\\sqrt":
            degree = self.group("[", "]", depth) if self.peek() == "[" else 2.0
            if depth >= MAX_DEPTH:
                raise _NotANumber
            return math.pow(self.atom(depth + 1), 1.0 / degree)
        return float(token) if token[0].isdigit() or token[0] == "." else self._refuse()

    def group(self, opening: str, closing: str, depth: int) -> float:
        self.take(opening)
        value = self.sum(depth + 1)
        self.take(closing)
        return value

    def _refuse(self) -> float:
        raise _NotANumber
