"""What was learned and lost so far, as pictures after every task."""

from __future__ import annotations

from typing import Literal

from lightning import Callback, LightningModule, Trainer

from cpt_lightning.callbacks.continual import ContinualLearning
from cpt_lightning.callbacks.display.loggers import drawn, log_charts, log_image, logged_step, shows_images
from cpt_lightning.pictures import heatmap, stream_curves
from cpt_lightning.records import AccuracyMatrix
from cpt_lightning.tasks.checks import check_known

When = Literal["every_task", "end", "never"]


class StreamPictures(Callback):
    """Draws ``stream/accuracy_matrix`` and ``stream/curves``: learning and forgetting of every task over all steps.

    TensorBoard also gets charts of several curves each, under *Custom Scalars*: the accuracy on all tasks, on all
    probes, and what each task has lost. Nothing is drawn where no logger has pictures.

    Args:
        when: After each task, once after the last, or not at all.
    """

    def __init__(self, when: When = "every_task") -> None:
        check_known("StreamPictures: ", when=(when, When))
        self.when = when
        self.steps: list[int] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks for the record that is drawn.

        Raises:
            ValueError: ``ContinualLearning`` is missing or comes later.
        """
        if stage == "fit" and self.when != "never":
            before = trainer.callbacks[: trainer.callbacks.index(self)]
            if not any(isinstance(callback, ContinualLearning) for callback in before):
                raise ValueError(
                    "StreamPictures draws the record of ContinualLearning: put that callback before it, "
                    "or set StreamPictures.when to never"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays out the charts of several curves."""
        stream = trainer.datamodule
        if self.when == "never" or trainer.fast_dev_run:
            return
        charts = {
            "accuracy on tasks": [f"val/{name}/accuracy" for name in stream.task_names],
            "accuracy on probes": [f"val/{name}/accuracy" for name in stream.probe_names],
            "tasks: final minus best earlier accuracy": [f"continual/forgetting/{name}" for name in stream.task_names],
            "probes: change since the base": [f"continual/probe/{name}" for name in stream.probe_names],
        }
        log_charts(trainer, "stream", {title: curves for title, curves in charts.items() if curves})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws, when ContinualLearning has added the task's row."""
        if trainer.fast_dev_run:
            return
        self.steps = [*self.steps[: trainer.current_epoch], logged_step(trainer)]
        is_end = trainer.current_epoch + 1 == trainer.datamodule.num_stages
        if (self.when == "every_task" or (self.when == "end" and is_end)) and shows_images(trainer):
            self._draw(trainer, next(each for each in trainer.callbacks if isinstance(each, ContinualLearning)))

    def _draw(self, trainer: Trainer, record: ContinualLearning) -> None:
        matrix: AccuracyMatrix = record.matrix(trainer)
        # A checkpoint from before there were pictures does not know the steps.
        steps = self.steps if len(self.steps) == len(matrix.rows) else None
        beside_last_batch = logged_step(trainer) - 1
        log_image(trainer, "stream/accuracy_matrix", drawn(heatmap(matrix)), beside_last_batch)
        log_image(trainer, "stream/curves", drawn(stream_curves(matrix, steps)), beside_last_batch)

    def state_dict(self) -> dict:
        """The steps at which tasks ended."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on with the steps of a checkpoint."""
        self.steps = list(state_dict["steps"])
