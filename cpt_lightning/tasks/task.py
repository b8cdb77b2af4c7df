"""What a task is: rows from a source, a way to ask them, and a reward that grades the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from typing import Literal, get_args

import numpy as np
from PIL import Image

from cpt_lightning.rewards import Reward
from cpt_lightning.rewards.formats import FormatStyle
from cpt_lightning.tasks.checks import check_kinds
from cpt_lightning.tasks.images import ImageError, load_image
from cpt_lightning.tasks.prompts import Prompt, Style, check_text
from cpt_lightning.tasks.records import kind_of
from cpt_lightning.tasks.rows import SPLITS, LazySequence, Row, Source, Split, check_split
from cpt_lightning.tasks.targets import check_template, fill_template, most_frequent
from cpt_lightning.types import Example, Gold

BadImages = Literal["fail", "skip"]
BLANK_SIDE = 56
"""Pixels a side of the pictures of a row that only fills up a batch."""


class SkippedRow(ImageError):
    """A row of a task with ``bad_images: skip`` one of whose images is refused.

    Args:
        message: What is wrong, naming task, row and file.
        filler: The row with blank pictures, which may fill up a batch in its place but must not count.
    """

    def __init__(self, message: str, filler: Example) -> None:
        super().__init__(message)
        self.filler = filler


@dataclass
class Task:
    r"""What is learned, how it is asked and how it is graded; the same object serves SFT, RFT and evaluation.

    Args:
        source: Where the rows come from.
        prompt: How a row is asked.
        reward: How a completion is graded; its accuracy is also the metric.
        target: Template of the completion that SFT learns, such as ``"{answer}"`` or
            ``"<think>{thought}</think><answer>{answer}</answer>"``; its slots are ``answer`` and the source's fields
            (of several reference answers the most frequent one). A literal brace is written twice:
            ``"\boxed{{{answer}}}"``. ``None`` takes the row's own target, else its answer.
        num_train: Train on so many rows, drawn once by ``seed``; a larger number includes every smaller one's rows.
        num_val: Likewise for the validation split.
        num_test: Likewise for the test split.
        seed: Draws the subsets.
        bad_images: What happens to a row with an image that is missing, broken or of a size the model cannot take:
            ``fail`` stops the run and names it; ``skip`` leaves it out of training, counted, and of the accuracy.
        licence: Terms under which the data may be used, as its publisher states them; ``cpt inspect`` shows it.

    Raises:
        TypeError: A source, prompt or reward that is none.
        ValueError: A count that is no whole number or below 1, a negative seed, an unknown policy, or a malformed
            template.
    """

    source: Source
    prompt: Prompt = field(default_factory=Prompt)
    reward: Reward = field(default_factory=Reward)
    target: str | None = None
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    seed: int = 0
    bad_images: BadImages = "fail"
    licence: str | None = None

    def __post_init__(self) -> None:
        check_kinds(source=(self.source, Source), prompt=(self.prompt, Prompt), reward=(self.reward, Reward))
        for split in SPLITS:
            count: object = self._num_rows(split)
            if count is None:
                continue
            if not isinstance(count, Integral):
                raise ValueError(f"num_{split}={count!r} must be a whole number")
            if count < 1:
                raise ValueError(f"num_{split}={count} must be at least 1; null takes every row")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")
        if self.bad_images not in get_args(BadImages):
            raise ValueError(f"bad_images {self.bad_images!r} is unknown; there are {', '.join(get_args(BadImages))}")
        if self.target is not None:
            check_template(self.target)

    def in_style(self, style: Style) -> Task:
        """The same task asked in another style, and rewarded for keeping to it where the style has a format."""
        format_: FormatStyle = style if style == "think_answer" or style == "think_boxed" else "none"
        needs_format = self.reward.accuracy_needs_format and format_ != "none"
        reward = replace(self.reward, format=format_, accuracy_needs_format=needs_format)
        return replace(self, prompt=replace(self.prompt, style=style), reward=reward)

    def examples(self, split: Split, name: str) -> Sequence[Example]:
        """The split's examples, lazily: text is filled in and images are decoded when an item is fetched.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            name: The task's name in the stream; errors and results carry it.

        Raises:
            ValueError: Unknown split, a split without rows, or fewer rows than ``num_<split>`` asks for. Fetching an
                item raises it for whatever is wrong with that row, naming task and row; of its images,
                :class:`SkippedRow` if ``bad_images`` is ``skip``.
        """
        rows, indices = self._rows(split, name)
        return LazySequence(len(indices), partial(self._example, rows, indices, name))

    def asked(self, split: Split, name: str) -> Sequence[tuple[list[dict], Gold]]:
        """Chat turns and reference answer of each of the split's examples, without looking at its images.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            name: The task's name in the stream; errors carry it.

        Raises:
            ValueError: As for :meth:`examples`, images apart.
        """
        rows, indices = self._rows(split, name)

        def ask(index: int) -> tuple[list[dict], Gold]:
            row = rows[int(indices[index])]
            return self._messages(row), row.answer

        return LazySequence(len(indices), ask)

    def _rows(self, split: Split, name: str) -> tuple[Sequence[Row], np.ndarray]:
        """The source's rows of a split, and which of them the task takes."""
        try:
            check_split(split)
            rows = self.source.split(split)
            if not isinstance(rows, Sequence):
                raise ValueError(
                    f"its source gives {kind_of(rows)}; give a sequence of Rows, as a list or LazySequence"
                )
            return rows, self._subset(len(rows), split)
        except ValueError as error:
            raise ValueError(f"task '{name}': {error}") from error

    def _messages(self, row: Row) -> list[dict]:
        return (row.prompt or self.prompt).messages(row.question, len(row.images), row.system, row.history)

    def _num_rows(self, split: Split) -> int | None:
        return {"train": self.num_train, "val": self.num_val, "test": self.num_test}[split]

    def _subset(self, num_rows: int, split: Split) -> np.ndarray:
        count = self._num_rows(split)
        if num_rows == 0:
            raise ValueError(f"the {split} split has no rows")
        if count is None:
            return np.arange(num_rows)
        if count > num_rows:
            raise ValueError(f"num_{split}={count}, but the {split} split has {num_rows} rows; ask for at most that")
        generator = np.random.default_rng([self.seed, SPLITS.index(split)])
        return np.sort(generator.permutation(num_rows)[:count])

    def _example(self, rows: Sequence[Row], indices: np.ndarray, name: str, index: int) -> Example:
        try:
            row = rows[int(indices[index])]
        except ValueError as error:  # the source has named the row
            raise ValueError(f"task '{name}', {error}") from error
        if not isinstance(row, Row):
            raise ValueError(f"task '{name}': its source gives {kind_of(row)} in the place of a Row")
        where = f"task '{name}', {row.row_id}"
        try:
            example = Example(
                task=name,
                row_id=row.row_id,
                messages=self._messages(row),
                gold=row.answer,
                target=self._target(row),
                target_ids=row.target_ids,
                reward=self.reward,
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        try:
            return replace(example, images=[load_image(image) for image in row.images])
        except ImageError as error:
            if self.bad_images == "fail":
                raise ImageError(f"{where}: {error}") from error
            # Pictures all the same: a rank that had none would not run the vision tower while others wait for it.
            blank = replace(example, images=[Image.new("RGB", (BLANK_SIDE, BLANK_SIDE)) for _ in row.images])
            raise SkippedRow(f"{where}: {error}", blank) from error

    def _target(self, row: Row) -> str:
        template = "{answer}" if self.target is None else self.target
        if self.target is None and row.target is not None:
            text = row.target
        else:
            text = fill_template(template, {"answer": most_frequent(row.answer), **row.fields})
        check_text(text, "the target")
        return text
