"""A completion and its reference answer -> how right it is, one function per kind of answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

from cpt_lightning.rewards.answers import after_lead_in, extract_answer, readings, without_markup
from cpt_lightning.rewards.formulas import characters, grade_formula, is_formula
from cpt_lightning.rewards.letters import grade_letter, is_option_letter
from cpt_lightning.rewards.normalization import is_unanswerable, normalize_text
from cpt_lightning.rewards.numbers import TOLERANCE, Number, find_number, parse_number
from cpt_lightning.rewards.yes_no import find_polarity, is_mere_polarity, polarity_of_reference
from cpt_lightning.types import Gold

Kind = Literal[
    "exact", "text", "letter", "number", "math", "yes_no", "short_answer", "letter_or_short_answer", "vqa", "relaxed",
    "permutation", "permutation_hits",
]  # fmt: skip
KINDS: tuple[str, ...] = get_args(Kind)
MAX_ANSWER_LENGTH = 2000
"""Characters; of a longer answer (a whole reply without box or tags) only the end is read, where conclusions stand."""
RELAXED_TOLERANCE = 0.05

_INTEGER = re.compile(r"[0-9]+")
_RATIO = re.compile(r"\s*[1-9][0-9]*\s*:\s*[1-9]\s*")


def grade(completion: str, gold: Gold, kind: str) -> float:
    """How right the completion's answer is, in [0, 1]; a completion that gives no readable answer earns 0.

    The answer is what :func:`~cpt_lightning.rewards.answers.extract_answer` finds, so it counts in any style: boxed,
    tagged, bare, or after "the answer is". Of several reference answers any will do, except where said.

    - ``exact``: the same characters.
    - ``text``: equal after :func:`~cpt_lightning.rewards.normalization.normalize_text`.
    - ``letter``: the same option letter, as "B", "(b)", "B. Juneau", "Option B" or "the answer is (B)"; or the option's
      text where the reference has it, as "B. Juneau" or ``["B", "Juneau"]``.
    - ``number``: the same number (whole numbers exactly, others to 1e-4, percent and units allowed), also as the only
      number of a sentence; ``text`` where the reference is no number.
    - ``math``: the same formula but for spelling, the same value, or equal by algebra; ``text`` where the reference is
      words.
    - ``yes_no``: the same polarity (true and false are yes and no); ``text`` where the reference is neither.
    - ``short_answer``: what VQA sets mix, by the reference: ``yes_no`` for a mere yes or no, ``number``, "unanswerable"
      in any of the usual ways, else ``text``. A colon makes ``text`` as well, since "4:23" is a time, and not "8:46";
      but "2:1", with one digit behind it, is a ratio, for which "4:2", "2/1" and "2" are right.
    - ``letter_or_short_answer``: for sets of multiple choice and open questions, such as MMMU: ``letter`` where the
      first reference is a capital letter alone, "B" or "(B)", else ``short_answer``. Nothing else tells the rows apart:
      an open question whose reference is a capital letter, point "C" say, is graded as a choice, where "c", "(C)" and
      "Option C" are right as well; "B. Juneau" as one reference is a short answer.
    - ``vqa``: soft accuracy over all human answers, min(matches / 3, 1) averaged over leaving one answer out (Antol et
      al. 2015; with n < 4 answers, n - 1 stands for the 3; one answer must be matched). All the usual ways to say
      "unanswerable" match one another, which goes beyond the official metric: there only equal words do.
    - ``relaxed``: a number within 5 % (ChartQA, Masry et al. 2022); ``text`` where the reference is no number.
    - ``permutation``: 1 if every index is right (R_acc of arXiv 2506.23508).
    - ``permutation_hits``: fraction of positions whose index is right (R_hit there); 0 for a sequence of another
      length. Repeated indices count as they do there, so that "1, 1, 1, 1" earns 1/4: always the same index earns 1/n.

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


def _any_of(grade_one: Callable[[str, str], float]) -> Callable[[str, list[str]], float]:
    """The best grade over several reference answers."""
    return lambda answer, golds: max(grade_one(answer, gold) for gold in golds)


def _text(answer: str, gold: str) -> float:
    wanted = normalize_text(without_markup(gold))
    return float(any(normalize_text(reading) == wanted for reading in readings(answer) if reading))


def _number(answer: str, gold: str, tolerance: float = TOLERANCE) -> float:
    number = parse_number(gold)
    if number is None:
        return _text(answer, gold)
    given = _stated_number(answer)
    return float(given is not None and given.equals(number, tolerance))


def _relaxed(answer: str, gold: str) -> float:
    return _number(answer, gold, RELAXED_TOLERANCE)


def _stated_number(answer: str) -> Number | None:
    for reading in reversed(list(readings(answer))):
        number = parse_number(reading) or find_number(reading)
        if number is not None:
            return number
    return None


def _math(answer: str, gold: str) -> float:
    if not is_formula(gold):
        return _text(answer, gold) or float(characters(answer) == characters(gold))  # Geometry3K has "A D and B E"
    return grade_formula(answer, gold) or float(gold.isalpha() and _text(answer, gold))  # "no" is a word, and n times o


def _yes_no(answer: str, gold: str) -> float:
    wanted = polarity_of_reference(gold)
    return _text(answer, gold) if wanted is None else float(find_polarity(answer) == wanted)


def _short_answer(answer: str, gold: str) -> float:
    if is_mere_polarity(gold):  # not "Yes, the bus": "Yes, the car" is another answer
        return _yes_no(answer, gold)
    if is_unanswerable(gold):
        return float(any(is_unanswerable(reading) for reading in readings(answer)))
    return _text(answer, gold) if ":" in gold and not _RATIO.fullmatch(gold) else _number(answer, gold)


def _letter_or_short_answer(answer: str, golds: list[str]) -> float:
    return _GRADERS["letter" if is_option_letter(golds[0]) else "short_answer"](answer, golds)


def _vqa(answer: str, golds: list[str]) -> float:
    answers = [_vqa_form(without_markup(gold)) for gold in golds]
    return max(_soft_accuracy(_vqa_form(reading), answers) for reading in readings(answer))


def _vqa_form(text: str) -> str:
    return "unanswerable" if is_unanswerable(text) else normalize_text(text)


def _soft_accuracy(answer: str, golds: list[str]) -> float:
    matches = golds.count(answer)
    if len(golds) == 1 or not matches:
        return float(matches)
    enough = min(3, len(golds) - 1)
    left_out = [matches - (gold == answer) for gold in golds]
    return sum(min(1.0, others / enough) for others in left_out) / len(golds)


def _permutation(answer: str, gold: str) -> float:
    return float(_permutation_hits(answer, gold) == 1.0)


def _permutation_hits(answer: str, gold: str) -> float:
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
    "text": _any_of(_text),
    "letter": grade_letter,
    "number": _any_of(_number),
    "math": _any_of(_math),
    "yes_no": _any_of(_yes_no),
    "short_answer": _any_of(_short_answer),
    "letter_or_short_answer": _letter_or_short_answer,
    "vqa": _vqa,
    "relaxed": _any_of(_relaxed),
    "permutation": _any_of(_permutation),
    "permutation_hits": _any_of(_permutation_hits),
}
