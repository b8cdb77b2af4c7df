"""What a run logged at its steps, read from TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Logged:
    """The scalars of a run.

    Args:
        values: By name, what was logged, in its order.
        seconds: From the first to the last event of each file, summed: a file for each time that the run was begun.
    """

    values: Mapping[str, list[float]] = field(default_factory=dict)
    seconds: float | None = None

    @classmethod
    def load(cls, folder: Path) -> Logged:
        """Reads all event files of a folder; no values where there are none."""
        # Here, for it is slow to import.
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
            EventAccumulator,
        )

        values: dict[str, list[float]] = {}
        spans: list[float] = []
        for path in sorted(folder.glob("events.out.tfevents.*")):
            events = EventAccumulator(str(path), size_guidance={"scalars": 0})
            events.Reload()
            times: list[float] = []
            for name in events.Tags()["scalars"]:
                found = events.Scalars(name)
                values.setdefault(name, []).extend(event.value for event in found)
                times += (found[0].wall_time, found[-1].wall_time)
            spans += [max(times) - min(times)] if times else []
        return cls(values, sum(spans) if spans else None)

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
