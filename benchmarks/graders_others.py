"""Graders of other libraries, where they are installed, and why they differ from ours.

pip install math-verify mathruler lmms-eval --no-deps pylatexenc
"""

from __future__ import annotations

import importlib.util
import random
import re
import string
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import ModuleType

from graders_rows import KINDS, answers

from cpt_lightning.rewards import grade

Grader = Callable[[str, str], bool]
"""``(what was said, reference) -> right``."""

OTHERS_PER_REFERENCE = 20
"""So many other references are said for each, besides itself."""

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def compare(name: str) -> list[dict]:
    """The verdicts on a task's references, ours and every other grader's, counted by whether and why they differ."""
    rng = random.Random(0)
    distinct = sorted({row.text for row in answers(name)})
    num_others = min(OTHERS_PER_REFERENCE, len(distinct))
    pairs = dict.fromkeys((said, gold) for gold in distinct for said in [gold, *rng.sample(distinct, num_others)])
    said_for = [(completion, gold) for said, gold in pairs for completion in _written(said, KINDS[name])]
    ours = [grade(said, gold, KINDS[name]) == 1 for said, gold in said_for]
    table = []
    for grader, other in other_graders(KINDS[name]).items():
        counts: Counter[tuple] = Counter()
        examples: dict[tuple, tuple[str, str]] = {}
        for (said, gold), right in zip(said_for, ours, strict=True):
            theirs = bool(other(said, gold))
            verdict = (right, theirs, None if right == theirs else reason(grader, said, gold))
            counts[verdict] += 1
            examples.setdefault(verdict, (said, gold))
        for (right, theirs, why), number in counts.most_common():
            row = {"task": name, "grader": grader, "ours": right, "theirs": theirs, "count": number}
            table.append(row if right == theirs else {**row, "why": why, "example": examples[right, theirs, why]})
    return table


def _written(text: str, kind: str) -> list[str]:
    further = {"math": [], "letter": [f"Option {text}", f"({text})"]}.get(kind, [text.upper()])
    return [text, f"{text}.", f"The answer is {text}.", *further]


def grader_versions() -> dict[str, str]:
    """The versions of the libraries that are installed."""
    found = {}
    for package in ("math-verify", "mathruler", "lmms-eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def other_graders(kind: str) -> dict[str, Grader]:
    """The graders, by name, that papers and evaluation suites use for answers of a kind."""
    found = {**_mathruler()}
    if kind == "math":
        found |= _math_verify()
    elif kind == "letter":
        found |= _lmms_letters()
    else:
        found |= _lmms_text()
    return found


def _mathruler() -> dict[str, Grader]:
    """Paper A's grader (arXiv 2507.05386), given what stood in the box."""
    if importlib.util.find_spec("mathruler") is None or importlib.util.find_spec("pylatexenc") is None:
        return {}
    from mathruler.grader import grade_answer

    return {"mathruler": grade_answer}


def _math_verify() -> dict[str, Grader]:
    """Math-verify as its page has it: both sides parsed with the default settings, the answer in a box."""
    if importlib.util.find_spec("math_verify") is None:
        return {}
    from math_verify import parse, verify

    def grade(said: str, gold: str) -> bool:
        reply = said if said.startswith("The answer") else rf"\boxed{{{said}}}"
        return bool(verify(parse(f"${gold}$"), parse(reply)))

    return {"math-verify": grade}


def _lmms_text() -> dict[str, Grader]:
    """Lmms-eval's metric of TextVQA and VizWiz (normalised as EvalAI does), and that of GQA (exact match)."""
    metric = _lmms_file("_task_utils/vqa_eval_metric.py")
    if metric is None:
        return {}
    process = metric.EvalAIAnswerProcessor()

    def bare(text: str) -> str:  # its options ignore_case and ignore_punctuation
        return text.lower().translate(_WITHOUT_PUNCTUATION)

    return {
        "lmms-eval, VQA": lambda said, gold: process(said) == process(gold),
        "lmms-eval, GQA": lambda said, gold: bare(said) == bare(gold),
    }


def _lmms_letters() -> dict[str, Grader]:
    """Lmms-eval's metric of ScienceQA, and its robust extraction of letters."""
    scienceqa, extraction = _lmms_file("scienceqa/utils.py"), _lmms_file("_task_utils/mcq_extract.py")
    if scienceqa is None or extraction is None:
        return {}

    def exact(said: str, gold: str) -> bool:
        row = {"choices": list(string.ascii_uppercase), "answer": string.ascii_uppercase.index(gold)}
        return scienceqa.sqa_process_results(row, [said])["exact_match"] == 1

    return {
        "lmms-eval, ScienceQA": exact,
        "lmms-eval, letters": lambda said, gold: extraction.extract_mcq_answer(said, list("ABCDEFGHIJ")) == gold,
    }


def _lmms_file(path: str) -> ModuleType | None:
    """One file of lmms-eval's tasks, without the dozens of packages that the whole of it imports."""
    try:
        file = Path(str(distribution("lmms-eval").locate_file(f"lmms_eval/tasks/{path}")))
    except PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reason(grader: str, said: str, gold: str) -> str | None:
    """Why a grader disagrees with ours, or ``None`` where none of the known reasons holds."""
    reasons = [*_REASONS.get(grader, []), *_REASONS["all"]]
    return next((text for text, holds in reasons if holds(said, gold)), None)


def meaning_shared(said: str, gold: str) -> str | None:
    """Why one reference is right for another one, or ``None``: an exception that nothing here explains."""
    return next((text for text, holds in _SAME if holds(said, gold)), None)


_DIGITS = {word: str(number) for number, word in enumerate(("zero", "one", "two", "three", "four", "five"))}


def _plain(text: str) -> str:
    words = re.findall(r"[a-z0-9.]+", text.lower().rstrip("."))
    return " ".join([_DIGITS.get(word, word) for word in words if word not in ("a", "an", "the")] or words)


def _is_said_in(said: str, gold: str) -> bool:
    words = _plain(said).split()
    return (
        f" {gold.lower()} " in f" {said.lower()} " or _plain(gold) in words or {words[0], _plain(gold)} in _POLARITIES
    )


_POLARITIES = ({"true", "yes"}, {"false", "no"})
_REASONS: dict[str, list[tuple[str, Grader]]] = {
    "mathruler": [
        ("drops the dollar sign", lambda said, gold: said.strip("$.") == gold.strip("$") and said[0] != gold[0]),
        ("takes units out of words", lambda said, gold: gold == f"{said.lower()} years"),
        ("compares the whole text, knows no lead-in", lambda said, gold: said.startswith("The answer is")),
        ("a full stop is one more character", lambda said, gold: said.endswith(".")),
        ("takes units, 'and' and 'or' out of lower-case text only", lambda said, gold: said.lower() == gold.lower()),
    ],
    "math-verify": [
        (
            "outside of a box reads LaTeX only between dollars, else takes a bare number",
            lambda said, gold: said.startswith("The answer is"),
        ),
        ("a full stop in the box: not parsed, or a number of it taken", lambda said, gold: said.endswith(".")),
        ("wants six equal decimals, ours a relative 1e-4", lambda said, gold: "\\" in said + gold),
    ],
    "lmms-eval, ScienceQA": [("knows a letter alone, or first and with a full stop", lambda said, gold: True)],
    "lmms-eval, GQA": [("drops every sign, $ included", lambda said, gold: said.strip("$.") == gold.strip("$"))],
    "all": [
        ("knows no number words or articles", lambda said, gold: _plain(said) == _plain(gold)),
        ("compares the whole text, knows no lead-in", lambda said, gold: said.startswith("The answer is")),
        ("true and yes, false and no are two things", lambda said, gold: {_plain(said), _plain(gold)} in _POLARITIES),
        ("reads no sentence or option that says the reference", _is_said_in),
    ],
}
_SAME: list[tuple[str, Grader]] = [
    ("differ in capitals, an article or a number word", lambda said, gold: _plain(said) == _plain(gold)),
    ("true is yes, false is no", lambda said, gold: {_plain(said), _plain(gold)} in _POLARITIES),
    ("the same number, written with more digits", lambda said, gold: _digits(said) == _digits(gold) != ""),
    ("7 sqrt(2) = 9.8995, within 1e-4 of 9.9", lambda said, gold: {said, gold} == {"7 \\sqrt { 2 }", "9.9"}),
    (
        "a sentence whose only number is the reference",
        lambda said, gold: set(re.findall(r"\d+", _plain(said))) == {_plain(gold)},
    ),
    (
        "a sentence that begins with the reference's yes or no",
        lambda said, gold: {_plain(said).split()[0], _plain(gold)} in (*_POLARITIES, {"yes"}, {"no"}),
    ),
]


def _digits(text: str) -> str:
    return text.removesuffix(".0") if re.fullmatch(r"\d+(\.\d+)?", text) else ""
