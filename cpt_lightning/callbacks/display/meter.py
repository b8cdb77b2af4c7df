"""How far a piece of work is: a bar at a terminal, and now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from lightning import Trainer
from tqdm import tqdm

LINE_EVERY_S = 60.0
"""Not at a terminal: seconds between two lines."""
REDRAWN_EVERY_S = 0.5
"""At a terminal: seconds between two looks at the phase of a long step."""
BAR = "{desc} {percentage:3.0f}%|{bar:10}| "
"""As tqdm has it; what follows is ours."""


class Meter:
    """Shows what is done of so many steps, batches or rows, at how many rows a second, and the time that is left.

    At a terminal it is a bar, which when closed stays behind as a line of its own. Elsewhere there are no control
    characters: a line a minute, and one at the end.

    Args:
        name: What is done, and on which task.
        total: How many units there are.
        unit: What they are called.
        num_done: How many were done before.
        is_shown: Whether anything is shown at all.
    """

    def __init__(self, name: str, total: int, unit: str, num_done: int = 0, is_shown: bool = True) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.is_shown = is_shown
        self._first = self._done = num_done
        self._rows = 0
        self._said = self._phase = ""
        self._start = self._shown_at = time.monotonic()
        self._bar: tqdm | None = None
        if is_shown and sys.stdout.isatty():
            self._bar = tqdm(
                desc=name, total=total, initial=num_done, bar_format=BAR, dynamic_ncols=True, file=sys.stdout
            )

    def advance(self, units: int, rows: int, said: str = "", name: str | None = None) -> None:
        """Something is done.

        Args:
            units: How many units.
            rows: How many rows these were, over all ranks.
            said: What else is to be seen, such as the reward.
            name: What is done now.
        """
        self._done, self._rows = self._done + units, self._rows + rows
        self._said, self._phase, self.name = said, "", name or self.name
        if self._bar is not None:
            self._redescribe(self._bar)
            self._bar.update(units)
        elif self.is_shown and time.monotonic() - self._shown_at > LINE_EVERY_S:
            self._print_line(self.text())

    def show_phase(self, phase: str) -> None:
        """Says at a terminal what a step is at: some take minutes."""
        self._phase = phase
        if self._bar is not None and time.monotonic() - self._shown_at > REDRAWN_EVERY_S:
            self._shown_at = time.monotonic()
            self._redescribe(self._bar)
            self._bar.refresh()

    def text(self) -> str:
        """What is behind the bar."""
        parts = [f"{self._done}/{self.total} {self.unit}", *self._pace(), self._phase, self._said]
        return ", ".join(filter(None, parts))

    def _pace(self) -> list[str]:
        done, seconds = self._done - self._first, time.monotonic() - self._start
        if not done or seconds <= 0:
            return []
        left = (self.total - self._done) * seconds / done
        return [f"{self._rows / seconds:.1f} rows/s", f"{clock(left)} left" if left > 0 else f"took {clock(seconds)}"]

    def _redescribe(self, bar: tqdm) -> None:
        bar.set_description_str(self.name, refresh=False)
        bar.bar_format = BAR + self.text()

    def _print_line(self, text: str) -> None:
        self._shown_at = time.monotonic()
        print(f"{self.name}: {text}", flush=True)

    def close(self, name: str | None = None) -> None:
        """Leaves what was done as a line.

        Args:
            name: What was done, where it was more than was done last.
        """
        self.name, self._phase = name or self.name, ""
        if self._bar is not None:
            self._redescribe(self._bar)
            self._bar.refresh()
            self._bar.close()
        elif self.is_shown and self._done > self._first:
            self._print_line(self.text())
        self._bar, self.is_shown = None, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def clock(seconds: float) -> str:
    """A duration, as on a clock.

    >>> clock(7), clock(83.4), clock(7322)
    ('0:07', '1:23', '2:02:02')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def row_meter(trainer: Trainer, name: str, num_rows: int, num_done: int) -> Meter:
    """A meter of rows before training; silent where the Trainer's progress bar is, and on other ranks."""
    own = trainer.progress_bar_callback
    is_shown = trainer.is_global_zero and own is not None and not getattr(own, "is_disabled", False)
    return Meter(name, num_rows, "rows", num_done, is_shown)
