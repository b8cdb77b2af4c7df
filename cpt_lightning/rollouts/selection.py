"""Which of a model's own completions are good enough to be learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cpt_lightning.rewards import is_right
from cpt_lightning.tasks.prompts import SPECIAL_TOKEN

Fate = Literal["kept", "unfinished", "incorrect", "short", "long", "special_token", "duplicate", "surplus"]
"""What becomes of a completion: ``kept``, or why it is not."""
FATES: tuple[Fate, ...] = get_args(Fate)


@dataclass
class Selection:
    """Which completions are kept to be learned from.

    Completions that spell a chat or vision token are never kept: read back as text they would be another turn.

    Args:
        correct_only: Only those whose accuracy reaches ``threshold``, in the format that the reward asks for.
        threshold: Accuracy from which an answer is right, for tasks with soft accuracies.
        finished_only: Only those that came to their end, so that the end is learned.
        distinct: Of equal texts of a row the first one only.
        min_tokens: Fewest tokens, end-of-turn token included.
        max_tokens: Most tokens; any number by default.
        per_row: Most completions of a row, the first ones drawn; all by default.

    Raises:
        ValueError: A number out of range.
    """

    correct_only: bool = True
    threshold: float = 1.0
    finished_only: bool = True
    distinct: bool = True
    min_tokens: int = 1
    max_tokens: int | None = None
    per_row: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"selection.threshold={self.threshold} must lie in (0, 1]")
        if self.threshold < 1 and not self.correct_only:
            raise ValueError("selection.threshold has no effect without selection.correct_only")
        if self.min_tokens < 1 or (self.max_tokens is not None and self.max_tokens < self.min_tokens):
            raise ValueError(
                f"selection.min_tokens={self.min_tokens} and max_tokens={self.max_tokens} must be at least 1 and in "
                "this order"
            )
        if self.per_row is not None and self.per_row < 1:
            raise ValueError(f"selection.per_row={self.per_row} must be at least 1")

    def judge(
        self, texts: Sequence[str], scores: Sequence[dict[str, float]], lengths: Sequence[int], ended: Sequence[bool]
    ) -> list[Fate]:
        """What becomes of each of one row's completions.

        Args:
            texts: G completions, in the order in which they were drawn.
            scores: What each earned.
            lengths: Tokens of each.
            ended: Whether each came to its end.

        >>> right, wrong = {"accuracy": 1.0}, {"accuracy": 0.0}
        >>> Selection(per_row=1).judge(["4", "5", "4", "four"], [right, wrong, right, right], [2] * 4, [True] * 4)
        ['kept', 'incorrect', 'duplicate', 'surplus']
        """
        fates: list[Fate] = []
        seen: set[str] = set()
        for text, score, length, end in zip(texts, scores, lengths, ended, strict=True):
            fate = self._alone(text, score, length, end)
            if fate == "kept" and self.distinct and text in seen:  # of what is kept: a cut-off one has the same text
                fate = "duplicate"
            if fate == "kept" and self.per_row is not None and fates.count("kept") >= self.per_row:
                fate = "surplus"
            if fate == "kept":
                seen.add(text)
            fates.append(fate)
        return fates

    def _alone(self, text: str, score: dict[str, float], length: int, ended: bool) -> Fate:
        """What a completion is by itself, whatever its siblings are."""
        if self.finished_only and not ended:
            return "unfinished"
        if self.correct_only and not is_right(score, self.threshold):
            return "incorrect"
        if length < self.min_tokens:
            return "short"
        if self.max_tokens is not None and length > self.max_tokens:
            return "long"
        return "special_token" if SPECIAL_TOKEN.search(text) else "kept"
