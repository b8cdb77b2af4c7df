"""What ``cpt test`` measured, as a table and as a file that compares with a row of the accuracy matrix."""

from __future__ import annotations

import json
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from cpt_lightning.records.files import replace_text
from cpt_lightning.records.matrix import Cell, logged_cell

FILENAME = "test_scores.json"


class TestScores(Callback):
    """Writes ``test_scores.json`` after a test, and prints it.

    The file has ``backbone`` (its path), ``checkpoint`` (``null`` without one), ``split``, and ``scores`` and
    ``fingerprints`` in the form of ``accuracy_matrix.json``: of a run that was evaluated on its test split
    (``data.evaluate_on: test``) they equal the row of that checkpoint. An earlier file is replaced.
    """

    __test__ = False  # for pytest, which takes the name for a test's

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the scores of all tasks and probes."""
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        stream, logged = trainer.datamodule, trainer.callback_metrics
        names = [name for name in (*stream.task_names, *stream.probe_names) if f"test/{name}/accuracy" in logged]
        scores = {name: logged_cell(f"test/{name}", logged) for name in names}
        _print({name if name in stream.task_names else f"[dim]probe[/] {name}": scores[name] for name in names})
        if folder is not None:
            record = {
                "backbone": pl_module.backbone.path,
                "checkpoint": trainer.ckpt_path and str(trainer.ckpt_path),
                "split": "test",
                "scores": scores,
                "fingerprints": {name: stream.fingerprint(name, "test") for name in names},
            }
            replace_text(Path(folder) / FILENAME, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _print(scores: dict[str, Cell]) -> None:
    table = Table("test split")
    for title in ("accuracy in %", "rows"):
        table.add_column(title, justify="right")
    for label, cell in scores.items():
        table.add_row(label, f"{100 * cell['accuracy']:.1f}", str(cell["num_samples"]))
    console = Console()
    console.print()  # off the line of a progress bar
    console.print(table)
