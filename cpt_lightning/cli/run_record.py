"""What a run is: its configuration, and with what it was made, in its folder and in its loggers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.callbacks.display.loggers import log_hparams, log_text, logged_step, mark_running
from cpt_lightning.cli.hparams import METRICS, NUMBERS, TEXTS, hparams_of
from cpt_lightning.records import RunFolder
from cpt_lightning.records.environment import Device, Start, cpu_name, record_start, surroundings
from cpt_lightning.records.run import OLDER_CONFIG
from cpt_lightning.report.settings import leaves

LEARNED_BY = (
    "model.", "data.", "filter.", "continual.", "seed_everything", "trainer.precision", "trainer.accumulate",
    "trainer.callbacks",
)  # fmt: skip
"""Options that what is learned depends on, or their beginnings."""
KEPT = ("model.init_args.optimizer", "model.init_args.lr_scheduler")
"""Those that are a checkpoint's where a task does not begin with a fresh optimizer."""


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml`` and ``environment.json``, and shows both, with the options that matter, in the loggers.

    The configuration does not say from where the run was resumed: used again, it begins a new run. The environment
    does, and has an entry for each start. A run that goes on with other options says which, and keeps those that it had
    as ``config_until_step_<step>.yaml``. Options of an optimizer or schedule that tasks keep would have no effect, and
    are refused.

    Args:
        parser: That made the configuration.
        config: The resolved configuration.
        arguments: What was typed after ``cpt``.
        **kwargs: Options of Lightning's callback.

    Raises:
        ValueError: With ``continual.reset_optimizer=false``, another optimizer or schedule than the run had.
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
        known = self.resumed_from is not None and (self.folder / self.config_filename).exists()
        self.goes_on = trainer.strategy.broadcast(known)
        self.save_to_log_dir = not self.goes_on  # as long as it learns nothing, what it was told does not matter
        if self.goes_on and not self.config.continual.reset_optimizer:
            changed = self._changed(*self._options()) if trainer.is_global_zero else []
            _check_kept(trainer.strategy.broadcast(changed))
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the environment beside the configuration."""
        self.start = self._start(trainer)
        record_start(self.folder, self.start)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows both; at the step at which a resumed run goes on."""
        if not trainer.is_global_zero:
            return
        if self.goes_on:
            self._renew(logged_step(trainer))
        config = (self.folder / self.config_filename).read_text(encoding="utf-8")
        step = logged_step(trainer)
        mark_running(trainer)
        log_text(trainer, "config", f"```yaml\n{config}\n```", step)
        log_text(trainer, "environment", _table(self.start), step)
        log_hparams(trainer, hparams_of(self.config), list(NUMBERS), list(TEXTS), METRICS)

    def _renew(self, step: int) -> None:
        """Replaces the configuration of a run that goes on, if it is told something else."""
        path = self.folder / self.config_filename
        before, now = self._options()
        changed = self._changed(before, now)
        kept = path.with_name(OLDER_CONFIG.format(step))
        if changed:
            path.rename(kept)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
        if not changed:
            return
        rank_zero_info(
            "note: the run goes on with other options than it had; comparisons will take them for those of all of it: "
            + "; ".join(_differences(before, now, changed))
            + f". Within a task optimizer and schedule stay those of the checkpoint. Before: {kept}"
        )

    def _options(self) -> tuple[dict[str, str], dict[str, str]]:
        """By name, those that the run had, and those that it has now."""
        now = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return dict(leaves(RunFolder(self.folder).config or {})), dict(leaves(now))

    @staticmethod
    def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
        names = [*now, *(name for name in before if name not in now)]
        return [name for name in names if now.get(name) != before.get(name) and name.startswith(LEARNED_BY)]

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


def _check_kept(changed: Iterable[str]) -> None:
    if lost := [name for name in changed if name.startswith(KEPT)]:
        raise ValueError(
            f"{lost[0]} differs from what the run had, which has no effect with continual.reset_optimizer=false: the "
            "optimizer and the schedule go on as the checkpoint has them. Restore it, or let the next task begin with "
            "fresh ones (continual.reset_optimizer=true)"
        )


def _differences(before: Mapping[str, str], now: Mapping[str, str], changed: Iterable[str]) -> list[str]:
    """What became of options, by name; a task or probe that was added, or is gone, is one of them.

    >>> _differences({"data.tasks.a.num": "1"}, {"data.tasks.a.num": "2", "data.tasks.b.num": "1"},
    ...              ["data.tasks.a.num", "data.tasks.b.num"])
    ['data.tasks.a.num 1 -> 2', 'data.tasks.b is new']
    >>> _differences({"trainer.callbacks[0].class_path": "cpt_lightning.callbacks.EWC"}, {"trainer.callbacks": "null"},
    ...              ["trainer.callbacks", "trainer.callbacks[0].class_path"])
    ['trainer.callbacks EWC -> none']

    Options that one class has and the other has not are not named beside them.

    >>> _differences({"model.class_path": "SFT", "model.init_args.lr": "1"},
    ...              {"model.class_path": "RFT", "model.init_args.lr": "2", "model.init_args.clip_low": "null"},
    ...              ["model.class_path", "model.init_args.lr", "model.init_args.clip_low"])
    ['model.class_path SFT -> RFT', 'model.init_args.lr 1 -> 2']
    """
    known, left = ({_owner(name) for name in options} for options in (before, now))
    callbacks = [_callbacks(options) for options in (before, now)]
    said = (
        f"trainer.callbacks {callbacks[0]} -> {callbacks[1]}"
        if name.startswith("trainer.callbacks") and callbacks[0] != callbacks[1]
        else f"{_owner(name)} is new" if _owner(name) not in known
        else f"{_owner(name)} is gone" if _owner(name) not in left
        else " ".join([name, before.get(name, "none") or "''", "->", now.get(name, "none") or "''"])
        for name in changed
        if not any(other.startswith((f"{name}.", f"{name}[")) for other in (*before, *now))  # it was, or is now, empty
        and not _is_of_a_class(name, before, now)
    )  # fmt: skip
    return list(dict.fromkeys(said))


def _is_of_a_class(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether an option is one of a class that is new or gone, and the other class has none of that name."""
    parts = name.split(".init_args.")
    paths = (".init_args.".join(parts[:depth]) + ".class_path" for depth in range(1, len(parts)))
    return (name in before) != (name in now) and any(path in now and now[path] != before.get(path) for path in paths)


def _owner(option: str) -> str:
    """``data.tasks.<task>`` or ``data.probes.<probe>``, if it is an option of one; else what the option begins with."""
    parts = option.split(".")
    return ".".join(parts[:3]) if parts[:2] in (["data", "tasks"], ["data", "probes"]) else parts[0]


def _callbacks(options: Mapping[str, str]) -> str:
    """Names of the classes of callbacks."""
    paths = (value for name, value in options.items() if re.fullmatch(r"trainer\.callbacks\[\d+\]\.class_path", name))
    return ", ".join(path.rpartition(".")[2] for path in paths) or "none"


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
