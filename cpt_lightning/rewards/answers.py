"""Completion text -> the answer it gives.

Everything here runs in time linear in its input: completions are whatever a policy under training writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}\\]|[{}]")
_THINK_TAG = re.compile(r"<(/?)think>", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_LEAD_IN = re.compile(r"\banswer\s*(?:is|:|=)(?:\s*:)?\s*", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|bm|mbox)\s*\{([^{}]*)\}")
_FORMULA = re.compile(r"\$([^$]*)\$")
_MARKS = re.compile(r"\\[()\[\]]|\*\*|\$(?!\d)")


def extract_answer(completion: str) -> str:
    r"""The answer a completion gives, in whatever style it gives it, without surrounding white space.

    The first of these that is there: the last ``\boxed{}`` (braces may nest), the last ``<answer>`` (whose end, or
    after a forced prefix whose start, may be missing), the text after the last ``</think>``, the whole text. What
    follows the thought goes before what stands in it; a thought that never ends is no answer.

    >>> print(extract_answer(r"<think>so 3/4</think> It is \boxed{\frac{3}{4}}."))
    \frac{3}{4}
    >>> extract_answer("<think>a red one</think><answer> red </answer>")
    'red'
    """
    reply = _after_thought(completion)
    for text in (reply, completion):
        for find in (last_boxed, _last_tagged):
            answer = find(text)
            if answer is not None:
                return answer.strip()
    return reply.strip()


def _after_thought(completion: str) -> str:
    """The text outside the last thought: nothing of a thought that never ends, so that a cut-off one is no answer."""
    tags = list(_THINK_TAG.finditer(completion))
    closed = [tag.end() for tag in tags if tag[1]]
    start = closed[-1] if closed else 0
    opened = next((tag.start() for tag in tags if not tag[1] and tag.start() >= start), len(completion))
    return completion[start:opened]


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed ``\boxed{}``, or ``None``."""
    opened: list[int | None] = []  # where each open brace's content starts, if a \boxed opened it
    boxed: tuple[int, int] | None = None
    first = text.find("\\boxed")
    for brace in _BRACES.finditer(text, first if first >= 0 else len(text)):
        token = brace[0]
        if token.startswith("\\boxed"):
            opened.append(brace.end())
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None and (boxed is None or start > boxed[0]):
                boxed = (start, brace.start())
    return None if boxed is None else text[boxed[0] : boxed[1]]


def _last_tagged(text: str) -> str | None:
    start, answer = None, None
    tags = list(_ANSWER_TAG.finditer(text))
    for tag in tags:
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            answer, start = text[start : tag.start()], None
    if answer is None and tags:
        first, last = tags[0], tags[-1]
        return text[: first.start()] if first[1] else text[last.end() :]
    return answer


def after_lead_in(answer: str) -> str | None:
    """What follows the last "answer is" or "answer:", or ``None`` where neither is said.

    >>> after_lead_in("So the final answer is: a red cube.")
    'a red cube.'
    """
    lead_ins = list(_LEAD_IN.finditer(answer))
    return answer[lead_ins[-1].end() :].strip() if lead_ins else None


def readings(answer: str) -> Iterator[str]:
    """The ways to read an answer: as a whole, and what follows "the answer is", to its end and to that of its line.

    >>> list(readings("The answer is red."))
    ['The answer is red.', 'red.']
    """
    stated = after_lead_in(answer)
    yield answer
    if stated:
        yield stated
        if "\n" in stated:
            yield stated.split("\n", 1)[0]


def without_markup(answer: str) -> str:
    r"""The answer without the marks of bold type, formulas and ``\text{}`` around its words.

    >>> without_markup(r"**$\text{blue}$**")
    'blue'
    """
    return _MARKS.sub("", _FORMULA.sub(r"\1", _WRAPPED.sub(r"\1", answer))).strip()
