"""What a run is: its configuration, and with what it was made, in its folder and in its loggers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from cpt_lightning.callbacks.loggers import log_hparams, log_text, logged_step
from cpt_lightning.cli.hparams import METRICS, NUMBERS, TEXTS, hparams_of
from cpt_lightning.records.environment import Device, Start, cpu_name, record_start, surroundings


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml`` and ``environment.json``, and shows both, with the options that matter, in the loggers.

    The configuration does not say from where the run was resumed: used again, it begins a new run. The environment
    does, and has an entry for each start.

    Args:
        parser: That made the configuration.
        config: The resolved configuration.
        arguments: What was typed after ``cpt``.
        **kwargs: Options of Lightning's callback.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, arguments: list[str], **kwargs: Any) -> None:
        self.command = shlex.join(["cpt", *arguments])
        self.resumed_from = config.ckpt_path
        config = config.clone()
        config.ckpt_path = None
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes both, once, on rank 0."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is a broadcast: all ranks must ask
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the environment beside the configuration."""
        self.start = self._start(trainer)
        record_start(self.folder, self.start)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows both; at the step at which a resumed run goes on."""
        if not trainer.is_global_zero:
            return
        config = (self.folder / self.config_filename).read_text(encoding="utf-8")
        step = logged_step(trainer)
        log_text(trainer, "config", f"```yaml\n{config}\n```", step)
        log_text(trainer, "environment", _table(self.start), step)
        log_hparams(trainer, hparams_of(self.config), list(NUMBERS), list(TEXTS), METRICS)

    def _start(self, trainer: Trainer) -> Start:
        return Start(
            command=self.command,
            resumed_from=self.resumed_from and str(self.resumed_from),
            seed=self.config.seed_everything,
            device=_device(trainer),
            strategy=type(trainer.strategy).__name__,
            precision=str(trainer.precision),
            num_nodes=trainer.num_nodes,
            world_size=trainer.world_size,
            **surroundings(),
        )


def _device(trainer: Trainer) -> Device:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return Device(kind=device.type, name=name, count=trainer.num_devices)


def _table(start: Start) -> str:
    """As Markdown, nested parts in their own rows."""
    rows: list[tuple[str, Any]] = []
    for name, value in start.items():
        rows += (
            [(f"{name} {part}", each) for part, each in value.items()] if isinstance(value, dict) else [(name, value)]
        )
    lines = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows)
    return "\n".join(["| | |", "|---|---|", *lines])
