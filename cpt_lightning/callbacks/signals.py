"""Signals that ask a run to stop: noted at once, obeyed between batches, where the run can go on from."""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType

from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


class Stopped(SystemExit):
    """Ends a run that was asked to stop."""


class StopSignals:
    """Notes Ctrl-C, SIGTERM, and the signal of SLURM when the time is nearly up (``#SBATCH --signal=SIGUSR1@90``).

    Lightning's handlers (2.6) save and talk to other ranks within the handler, so perhaps in the middle of an update;
    these only take a note, and ranks agree on it between batches.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._saves = False

    def watch(self, trainer: Trainer) -> None:
        """Takes the place of Lightning's handlers, until its Trainer puts back what was there before."""
        self._saves = trainer.state.fn == TrainerFn.FITTING
        signals = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
            signals.append(signal.SIGINT)
        if (warning := _warning_of_slurm(trainer)) is not None:
            signals.append(warning)
        for number in signals:
            trainer._signal_connector._register_signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            to_save = ", to save it" if self._saves else ""
            rank_zero_info(f"stopping after this batch{to_save}; press Ctrl-C again to stop at once")
        self.received = number

    def asked_to_stop(self, trainer: Trainer) -> bool:
        """Whether any rank was; all must ask."""
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def stop(self, trainer: Trainer, how_to_go_on: str) -> None:
        """Ends the run, and has SLURM start it anew if its time was up.

        Raises:
            Stopped: Always.
        """
        number = self.received or signal.SIGTERM
        rank_zero_info(f"stopped by {signal.Signals(number).name}; {how_to_go_on}")
        if self.received not in (None, signal.SIGTERM, signal.SIGINT) and trainer.is_global_zero:
            requeue()
        # A rank that Lightning started and that ends with an error would have the first one killed.
        raise Stopped(128 + number if trainer.is_global_zero else 0)


def _warning_of_slurm(trainer: Trainer) -> signal.Signals | None:
    """The signal that says that the time of the job is nearly up, whoever began the processes in it."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        return environment.requeue_signal if environment.auto_requeue else None
    return signal.SIGUSR1 if "SLURM_JOB_ID" in os.environ else None


def requeue() -> None:
    """Asks SLURM to run the job again from the beginning of its script."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"SLURM did not requeue job {job} ({error}); submit it again")
