"""A completion -> the named parts of its reward; the accuracy among them is also the metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cpt_lightning.rewards.formats import FORMAT_STYLES, FormatStyle, has_format
from cpt_lightning.rewards.functions import RewardFunction, called, check_function, function_name
from cpt_lightning.rewards.grading import KINDS, Kind, grade
from cpt_lightning.rewards.lengths import OverlongPenalty
from cpt_lightning.rewards.yes_no import YES_NO_COUNTS, YES_NO_RATIOS, yes_no_counts
from cpt_lightning.types import Example, Gold

RESERVED = {"total", "accuracy", "format", "overlong", "forced_accuracy", "num_samples", *YES_NO_COUNTS, *YES_NO_RATIOS}
"""Names of parts and metrics that results have already."""


@dataclass
class RewardPart:
    """A further part of a reward.

    Args:
        function: ``(completion, gold) -> float``, importable so that it can be named in YAML and sent to workers.
        weight: Factor of the part in the total.

    Raises:
        TypeError: What cannot be called.
        ValueError: A function that takes something else.
    """

    function: RewardFunction
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_function(self.function, "the function of an extra reward part")


@dataclass
class Reward:
    """Grades a completion; calling it gives the parts ``total``, ``accuracy`` and, with a format, ``format``.

    The total is the weighted sum of accuracy, format and the extra parts; without a format accuracy counts in full
    (arXiv 2507.05386: 0.9 and 0.1, and accuracy alone for the arm without reasoning). Accuracy asks only whether the
    answer is right, in any style. Kind ``yes_no`` also gives what a set's precision and recall are made of
    (:data:`~cpt_lightning.rewards.yes_no.YES_NO_COUNTS`), which is no part of the total and which RFT leaves out.

    Args:
        kind: How answers are compared: ``text``, ``exact``, ``letter``, ``number``, ``math``, ``yes_no``,
            ``short_answer``, ``letter_or_short_answer``, ``vqa``, ``relaxed``, ``permutation`` or ``permutation_hits``;
            see :func:`~cpt_lightning.rewards.grading.grade`. Or a function of your own, ``(completion, gold) -> float``
            in [0, 1], of the whole text of the completion.
        format: Style that is rewarded: ``none``, ``think_answer`` or ``think_boxed``.
        accuracy_weight: Weight of the accuracy, where there is a format.
        format_weight: Weight of the format, where there is one.
        accuracy_needs_format: A right answer in the wrong style adds nothing to the total; the accuracy still shows it.
        extra: Further parts by name.

    Raises:
        TypeError: Extra parts that are none.
        ValueError: Unknown kind or format, a function that takes something else, a weight that is negative or not a
            number, ``accuracy_needs_format`` without a format, or an extra part with a name that is taken.

    The jigsaw reward of arXiv 2506.23508, R_hit + R_acc + R_fmt; in YAML: ``reward: {kind: permutation, format:
    think_answer, accuracy_weight: 1.0, format_weight: 1.0, extra: {hit: {function:
    cpt_lightning.rewards.permutation_hits}}}``.

    >>> from cpt_lightning.rewards import permutation_hits
    >>> reward = Reward("permutation", "think_answer", 1.0, 1.0, extra={"hit": RewardPart(permutation_hits)})
    >>> reward("<think>.</think><answer>2 1 3 4</answer>", "2, 1, 4, 3")
    {'total': 1.5, 'accuracy': 0.0, 'format': 1.0, 'hit': 0.5}
    """

    kind: Kind | RewardFunction = "text"
    format: FormatStyle = "none"
    accuracy_weight: float = 0.9
    format_weight: float = 0.1
    accuracy_needs_format: bool = False
    extra: dict[str, RewardPart] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if callable(self.kind):
            check_function(self.kind, "the reward's kind")
        elif self.kind not in KINDS:
            raise ValueError(f"reward kind {self.kind!r} is unknown; there are {', '.join(KINDS)}")
        if self.format not in FORMAT_STYLES:
            raise ValueError(f"reward format {self.format!r} is unknown; there are {', '.join(FORMAT_STYLES)}")
        if self.format == "none" and self.accuracy_needs_format:
            raise ValueError("accuracy_needs_format needs a format; set it to think_answer or think_boxed")
        if not isinstance(self.extra, Mapping) or not all(isinstance(part, RewardPart) for part in self.extra.values()):
            raise TypeError(f"extra is {self.extra!r}; give a dict of parts by name, as {{'hit': RewardPart(hit)}}")
        for name in self.extra:
            if name in RESERVED or not name or "/" in name:
                raise ValueError(f"extra reward part {name!r} has a name that results use otherwise; rename it")
        weights = {"accuracy_weight": self.accuracy_weight, "format_weight": self.format_weight}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} is {weight}; give a number of at least 0")
        for name, part in self.extra.items():
            if not math.isfinite(part.weight):
                raise ValueError(f"the weight of the extra part {name!r} is {part.weight}; give a finite number")

    def __call__(self, completion: str, gold: Gold) -> dict[str, float]:
        """The parts that the completion earns; ``total`` is what RFT maximises, ``accuracy`` the metric in [0, 1].

        Raises:
            ValueError: The reference answer does not suit the kind, or an extra part is not a finite number.
        """
        accuracy = self._accuracy(completion, gold)
        parts = {"total": accuracy, "accuracy": accuracy}
        if self.format != "none":
            parts["format"] = float(has_format(completion, self.format))
            counted = accuracy * parts["format"] if self.accuracy_needs_format else accuracy
            parts["total"] = self.accuracy_weight * counted + self.format_weight * parts["format"]
        for name, part in self.extra.items():
            parts[name] = called(part.function, completion, gold, f"the extra reward part {name!r}")
            parts["total"] += part.weight * parts[name]
        if self.kind == "yes_no":
            parts |= yes_no_counts(grade(completion, "yes", self.kind), gold)
        return parts

    @property
    def kind_name(self) -> str:
        """How answers are compared, in a word."""
        return function_name(self.kind) if callable(self.kind) else self.kind

    def _accuracy(self, completion: str, gold: Gold) -> float:
        if not callable(self.kind):
            return grade(completion, gold, self.kind)
        accuracy = called(self.kind, completion, gold, f"the accuracy by {self.kind_name}")
        if not 0 <= accuracy <= 1:
            raise ValueError(f"the accuracy by {self.kind_name} is {accuracy}; give a number in [0, 1]")
        return accuracy


def score(
    completions: Sequence[str],
    examples: Sequence[Example],
    overlong: OverlongPenalty | None = None,
    num_tokens: Sequence[int] = (),
) -> list[dict[str, float]]:
    """What each completion earns from its example's reward.

    Args:
        completions: N texts; with N = B * G those of one example stand together.
        examples: The B rows they answer.
        overlong: Adds its part ``overlong`` to every total.
        num_tokens: N lengths, which it needs.

    Raises:
        RuntimeError: A reward raised, or gave no finite ``total`` and ``accuracy``; the message names task and row.
        ValueError: N is not a multiple of B, or a penalty comes without N lengths.
    """
    if bool(completions) != bool(examples) or (examples and len(completions) % len(examples)):
        raise ValueError(f"{len(completions)} completions cannot be shared out among {len(examples)} examples")
    if overlong and len(num_tokens) != len(completions):
        raise ValueError(f"{len(num_tokens)} lengths for {len(completions)} completions; a penalty needs all")
    group_size = len(completions) // max(1, len(examples))
    scores = [_score(text, examples[index // group_size]) for index, text in enumerate(completions)]
    if overlong:
        for parts, length in zip(scores, num_tokens, strict=True):
            parts["overlong"] = overlong(int(length))
            parts["total"] += parts["overlong"]
    return scores


def is_right(scores: dict[str, float], threshold: float = 1.0) -> bool:
    """Whether an answer is accurate enough, and in the format that was asked for: without it RIF-RFT calls it wrong.

    >>> is_right({"accuracy": 1.0, "format": 0.0}), is_right({"accuracy": 0.6}, threshold=0.5)
    (False, True)
    """
    return scores["accuracy"] >= threshold and scores.get("format", 1.0) == 1.0


def _score(completion: str, example: Example) -> dict[str, float]:
    where = f"task '{example.task}', {example.row_id}"
    try:
        parts = example.reward(completion, example.gold)
    except Exception as error:  # a user's reward may raise anything; the row is what helps to find out why
        raise RuntimeError(f"{where}: the reward raised {type(error).__name__}: {error}") from error
    if not isinstance(parts, dict) or not all(math.isfinite(parts.get(key, math.nan)) for key in ("total", "accuracy")):
        raise RuntimeError(
            f"{where}: the reward gave {parts!r}; it must give a dict with finite 'total' and 'accuracy'"
        )
    return parts
