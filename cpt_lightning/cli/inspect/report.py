"""What an inspection finds, as plain data: the tables print it, ``report.json`` keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Spread:
    """Where numbers lie.

    Args:
        minimum: Smallest.
        median: The middle one; as the others a number that is there, not a mean of two.
        p95: 95 % are at most this.
        maximum: Largest.
    """

    minimum: int
    median: int
    p95: int
    maximum: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread | None:
        """The spread of whole numbers; of none there is none.

        >>> Spread.of([3, 1, 2])
        Spread(minimum=1, median=2, p95=3, maximum=3)
        """
        if not values:
            return None
        return cls(*(int(value) for value in np.quantile(values, [0, 0.5, 0.95, 1], method="inverted_cdf")))


@dataclass
class Complaint:
    """Something that is wrong with rows of a split.

    Args:
        what: The reason, alike for all these rows.
        count: Rows.
        first: What was said of the first one, with its file and row.
    """

    what: str
    count: int
    first: str


@dataclass
class Answers:
    """What reference answers there are.

    Args:
        num_distinct: Different ones.
        most_frequent: The most frequent ones and their shares.
        baseline: Accuracy of always giving the most frequent one, as the task's reward grades it.
    """

    num_distinct: int
    most_frequent: list[tuple[str, float]]
    baseline: float


@dataclass
class SplitReport:
    """A split of a task, as far as its rows were measured.

    Args:
        split: ``train``, ``val`` or ``test``.
        num_rows: Rows of the split; ``None`` if it cannot be opened.
        error: Why it cannot be opened.
        num_left_out: Rows of the file that the source's ``columns`` leave out before any split is made of it.
        num_measured: Rows looked at, evenly spaced; what follows is of these.
        images_per_row: Images of a row.
        image_sizes: Width and height of the smallest, the median and the largest image, by area.
        prompt_tokens: Tokens of the prompt, chat template and images included.
        image_tokens: Those of the images among them.
        target_tokens: Tokens of what SFT learns, its end of turn included.
        num_too_long: Prompts over ``data.max_prompt_tokens``; training leaves them out, evaluation asks them.
        skipped: Rows that are left out because of an image, as their task wants it, by reason.
        refused: Rows that would stop a run, by reason.
        answers: The reference answers.
        target_earns: Mean of each part of the task's reward over the SFT targets.
        wrong_targets: SFT targets that do not earn what a right answer earns, by reason.
        fingerprint: Where it differs, scores do not compare.
        num_without_options: Rows of the source's split without the options that its ``columns.options`` promises.
        num_learned: Measured rows of an evaluation split that stand in ``train`` too, in the same words with the same
            images.
    """

    split: str
    num_rows: int | None = None
    error: str | None = None
    num_left_out: int = 0
    num_measured: int = 0
    images_per_row: Spread | None = None
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    prompt_tokens: Spread | None = None
    image_tokens: Spread | None = None
    target_tokens: Spread | None = None
    num_too_long: int = 0
    skipped: list[Complaint] = field(default_factory=list)
    refused: list[Complaint] = field(default_factory=list)
    answers: Answers | None = None
    target_earns: dict[str, float] = field(default_factory=dict)
    wrong_targets: list[Complaint] = field(default_factory=list)
    fingerprint: str | None = None
    num_without_options: int = 0
    num_learned: int = 0

    @property
    def num_skipped(self) -> int:
        """Measured rows that are left out because of an image."""
        return sum(complaint.count for complaint in self.skipped)


@dataclass
class Shown:
    """An example as the model gets it.

    Args:
        row_id: Its name.
        prompt: The decoded prompt; a run of image tokens stands as ``<|image_pad|> x 64``.
        gold: Reference answer(s).
        target: What SFT learns.
        earns: What the target earns under the task's reward; empty where it cannot be graded.
    """

    row_id: str
    prompt: str
    gold: str | list[str]
    target: str | None
    earns: dict[str, float]


@dataclass
class TaskReport:
    """A task or probe.

    Args:
        name: Its name in the stream.
        role: ``task`` or ``probe``.
        prompt: How it is asked: style and, where there are some, prefix, suffix and system turn.
        prefixes: What its replies are made to begin with, by the module's option that says so.
        reward: How it is graded.
        target: Template of what SFT learns; ``None`` is the row's own target, else its answer.
        licence: Terms under which the data may be used; ``None`` where the configuration does not say.
        splits: Its splits.
        examples: Some examples.
        contact_sheet: File of thumbnails; ``None`` where no row can be shown.
    """

    name: str
    role: str
    prompt: dict[str, str]
    prefixes: dict[str, str]
    reward: str
    target: str | None
    licence: str | None = None
    splits: list[SplitReport] = field(default_factory=list)
    examples: list[Shown] = field(default_factory=list)
    contact_sheet: str | None = None


@dataclass
class StageReport:
    """A stage of the stream.

    Args:
        name: Its task, or ``a+b`` where tasks are mixed.
        num_rows: Training rows; ``None`` if they cannot be opened.
        num_steps: Training batches.
        passes: How often it goes through its rows.
    """

    name: str
    num_rows: int | None = None
    num_steps: int | None = None
    passes: float | None = None


@dataclass
class Report:
    """The whole inspection, as ``report.json`` has it.

    Args:
        backbone: Whose tokenizer and image processor counted.
        max_prompt_tokens: Limit of training prompts.
        evaluate_on: Split that ``fit`` evaluates on.
        stages: The stream.
        tasks: Tasks and probes.
        problems: What would stop a run or spoil its numbers.
        warnings: What a run would do all the same, and perhaps should not.
    """

    backbone: str
    max_prompt_tokens: int | None
    evaluate_on: str
    stages: list[StageReport] = field(default_factory=list)
    tasks: list[TaskReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
