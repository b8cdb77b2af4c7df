"""What a run logged at its steps, read from TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import ScalarEvent


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
        files = sorted(folder.glob("events.out.tfevents.*"))
        if not files:
            return cls()
        # Of the folder: what a resumed run logs again takes the place of what the killed one had logged.
        events = _scalars_of(folder)
        values = {name: [event.value for event in found] for name, found in events.items()}
        spans = [_span(_scalars_of(file)) for file in files]
        return cls(values, sum(spans) if any(spans) else None)

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


def _scalars_of(path: Path) -> dict[str, list[ScalarEvent]]:
    """The scalars of an event file, or of all those of a folder, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    return {name: each for name, each in found.items() if each}  # of a name whose events were taken back none are left


def _span(scalars: Mapping[str, list[ScalarEvent]]) -> float:
    """Seconds from the first to the last event."""
    times = [each.wall_time for found in scalars.values() for each in (found[0], found[-1])]
    return max(times) - min(times) if times else 0.0
