"""What a person at the console sees of messages and warnings: each once, and none of which nothing can be made."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

PACKAGE = str(Path(__file__).parents[1])

NOISE = (
    "Seed set to",  # lightning 2.6; config.yaml has the seed, and the line of the model the device
    "[rank: 0] Seed set to",  # where a launcher says which rank it is
    "GPU available: ",
    "TPU available: ",
    "💡 Tip: ",
    "`Trainer(limit_val_batches=",  # who limits batches knows it
    "`Trainer.fit` stopped: `max_epochs=",
    "Restoring states from the checkpoint path",  # and again when it is done
    "Initializing distributed: ",
    "-----",  # around the number of processes, which the line of the model has
    "Detected out of order event.step likely",  # tensorboard 2.21, of a run that went back to an earlier checkpoint
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes 0.50, imported by peft whether used or not
)
"""How messages of libraries begin that tell nothing which a person could use."""

LIBRARY_NOISE = (
    "`isinstance.treespec, LeafSpec.` is deprecated",  # lightning 2.6 and torch
    "TypedStorage is deprecated",  # torch 2.9 and 2.10, which write shards with it
    "Be aware that when using `ckpt_path`, callbacks used to create",  # there is nothing to lose in test and predict
    "It is recommended to use `self.log.*sync_dist=True",  # our metrics are reduced before
    "The number of training batches .* is smaller than the logging interval",
    "The `srun` command is available on your system but is not used",  # cli/launched.py says where it is needed
    "The '.*dataloader' does not have many workers",  # whole batches are loaded ahead; data.num_workers says how many
)
"""Warnings of libraries about libraries, and advice that does not fit this program."""

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def tidy() -> None:
    """Has messages and warnings shown as described above.

    To be called before libraries are imported, for what they look at then, and after Lightning (2.6) has been, which
    brings handlers of its own.
    """
    if not sys.stderr.isatty():
        for library in ("HF_HUB", "HF_DATASETS"):  # transformers asks the first one too
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True
    root = logging.getLogger()
    if not any(isinstance(handler, Messages) for handler in root.handlers):
        root.addHandler(Messages())
    for message in LIBRARY_NOISE:
        warnings.filterwarnings("ignore", message)
    warnings.showwarning = Warnings()


class Messages(logging.Handler):
    """Prints messages to standard error, past a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a message, unless it is noise, or another process than the first has no trouble either."""
        message = record.getMessage()
        if not message.startswith(NOISE) and (rank() == 0 or record.levelno >= logging.ERROR):
            say(message)


class Warnings:
    """Prints every warning once, from the first process only, in a line.

    Python's own registry of what was shown is cleared by every ``catch_warnings``, of which torch makes many. Of a
    library a line of its code warns once, for texts differ by numbers that do not matter.
    """

    def __init__(self) -> None:
        self._shown: set[tuple[str, ...]] = set()

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Takes the place of :func:`warnings.showwarning`."""
        is_ours = filename.startswith(PACKAGE)
        key = (str(message),) if is_ours else (category.__name__, filename, str(lineno))
        if key in self._shown or rank() > 0:
            return
        self._shown.add(key)
        source = "" if is_ours else f" ({Path(filename).name}:{lineno}, {category.__name__})"
        say(f"warning: {message}{source}", file)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line to standard error, by default; a progress bar makes room for it."""
    with tqdm.external_write_mode(file=file or sys.stderr):
        print(text, file=file or sys.stderr, flush=True)


def rank() -> int:
    """Number of this process among those of a run, as whoever began it says."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)
