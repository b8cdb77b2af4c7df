"""easy-VQA: a small real visual-question-answering set that a package brings along."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from cpt_lightning.tasks.rows import LazySequence, Row, Source, Split, check_split
from cpt_lightning.tasks.splits import check_fractions, cut_by_group

QuestionType = Literal["shape", "color", "yes_no", "has_shape", "has_color", "lacks_shape", "lacks_color"]
QUESTION_TYPES: tuple[QuestionType, ...] = get_args(QuestionType)
YES_NO = ("has_shape", "has_color", "lacks_shape", "lacks_color")

_SHAPE = re.compile(r"\b(?:circle|rectangle|triangle)\b")
_NEGATION = re.compile(r"\b(?:not|no)\b")


def question_type(question: str) -> QuestionType:
    """What an easy-VQA question asks for; of the yes/no questions, about what and whether negated.

    Raises:
        ValueError: The question is of none of the set's forms.

    >>> [question_type(q) for q in ("what is the blue shape?", "what color is the circle?", "is no red shape present?")]
    ['shape', 'color', 'lacks_color']
    """
    first, text = question.split(" ", 1)[0], question.lower()
    if first == "what":
        return "color" if "color" in text else "shape"
    if first not in ("is", "does"):
        raise ValueError(f"{question!r} is not a question of easy-VQA")
    about = "shape" if _SHAPE.search(text) else "color"
    return f"{'lacks' if _NEGATION.search(text) else 'has'}_{about}"  # type: ignore[return-value]


@dataclass
class EasyVQA(Source):
    """The easy-VQA set (MIT): 5,000 pictures of 64 x 64 pixels with one shape each, 48,248 questions, 13 answers.

    Training and test are the set's own; validation is cut from training by picture, so that none is in two splits.
    The yes/no questions lean to one side: about a colour 88 % have the same answer, about a shape 67 %.

    Args:
        questions: Types to take; by default all. ``shape`` ("what is the blue shape?"), ``color`` ("what color is the
            circle?"), ``yes_no``, or parts of the latter: ``has_shape`` ("is there a circle?"), ``has_color`` ("is a
            red shape present?") and the negated ``lacks_shape`` and ``lacks_color`` ("is there not a red shape?").
        val_fraction: Part of the training pictures to set aside for validation.
        seed: Draws them.

    Raises:
        ValueError: An unknown type, or a fraction outside [0, 1).
        ModuleNotFoundError: The package ``easy-vqa`` is not installed.
    """

    questions: list[QuestionType] = field(default_factory=list)
    val_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.questions if name not in QUESTION_TYPES]
        if unknown:
            raise ValueError(f"unknown question type {unknown[0]!r}; there are {', '.join(QUESTION_TYPES)}")
        check_fractions(self.val_fraction)
        self._folder = _package_folder()

    def split(self, split: Split) -> Sequence[Row]:
        """The rows of a split: question, answer, and the path of the picture."""
        check_split(split)
        if split == "val" and not self.val_fraction:
            raise ValueError("easy-VQA has no val split of its own; set val_fraction to set pictures of train aside")
        folder = self._folder / ("test" if split == "test" else "train")
        asked = self._records["test"] if split == "test" else self._records["train"]
        indices = range(len(asked)) if split == "test" else self._cut[split].tolist()
        wanted = self._wanted()
        chosen = [index for index in indices if question_type(asked[index][0]) in wanted]
        return LazySequence(len(chosen), partial(_row, folder, asked, chosen))

    def _wanted(self) -> set[str]:
        wanted: set[str] = set(self.questions or QUESTION_TYPES)
        return wanted.union(YES_NO) if "yes_no" in wanted else wanted

    @cached_property
    def _records(self) -> dict[str, list]:
        """The set's own ``[question, answer, picture number]`` of its two splits."""
        files = {split: self._folder / split / "questions.json" for split in ("train", "test")}
        return {split: json.loads(file.read_text(encoding="utf-8")) for split, file in files.items()}

    @cached_property
    def _cut(self) -> dict[Split, np.ndarray]:
        pictures = [picture for _, _, picture in self._records["train"]]
        return cut_by_group(pictures, self.val_fraction, seed=self.seed)


def _row(folder: Path, records: list, chosen: list[int], index: int) -> Row:
    number = chosen[index]
    question, answer, picture = records[number]
    image = str(folder / "images" / f"{picture}.png")
    return Row(f"easy_vqa/{folder.name}/{number}", question, answer, [image])


def _package_folder() -> Path:
    spec = find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the easy-VQA pictures and questions come with a package: pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"
