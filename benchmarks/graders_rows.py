"""Real questions with their reference answers, and the ways in which models write such answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cpt_lightning.rewards import with_option_text
from cpt_lightning.rewards.formulas import is_formula
from cpt_lightning.types import Gold

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
KINDS = {
    "real_text/scienceqa": "letter",
    "real_text/textvqa": "text",
    "real_text/vizwiz": "short_answer",
    "real_text/gqa": "short_answer",
    "real_text/geometry3k": "math",
    "real_text/pathvqa": "short_answer",
    "real_text/super_clevr": "short_answer",
    "super_clevr/questions": "short_answer",
    "geometry3k/problems": "math",
    "mmlu_pro": "letter",
}
"""Files of the sample of real text, and the kind of answer of each; TextVQA's "01" is read off, and is not 1."""

# What stands in the thought must not count: a number, a letter, a word.
WAYS = {
    "bare": "{}",
    "boxed": r"\boxed{{{}}}",
    "tagged": "<answer>{}</answer>",
    "thought, boxed": "<think>7? (C) or red.</think>\nSo it is \\boxed{{{}}}.",
    "thought, tagged": "<think>7? (C) or red.</think><answer> {} </answer>",
    "full stop": "{}.",
    "white space": "  {}\n",
    "bold": "**{}**",
    "sentence": "The answer is {}.",
    "label": "Let me look at the picture.\nFinal answer: {}",
}
FORMULA_WAYS = {"dollars": "${}$", "variable": "x = {}", "thought, formula": "<think>7</think> It is $x = {}$."}
NUMBER_WAYS = {"unit": "{} cm", "about": "about {}"}
COUNT_WAYS = {"count": "There are {} of them."}
LETTER_WAYS = {"brackets": "({})", "bracket": "{})", "option": "Option {}", "in a sentence": "It must be option {}."}
POLARITY_WAYS = {"answered": "{}, as the picture shows.", "judged": "The answer is {}, as far as I can see."}
UNANSWERABLE = ("Not answerable", "It cannot be determined.", "Insufficient information", "I don't know", "Unknown")


@dataclass
class Answer:
    """A row's reference answer.

    Args:
        text: As the data has it.
        kind: How it is graded.
        question: What was asked.
        options: Option texts by letter.
    """

    text: str
    kind: str
    question: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def gold(self) -> Gold:
        """What the grader gets: a letter with its option's text."""
        return with_option_text(self.text, self.question) if self.kind == "letter" else self.text

    def ways(self) -> Iterator[tuple[str, str]]:
        """Every way in which a model may write it, by name."""
        for name, template in {**WAYS, **self._further_ways()}.items():
            yield name, template.format(self.text)
        if self.kind != "math" or not re.search(r"[\\a-z]", self.text):
            yield "upper case", self.text.upper()
            yield "capitalised", self.text[:1].upper() + self.text[1:]
        if self.text == "unanswerable" and self.kind == "short_answer":
            yield from (("synonym", synonym) for synonym in UNANSWERABLE)
        if self.kind == "letter":
            yield "lower case", self.text.lower()
            yield from self.option_ways(self.text)

    def option_ways(self, letter: str) -> Iterator[tuple[str, str]]:
        """Ways to pick an option by its text, with its letter and without."""
        text = self.options[letter]
        yield "letter and text", f"{letter}. {text}"
        yield "bracketed letter and text", f"The answer is ({letter}) {text}."
        if len(text) > 1:  # "D. C" has an option that reads like a letter
            yield "option's text", text
            yield "option's text, boxed", rf"\boxed{{{text}}}"
            yield "option's text, sentence", f"The answer is {text}."

    def _further_ways(self) -> dict[str, str]:
        if self.kind == "letter":
            return LETTER_WAYS
        if self.kind == "text":
            return {}
        if re.fullmatch(r"(?i)yes|no|true|false", self.text):
            return POLARITY_WAYS
        ways = NUMBER_WAYS if re.fullmatch(r"\d+(\.\d+)?|one|two|three|five", self.text, re.IGNORECASE) else {}
        if self.kind == "math":
            return {**ways, **FORMULA_WAYS} if is_formula(self.text) and "=" not in self.text else ways
        return {**ways, **COUNT_WAYS} if ways else {}


def answers(name: str) -> list[Answer]:
    """The reference answers of a file of :data:`KINDS`, one per row."""
    rows = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return [_answer(row, KINDS[name]) for row in rows]


def _answer(row: dict, kind: str) -> Answer:
    if "messages" in row:
        question, text = row["messages"][0]["content"], row["messages"][-1]["content"]
        options = dict(re.findall(r"^([A-Z])\. (.+)$", question, re.MULTILINE)) if kind == "letter" else {}
    else:
        question, text = row.get("question") or row["problem"], row["answer"]
        options = {chr(ord("A") + i): option for i, option in enumerate(row["options"])} if kind == "letter" else {}
        question += "".join(f"\n{letter}. {option}" for letter, option in options.items())
    return Answer(text, kind, question, options)
