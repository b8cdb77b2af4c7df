"""What a run logged at its steps, read from TensorBoard's event files, or from those of Lightning's ``CSVLogger``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cpt_lightning.records.events import Scalars


@dataclass(frozen=True)
class Logged:
    """The scalars of a run.

    Args:
        values: By name, what was logged, in its order.
        seconds: From the first to the last event of each file, summed: a file for each time that the run was begun;
            ``None`` of what has no times, as ``metrics.csv``.
    """

    values: Mapping[str, list[float]] = field(default_factory=dict)
    seconds: float | None = None

    @classmethod
    def load(cls, folder: Path) -> Logged:
        """Reads all event files of a folder, or without these ``metrics.csv``; no values where there is neither."""
        files = sorted(folder.glob("events.out.tfevents.*"))
        if not files:
            return cls(_csv_scalars(folder))
        scalars = Scalars.load(files)
        values = {name: [value for _, value in found] for name, found in scalars.entries.items()}
        return cls(values, scalars.seconds or None)

    def total(self, name: str) -> float | None:
        """The sum over steps."""
        return sum(self.values[name]) if name in self.values else None

    def highest(self, name: str) -> float | None:
        """The largest value."""
        return max(self.values[name]) if name in self.values else None

    @property
    def tokens(self) -> float | None:
        """What all steps learned from: those per second, times the seconds of the step."""
        rates, seconds = (self.values.get(name, []) for name in ("perf/tokens_per_s", "time/step_s"))
        # A step that took no measurable time has no rate: then there is no telling which belong together.
        if not rates or len(rates) != len(seconds):
            return None
        return sum(rate * second for rate, second in zip(rates, seconds, strict=True))


def _csv_scalars(folder: Path) -> dict[str, list[float]]:
    """What ``CSVLogger`` wrote into a folder, by name; nothing where steps are missing, for the rest would mislead.

    A run that goes on writes the next ``version_<n>``, from the step of its checkpoint on. With a ``version`` of one's
    own it takes away what it had written before.
    """
    versions = sorted(folder.glob("*/version_*/metrics.csv"), key=lambda file: (len(file.parent.name), file))
    rows: list[dict[str, str]] = []
    for path in (*folder.glob("metrics.csv"), *versions):
        with path.open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(line for line in file if line.endswith("\n")))  # a kill may cut off the last
        if found:
            rows = [*(row for row in rows if int(row["step"]) < int(found[0]["step"])), *found]
    steps = [int(row["step"]) for row in rows if row.get("perf/rows")]
    if steps != list(range(len(steps))):
        return {}
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value and name != "step")
    return {name: [float(row[name]) for row in rows if row.get(name)] for name in names}
