"""Sums, products, powers, roots and fractions -> their value, by recursive descent: nothing is ever evaluated."""

from __future__ import annotations

import math
import re

MAX_DEPTH = 12
"""Nested brackets; keeps hostile text from overflowing the stack."""

_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+|\\frac|\\sqrt|\\pi|[-+*/^(){}\[\]]")


def value_of(expression: str) -> float | None:
    r"""The value of an expression of numbers, or ``None`` if it is not one or has no finite real value.

    >>> value_of("2+3*4"), value_of(r"5\sqrt{3}/\frac{1}{2}"), value_of("1/0"), value_of("x+1")
    (14.0, 17.32050807568877, None, None)
    """
    try:
        parser = _Parser(expression)
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
            return self.root(depth)
        if token[0].isdigit() or token[0] == ".":
            return float(token)
        raise _NotANumber

    def root(self, depth: int) -> float:
        if depth >= MAX_DEPTH:
            raise _NotANumber
        degree = self.group("[", "]", depth) if self.peek() == "[" else 2.0
        return math.pow(self.atom(depth + 1), 1.0 / degree)

    def group(self, opening: str, closing: str, depth: int) -> float:
        self.take(opening)
        value = self.sum(depth + 1)
        self.take(closing)
        return value
