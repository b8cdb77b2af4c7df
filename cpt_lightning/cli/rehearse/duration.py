"""How long a run takes at most, by what its largest steps take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpt_lightning.cli.rehearse.filter_trial import FILTER
from cpt_lightning.cli.rehearse.watch import EVALUATION, Part
from cpt_lightning.data import TaskStream
from cpt_lightning.models.processor import PromptProcessor


@dataclass
class Duration:
    """A run in its parts.

    Args:
        num_steps: Of all stages.
        step_seconds: Of a step.
        num_evaluations: Before, between and after the stages.
        num_batches: Of an evaluation.
        batch_seconds: Of such a batch.
        num_judged: Batches that the filter judges, of all stages.
        judged_seconds: Of such a batch.
        unknown: Why the numbers are not known, if they are not.
    """

    num_steps: int
    step_seconds: float
    num_evaluations: int
    num_batches: int
    batch_seconds: float
    num_judged: int = 0
    judged_seconds: float = 0.0
    unknown: str = ""

    @property
    def training_s(self) -> float:
        """Of all steps."""
        return self.num_steps * self.step_seconds

    @property
    def evaluation_s(self) -> float:
        """Of all evaluations."""
        return self.num_evaluations * self.num_batches * self.batch_seconds

    @property
    def filter_s(self) -> float:
        """Of all that is judged."""
        return self.num_judged * self.judged_seconds


def duration_of(stream: TaskStream, processor: PromptProcessor, parts: Sequence[Part]) -> Duration:
    """What the stream takes if every batch is as large as those of ``parts``."""
    seconds = {part.name: part.seconds for part in parts}
    step_seconds = sum(part.seconds for part in parts if part.is_of_step)
    stages = range(stream.num_stages)
    stream.processor = processor
    num_steps = num_batches = num_judged = 0
    unknown = ""
    try:
        num_steps = sum(map(stream.num_steps, stages))
        num_batches = len(stream.val_dataloader())
        num_judged = sum(len(stream.rows_to_judge(stage, {})) for stage in stages) if FILTER in seconds else 0
    except (ValueError, OSError) as error:
        unknown = str(error)
    return Duration(
        num_steps, step_seconds, stream.num_stages + 1, num_batches, seconds[EVALUATION],
        num_judged, seconds.get(FILTER, 0.0), unknown,
    )  # fmt: skip
