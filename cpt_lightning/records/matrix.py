"""The record of a stream: every task's and probe's accuracy after every stage, as JSON and as a table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from cpt_lightning.functional import accuracy_matrix as metrics
from cpt_lightning.functional.intervals import wilson_interval
from cpt_lightning.records.files import replace_text

VERSION = 1
"""Of the JSON form."""

METRICS: tuple[Callable[..., float], ...] = (
    metrics.average_accuracy,
    metrics.forgetting_measure,
    metrics.backward_transfer,
    metrics.learning,
    metrics.mean_average_accuracy,
    metrics.worst_dip,
)
"""Those that need nothing but the tasks' accuracies."""


class Cell(TypedDict):
    """One measurement.

    ``forced_accuracy`` is there where the module also forces a prefix; ``precision``, ``recall``, ``f1`` and
    ``yes_ratio`` where the questions are answered by yes or no.
    """

    accuracy: float
    num_samples: int
    forced_accuracy: NotRequired[float]
    precision: NotRequired[float]
    recall: NotRequired[float]
    f1: NotRequired[float]
    yes_ratio: NotRequired[float]


Further = Literal["forced_accuracy", "precision", "recall", "f1", "yes_ratio"]
FURTHER: tuple[Further, ...] = get_args(Further)
"""What a cell holds where it was measured."""


Scores = dict[str, Cell]
"""Measurements by the name of the task or probe; without those that were added to the stream later."""

NOT_MEASURED = "-"
"""What a table shows in such a place."""


@dataclass
class AccuracyMatrix:
    """Who scored what, when.

    Args:
        tasks: Learned tasks in their order.
        probes: What is evaluated but never learned.
        stages: Tasks of each stage of the stream.
        zero_shot: Scores of the untrained base, if it was evaluated.
        rows: Scores after each stage so far.
        fingerprints: By task or probe, what decides its scores besides the model (questions, references, reward) as 12
            hexadecimal digits; scores compare where they are equal. Files of earlier versions have none.
    """

    tasks: list[str]
    probes: list[str]
    stages: list[list[str]]
    zero_shot: Scores | None = None
    rows: list[Scores] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Tasks, then probes: the columns."""
        return [*self.tasks, *self.probes]

    @property
    def stage_names(self) -> list[str]:
        """What each row after the base stands after."""
        return ["+".join(stage) for stage in self.stages]

    @property
    def learned_at(self) -> list[int]:
        """The stage at which each task is learned first."""
        return [next(i for i, stage in enumerate(self.stages) if task in stage) for task in self.tasks]

    @property
    def added(self) -> list[str]:
        """Tasks and probes that the base was not asked, for the stream was extended by them later."""
        return [] if self.zero_shot is None else [name for name in self.names if name not in self.zero_shot]

    @property
    def probes_since_base(self) -> list[str]:
        """Probes that the base was asked: of these there are changes since then."""
        return [name for name in self.probes if name in (self.zero_shot or {})]

    def accuracy(self, names: Sequence[str]) -> list[list[float]]:
        """``[T, K]`` accuracies of K columns after each of the T stages so far; ``nan`` where none was measured."""
        return [_accuracy(row, names) for row in self.rows]

    def metrics(self) -> dict[str, float]:
        """What was learned and forgotten so far; what is not defined yet (nothing earlier, no base) is left out.

        The definitions are those of :mod:`cpt_lightning.functional.accuracy_matrix`. ``forgetting/<task>`` is
        an earlier task's term of the forgetting measure. ``probe/<name>`` is the change of a probe since the base,
        ``probe_minimum/<name>`` its lowest change on the way, ``probes_mean_change`` the mean of the former. Tasks and
        probes that the base was not asked (:attr:`added`) are no part of what is measured against it.
        """
        if not self.rows:
            return {}
        accuracy, learned_at = self.accuracy(self.tasks), self.learned_at
        found = {metric.__name__: metric(accuracy, learned_at=learned_at) for metric in METRICS}
        changes = metrics.forgetting_by_task(accuracy, learned_at)
        found |= {f"forgetting/{self.tasks[task]}": change for task, change in changes.items()}
        if self.zero_shot is not None:
            base = _accuracy(self.zero_shot, self.tasks)
            found["forward_transfer"] = metrics.forward_transfer(accuracy, base, learned_at)
            found |= self._probe_metrics(self.zero_shot)
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def _probe_metrics(self, zero_shot: Scores) -> dict[str, float]:
        names = self.probes_since_base
        if not names:
            return {}
        probes, base = self.accuracy(names), _accuracy(zero_shot, names)
        changes = metrics.probe_changes(probes, base)
        minima = zip(names, metrics.probe_minima(probes), base, strict=True)
        return {
            "probes_mean_change": statistics.mean(changes),
            **{f"probe/{name}": change for name, change in zip(names, changes, strict=True)},
            **{f"probe_minimum/{name}": lowest - before for name, lowest, before in minima},
        }

    # -- as JSON ---------------------------------------------------------------------------------------------------

    def to_json(self) -> dict:
        """The matrix as ``accuracy_matrix.json`` has it, version 1."""
        base = [] if self.zero_shot is None else [{"after": None, "scores": self.zero_shot}]
        after = [{"after": name, "scores": row} for name, row in zip(self.stage_names, self.rows, strict=False)]
        return {
            "version": VERSION,
            "tasks": self.tasks,
            "probes": self.probes,
            "stages": self.stages,
            "fingerprints": self.fingerprints,
            "rows": [*base, *after],
            "metrics": self.metrics(),
        }

    @classmethod
    def from_json(cls, data: Mapping) -> AccuracyMatrix:
        """The matrix that :meth:`to_json` wrote.

        Raises:
            ValueError: Another version.
        """
        if data.get("version") != VERSION:
            raise ValueError(
                f"accuracy matrix of version {data.get('version')!r}; this program reads version {VERSION}"
            )
        rows = list(data["rows"])
        zero_shot = rows.pop(0)["scores"] if rows and rows[0]["after"] is None else None
        return cls(
            tasks=list(data["tasks"]),
            probes=list(data["probes"]),
            stages=[list(stage) for stage in data["stages"]],
            zero_shot=zero_shot,
            rows=[row["scores"] for row in rows],
            fingerprints=dict(data.get("fingerprints", {})),
        )

    def save(self, path: str | Path) -> None:
        """Writes the JSON form; a reader never sees half of it."""
        replace_text(Path(path), json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> AccuracyMatrix:
        """Reads a file that :meth:`save` wrote."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))

    # -- as a table ------------------------------------------------------------------------------------------------

    def table(self, confidence: float | None = None) -> Table:
        """Accuracies in per cent, a column per stage; bold where the task has just been learned.

        Args:
            confidence: Level of Wilson's intervals shown behind; none by default.
        """
        table = Table("accuracy in %")
        columns: list[tuple[str, Scores, Sequence[str]]] = []
        if self.zero_shot is not None:
            columns.append(("base", self.zero_shot, ()))
        columns += zip(self.stage_names, self.rows, self.stages, strict=False)
        for name, _, _ in columns:
            table.add_column(escape(name).replace("+", "\n+"), justify="right", no_wrap=True)
        for name in self.names:
            cells = [_cell(scores.get(name), confidence, bold=name in learned) for _, scores, learned in columns]
            label = escape(name) if name in self.tasks else f"[dim]probe[/] {escape(name)}"
            table.add_row(label, *cells, end_section=name == self.tasks[-1])
        return table

    def print(self, confidence: float | None = None) -> None:
        """Prints the table, and below it the metrics."""
        console = Console()
        table = self.table(confidence)
        # Where output goes to a file it must not be squeezed into 80 columns.
        console.width = max(console.width, console.measure(table).maximum + 2)
        console.print()
        console.print(table)
        shown = self.metrics()
        changes = {name: value for name, value in shown.items() if name.startswith("probe/")}
        lines = {name.replace("_", " "): value for name, value in shown.items() if "/" not in name}
        if changes:
            lines["probes worst change"] = min(changes.values())
        for name, value in lines.items():
            console.print(f"  {name:24}{100 * value:6.1f}", highlight=False)


def _accuracy(scores: Scores, names: Sequence[str]) -> list[float]:
    return [scores[name]["accuracy"] if name in scores else math.nan for name in names]


def _cell(cell: Cell | None, confidence: float | None, bold: bool) -> str:
    if cell is None:
        return NOT_MEASURED
    text = f"{100 * cell['accuracy']:.1f}"
    if confidence is not None:
        low, high = wilson_interval(cell["accuracy"], cell["num_samples"], confidence)
        text += escape(f" [{100 * low:.1f}, {100 * high:.1f}]")
    return f"[bold]{text}[/]" if bold else text


def logged_cell(prefix: str, logged: Mapping[str, Tensor]) -> Cell:
    """The measurement that was logged as ``<prefix>/accuracy`` and so on."""
    scores: Cell = {
        "accuracy": round(float(logged[f"{prefix}/accuracy"]), 6),  # a float32 has no more
        "num_samples": int(logged[f"{prefix}/num_samples"]),
    }
    for part in FURTHER:
        if (value := logged.get(f"{prefix}/{part}")) is not None:
            scores[part] = round(float(value), 6)
    return scores
