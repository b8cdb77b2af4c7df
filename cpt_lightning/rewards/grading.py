"""A completion and its reference answer -> how right it is, one function per kind of answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal, get_args

from cpt_lightning.rewards.answers import after_lead_in, extract_answer, normalize_text, without_markup
from cpt_lightning.rewards.numbers import Number, find_number, parse_number, spelled_plainly
from cpt_lightning.types import Gold

Kind = Literal["exact", "text", "letter", "number", "math", "yes_no", "vqa", "permutation", "permutation_hits"]
KINDS: tuple[str, ...] = get_args(Kind)
MAX_ANSWER_LENGTH = 2000
"""Characters; of a longer answer (a whole reply without box or tags) only the end is read, where conclusions stand."""

_LONE_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?[.:]?")
_LETTER_FIRST = re.compile(r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])[.):])(?:\s|$)")
_NAMED_LETTER = re.compile(r"\b(?:[Oo]ption|[Cc]hoice)\s+[(\[]?([A-Z])\b")
_BRACKETED_LETTER = re.compile(r"[(\[]([A-Za-z])[)\]]")
_STANDING_LETTER = re.compile(r"(?<![\w'])(?!A\s+(?!or\b|and\b|is\b)[a-z]|I\b(?!\s*$))([A-Z])(?![\w'])")
_POLARITY = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_LEADING_POLARITY = re.compile(r"\W*(yes|no|true|false)\b\s*(?:[,.;:!-]|$)", re.IGNORECASE)
_WORDS_ONLY = re.compile(r"[^\W\d_][^\W\d_'\s-]*(?:[\s'-]+[^\W\d_]+)*")
_INTEGER = re.compile(r"\d+")


def grade(completion: str, gold: Gold, kind: str) -> float:
    """How right the completion's answer is, in [0, 1]; a completion that gives no readable answer earns 0.

    The answer is what :func:`~cpt_lightning.rewards.answers.extract_answer` finds, so it counts in any style: boxed,
    tagged, bare, or after "the answer is". Of several reference answers any will do, except where said.

    - ``exact``: the same characters.
    - ``text``: equal after :func:`~cpt_lightning.rewards.answers.normalize_text`.
    - ``letter``: the same option letter, as "B", "(b)", "B. Juneau", "Option B" or "the answer is (B)". Reference
      answers beside the letter are option texts: ``["B", "Juneau"]`` accepts both.
    - ``number``: the same number (whole numbers exactly, others to 1e-4, percent and units allowed), also as the only
      number of a sentence; ``text`` where the reference is no number.
    - ``math``: the same formula but for spelling, or the same value; ``text`` where the reference is words.
    - ``yes_no``: the same polarity (true and false are yes and no); ``text`` where the reference is neither.
    - ``vqa``: soft accuracy over all human answers, min(matches / 3, 1) averaged over leaving one answer out (Antol et
      al. 2015; with n < 4 answers, n - 1 stands for the 3; one answer must be matched).
    - ``permutation``: 1 if every index is right (R_acc of arXiv 2506.23508).
    - ``permutation_hits``: fraction of right indices (R_hit there); 0 for a sequence of another length.

    Raises:
        ValueError: Unknown kind, an empty reference, or one that has no letter or no indices where the kind needs them.

    >>> grade("<think>it is round</think><answer>A Circle.</answer>", "circle", "text")
    1.0
    """
    if kind not in KINDS:
        raise ValueError(f"answer kind {kind!r} is unknown; there are {', '.join(KINDS)}")
    golds = [gold] if isinstance(gold, str) else gold
    if not golds or not all(g.strip() for g in golds):
        raise ValueError(f"reference answer {gold!r} is empty")
    answer = extract_answer(completion)
    if kind == "exact":
        return float(answer in [g.strip() for g in golds])
    longest = max(MAX_ANSWER_LENGTH, *(2 * len(g) for g in golds))
    return _GRADERS[kind](without_markup(answer[-longest:]), golds)


def permutation_hits(completion: str, gold: Gold) -> float:
    """R_hit as a further part of a reward: ``grade(completion, gold, "permutation_hits")``."""
    return grade(completion, gold, "permutation_hits")


def _readings(answer: str) -> Iterator[str]:
    """The answer itself, its first line and its last, and what follows "the answer is"."""
    yield answer
    stated = after_lead_in(answer)
    if stated:
        yield stated
        yield stated.split("\n", 1)[0]


def _text(answer: str, golds: list[str]) -> float:
    wanted = {normalize_text(without_markup(gold)) for gold in golds}
    return float(any(normalize_text(reading) in wanted for reading in _readings(answer) if reading))


def _letter(answer: str, golds: list[str]) -> float:
    letters = {letter for gold in golds if (letter := _lone_letter(gold))}
    if not letters:
        raise ValueError(f"reference answer {golds!r} has no option letter; kind 'letter' needs one such as 'B'")
    texts = [gold for gold in golds if not _lone_letter(gold)]
    return float(find_letter(answer) in letters or bool(texts and _text(answer, texts)))


def _lone_letter(text: str) -> str | None:
    match = _LONE_LETTER.fullmatch(text.strip())
    return match[1].upper() if match else None


def find_letter(answer: str) -> str | None:
    """The one option letter that an answer gives, upper case, or ``None``.

    >>> [find_letter(text) for text in ("b", "(C) a dog", "It must be option D.", "A dog", "A or B", "not A, but B")]
    ['B', 'C', 'D', None, None, None]
    """
    for reading in reversed(list(_readings(answer))):
        letters = _letters(reading)
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def _letters(text: str) -> set[str]:
    """The option letters that a text gives, by the plainest sign of one that there is."""
    lone, first = _lone_letter(text), _LETTER_FIRST.match(text)
    if lone or first:
        return {lone or (first[1] or first[2]).upper()}  # type: ignore[index]  # one of the two matched
    for pattern in (_NAMED_LETTER, _BRACKETED_LETTER, _STANDING_LETTER):
        letters = {letter.upper() for letter in pattern.findall(text)}
        if letters:
            return letters
    return set()


def _number(answer: str, golds: list[str]) -> float:
    numbers = [number for gold in golds if (number := parse_number(gold))]
    given = _first_number(answer) if numbers else None
    if given is not None and any(given.equals(number) for number in numbers):
        return 1.0
    texts = [gold for gold in golds if parse_number(gold) is None]
    return _text(answer, texts) if texts else 0.0


def _first_number(answer: str) -> Number | None:
    for reading in reversed(list(_readings(answer))):
        number = parse_number(reading) or find_number(reading)
        if number is not None:
            return number
    return None


def _math(answer: str, golds: list[str]) -> float:
    return max(_math_equal(answer, gold) for gold in golds)


def _math_equal(answer: str, gold: str) -> float:
    if _WORDS_ONLY.fullmatch(gold.strip()):
        return _text(answer, [gold])
    wanted, value = _formula(gold), parse_number(_right_side(gold))
    for reading in _readings(answer):
        if _formula(reading) == wanted or _formula(_right_side(reading)) == wanted:
            return 1.0
        given = parse_number(_right_side(reading))
        if value and given and value.equals(given):
            return 1.0
    return 0.0


def _right_side(formula: str) -> str:
    return formula.rsplit("=", 1)[-1].rsplit(" is ", 1)[-1]


def _formula(text: str) -> str:
    """A formula's characters without what does not change it: spaces, a full stop, braces around one character."""
    plain = "".join(spelled_plainly(text).rstrip(". ").split())
    return re.sub(r"\{(\w)\}", r"\1", plain)


def _yes_no(answer: str, golds: list[str]) -> float:
    polarities = {polarity for gold in golds if (polarity := _polarity(gold)) is not None}
    given = next((p for reading in _readings(answer) if (p := _polarity(reading)) is not None), None)
    texts = [gold for gold in golds if _polarity(gold) is None]
    return float(given in polarities if polarities else False) or (_text(answer, texts) if texts else 0.0)


def _polarity(text: str) -> bool | None:
    """Yes or no, as the text's first word set off by punctuation or as the only one of the two that it holds."""
    leading = _LEADING_POLARITY.match(text)
    words = [leading[1]] if leading else _POLARITY.findall(text)
    polarities = {word.lower() in ("yes", "true") for word in words}
    return polarities.pop() if len(polarities) == 1 else None


def _vqa(answer: str, golds: list[str]) -> float:
    answers = [normalize_text(without_markup(gold)) for gold in golds]
    return max(_soft_accuracy(normalize_text(reading), answers) for reading in _readings(answer))


def _soft_accuracy(answer: str, golds: list[str]) -> float:
    matches = golds.count(answer)
    if len(golds) == 1 or not matches:
        return float(matches)
    enough = min(3, len(golds) - 1)
    left_out = [matches - (gold == answer) for gold in golds]
    return sum(min(1.0, others / enough) for others in left_out) / len(golds)


def _permutation(answer: str, golds: list[str]) -> float:
    return float(_permutation_hits(answer, golds) == 1.0)


def _permutation_hits(answer: str, golds: list[str]) -> float:
    return max(_hits(answer, gold) for gold in golds)


def _hits(answer: str, gold: str) -> float:
    wanted = [int(index) for index in _INTEGER.findall(gold)]
    if not wanted:
        raise ValueError(f"reference answer {gold!r} has no indices; kind 'permutation' needs some such as '2, 1, 3'")
    given = _INTEGER.findall(after_lead_in(answer) or answer)
    if len(given) == 1 and len(given[0]) == len(wanted):  # "2143", without separators
        given = list(given[0])
    if len(given) != len(wanted) or any(len(index) > 4 for index in given):
        return 0.0
    return sum(int(index) == right for index, right in zip(given, wanted, strict=True)) / len(wanted)


_GRADERS: dict[str, Callable[[str, list[str]], float]] = {
    "text": _text,
    "letter": _letter,
    "number": _number,
    "math": _math,
    "yes_no": _yes_no,
    "vqa": _vqa,
    "permutation": _permutation,
    "permutation_hits": _permutation_hits,
}
