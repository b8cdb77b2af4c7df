"""Which rows of a stage are learned from, by how many attempts at them passed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cpt_lightning.callbacks.filter.verdicts import Verdict

Mode = Literal["solvable", "unsolvable", "random"]
"""Rows inside the window, an equal number below it, or an equal number of any."""

CHOICE = 104
"""What the generator is for; the one that shuffles batches has the seed and the stage in its key too."""


@dataclass(frozen=True)
class Choice:
    """A window on the number of passes, and what of it is kept.

    Args:
        mode: What is kept.
        lowest: Fewest passes of a solvable row.
        highest: Most.
        cap: Most rows kept of a stage, drawn at random.
    """

    mode: Mode
    lowest: int
    highest: int
    cap: int | None = None

    def of(self, verdicts: Sequence[Verdict], seed: int, stage: int) -> list[Verdict]:
        """The verdicts with ``kept`` and ``reason``; what is drawn depends on seed and stage.

        Raises:
            ValueError: There are fewer unsolvable rows than solvable ones, so that the arms would differ in size.
        """
        usable = [row for row, verdict in enumerate(verdicts) if verdict.refused is None]
        solvable = [row for row in usable if self.holds(verdicts[row])]
        below = [row for row in usable if verdicts[row].pass_count < self.lowest]
        pool = {"solvable": solvable, "unsolvable": below, "random": usable}[self.mode]
        size = min(len(solvable), self.cap or len(solvable))
        if len(pool) < size:
            raise ValueError(
                f"filter.mode=unsolvable: only {len(pool)} rows have fewer passes than filter.lowest={self.lowest}, "
                f"but mode=solvable keeps {size}; set filter.cap={len(pool)} for all modes, so that they keep equally "
                "many"
            )
        draws = np.random.default_rng([seed, stage, CHOICE]).permutation(len(pool))[:size]
        kept, in_pool = {pool[draw] for draw in draws}, set(pool)
        return [
            replace(verdict, kept=row in kept, reason=self._reason(verdict, row in in_pool, row in kept))
            for row, verdict in enumerate(verdicts)
        ]

    def holds(self, verdict: Verdict) -> bool:
        """Whether a row is solvable."""
        return verdict.refused is None and self.lowest <= verdict.pass_count <= self.highest

    def _reason(self, verdict: Verdict, in_pool: bool, kept: bool) -> str:
        if verdict.refused is not None:
            return verdict.refused
        if in_pool:
            return self.mode if kept else "not drawn"
        if verdict.pass_count < self.lowest:
            return f"fewer than {self.lowest} passes"
        return f"more than {self.highest} passes" if verdict.pass_count > self.highest else "solvable"


def kept_rows(verdicts: Sequence[Verdict], tasks: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the rows that are kept, by task."""
    return {task: [each.row for each in verdicts if each.kept and each.task == task] for task in tasks}


def shortage(verdicts: Sequence[Verdict], tasks: Sequence[str], fewest: int) -> str | None:
    """What is missing where too few rows are kept, in all or of a task; ``None`` if there are enough."""
    num_kept = Counter(each.task for each in verdicts if each.kept)
    without = [task for task in tasks if not num_kept[task]]
    if num_kept.total() >= fewest and not without:
        return None
    reasons = Counter(each.reason for each in verdicts if not each.kept)
    left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    none_of = f", none of task '{without[0]}'" if without else ""
    return (
        f"{num_kept.total()} of {len(verdicts)} rows are kept{none_of}, and filter.min_rows={fewest} are needed; "
        f"left out: {left_out}"
    )
