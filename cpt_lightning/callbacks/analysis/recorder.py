"""What a callback measures over a run: a file beside ``config.yaml``, and what survives a resume."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.callbacks.checks import ChecksFit
from cpt_lightning.records.files import replace_text

VERSION = 1


class Recorder(ChecksFit):
    """Keeps ``measurements``, goes on with those of a checkpoint, and says at the end of a run what measuring took.

    ``filename`` names the file, beside ``config.yaml``.

    Raises:
        ValueError: The checkpoint was measured otherwise.
    """

    filename: str

    def __init__(self) -> None:
        super().__init__()
        self.measurements: list[dict] = []
        self._seconds, self._start = 0.0, 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """What figures depend on; with others they would not compare."""
        return {}

    @property
    def record(self) -> dict[str, Any]:
        """All that the file has, as plain lists and numbers."""
        return {**self.settings, "measurements": self.measurements}

    def save(self, trainer: Trainer) -> None:
        """Replaces the file; all ranks must ask."""
        folder = trainer.log_dir  # a broadcast
        if trainer.is_global_zero and folder is not None and not trainer.fast_dev_run:
            text = json.dumps({"version": VERSION, **self.record}, indent=2) + "\n"
            replace_text(Path(folder) / self.filename, text)

    # -- over a resume -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The record, beside what else is kept."""
        return {**super().state_dict(), **self.record}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the record of a checkpoint."""
        super().load_state_dict(state_dict)
        self._check_settings(state_dict)
        self.measurements = list(state_dict["measurements"])

    def check_resume(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any], path: str | Path
    ) -> None:
        """Refuses one that was measured otherwise."""
        super().check_resume(trainer, pl_module, checkpoint, path)
        if (state := checkpoint["callbacks"].get(self.state_key)) is not None:
            self._check_settings(state)

    def _check_settings(self, state: Mapping[str, Any]) -> None:
        for name, now in self.settings.items():
            if (before := state[name]) != now:
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint was measured with {name}={before!r}, now it is {now!r}, "
                    "and its figures would not compare; restore it, or begin a new run"
                )

    # -- what it costs -----------------------------------------------------------------------------------------------

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The time within is spent on measuring."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        super().on_train_start(trainer, pl_module)
        self._seconds, self._start = 0.0, time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says how much was measured, and what that cost."""
        share = self._seconds / (time.perf_counter() - self._start)
        name = type(self).__name__
        found = f"{len(self.measurements)} measurements in {self.filename}"
        rank_zero_info(f"{name}: {found}, {self._seconds:.1f} s, {share:.1%} of the time of training and evaluation")
