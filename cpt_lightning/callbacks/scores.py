"""What ``cpt test`` measured, as a table and as a file that compares with a row of the accuracy matrix."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpt_lightning.records.files import replace_text
from cpt_lightning.records.matrix import Scores, logged_cell

FILENAME = "test_scores.json"


class TestScores(Callback):
    """Writes ``test_scores.json`` after a test, and prints it; prints the scores of a checkpoint that was validated.

    The file has ``backbone`` (its path), ``checkpoint`` (``null`` without one), ``split``, and ``scores`` and
    ``fingerprints`` in the form of ``accuracy_matrix.json``: of a run that was evaluated on its test split
    (``data.evaluate_on: test``) they equal the row of that checkpoint. An earlier file is replaced.
    """

    __test__ = False  # for pytest, which takes the name for a test's

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses to ask some rows only, or some tasks.

        Raises:
            ValueError: The Trainer limits test batches.
        """
        limit = trainer.limit_test_batches
        if stage == "test" and not trainer.fast_dev_run and (limit != 1.0 or isinstance(limit, int)):
            raise ValueError(
                f"trainer.limit_test_batches={limit} would leave tasks out of {FILENAME}; leave it at 1.0. To evaluate "
                "less, set num_test of the tasks"
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the scores of all tasks and probes, and writes them down."""
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        stream, scores = trainer.datamodule, scores_of(trainer, "test")
        print_scores(scores, "test", stream.probe_names)
        if folder is not None:
            record = {
                "backbone": pl_module.backbone.path,
                "checkpoint": trainer.ckpt_path and str(trainer.ckpt_path),
                "split": "test",
                "scores": scores,
                "fingerprints": {name: stream.fingerprint(name, "test") for name in scores},
            }
            path = Path(folder) / FILENAME
            replace_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
            rank_zero_info(f"scores: {path}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows what ``cpt validate`` found; without a checkpoint it is the base's row of the accuracy matrix."""
        if trainer.state.fn == TrainerFn.VALIDATING and trainer.ckpt_path is not None and trainer.is_global_zero:
            stream = trainer.datamodule
            print_scores(scores_of(trainer, "val"), stream.evaluate_on, stream.probe_names)


def scores_of(trainer: Trainer, prefix: str) -> Scores:
    """What was logged of all tasks and probes."""
    stream, logged = trainer.datamodule, trainer.callback_metrics
    names = [name for name in (*stream.task_names, *stream.probe_names) if f"{prefix}/{name}/accuracy" in logged]
    return {name: logged_cell(f"{prefix}/{name}", logged) for name in names}


def print_scores(scores: Scores, split: str, probes: Collection[str]) -> None:
    """Prints a table of accuracies and numbers of rows."""
    table = Table(f"{split} split")
    for title in ("accuracy in %", "rows"):
        table.add_column(title, justify="right")
    for name, cell in scores.items():
        label = f"[dim]probe[/] {escape(name)}" if name in probes else escape(name)
        table.add_row(label, f"{100 * cell['accuracy']:.1f}", str(cell["num_samples"]))
    console = Console()
    console.print()
    console.print(table)
