"""How long a run takes at most, by what its largest steps take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        unknown: Why the numbers are not known, if they are not.
    """

    num_steps: int
    step_seconds: float
    num_evaluations: int
    num_batches: int
    batch_seconds: float
    unknown: str = ""

    @property
    def training_s(self) -> float:
        """Of all steps."""
        return self.num_steps * self.step_seconds

    @property
    def evaluation_s(self) -> float:
        """Of all evaluations."""
        return self.num_evaluations * self.num_batches * self.batch_seconds


def duration_of(stream: TaskStream, processor: PromptProcessor, parts: Sequence[Part]) -> Duration:
    """What the stream takes if every batch is as large as those of ``parts``."""
    seconds = {part.name: part.seconds for part in parts}
    batch_seconds = seconds.pop(EVALUATION)
    stream.processor = processor
    num_steps = num_batches = 0
    unknown = ""
    try:
        num_steps = sum(stream.num_steps(stage) for stage in range(stream.num_stages))
        num_batches = len(stream.val_dataloader())
    except (ValueError, OSError) as error:
        unknown = str(error)
    return Duration(num_steps, sum(seconds.values()), stream.num_stages + 1, num_batches, batch_seconds, unknown)
