"""What a rollout filter did to the training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpt_lightning.records.run import JudgedStage
from cpt_lightning.report.arms import Arm


@dataclass(frozen=True)
class Filtered:
    """A stage of a run.

    Args:
        arm: Of the run.
        seed: Of the run.
        stage: Its name.
        num_rows: Rows that were judged.
        kept: Rows to learn from, in per cent; ``None`` if not all were judged yet.
        pass_rate: Attempts that were right, in per cent.
        reasons: How many rows were left out, by the reason.
        num_completions: Sampled by this run for it.
        minutes: What that took.
    """

    arm: str
    seed: int | str
    stage: str
    num_rows: int
    kept: float | None
    pass_rate: float | None
    reasons: str
    num_completions: int
    minutes: float


def filtered(arms: Sequence[Arm]) -> Iterator[Filtered]:
    """Every stage that any run filtered."""
    for arm in arms:
        for seed, run in arm.runs.items():
            for stage, judged in run.verdicts.items():
                yield _summary(arm.name, seed, stage, judged)


def _summary(arm: str, seed: int | str, stage: str, judged: JudgedStage) -> Filtered:
    rows = judged.rows
    tried = [row for row in rows if row["refused"] is None]
    attempts = judged.header["completions_per_row"] * len(tried)
    reasons = Counter(row["reason"] for row in rows if not row["kept"]) if judged.is_finished else Counter()
    return Filtered(
        arm, seed, stage,
        num_rows=len(rows),
        kept=100 * sum(row["kept"] for row in rows) / len(rows) if rows and judged.is_finished else None,
        pass_rate=100 * sum(row["pass_count"] for row in tried) / attempts if attempts else None,
        reasons=", ".join(f"{reason}: {number}" for reason, number in reasons.most_common()),
        num_completions=judged.num_completions,
        minutes=sum(row.get("time_s", 0.0) for row in rows) / 60 if judged.num_completions else 0.0,
    )  # fmt: skip
