"""Runs of a study, as processes of their own: several at a time, finished ones skipped, broken ones gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

from rich.console import Console

from cpt_lightning.cli.study.arms import Run
from cpt_lightning.records.files import replace_text
from cpt_lightning.records.run import STUDY

DONE = STUDY
"""In the folder of a run: those of its commands that have come to their end, and the seconds they took, but not
what attempts took that were broken off."""
STOPPED = {status for number in (signal.SIGINT, signal.SIGTERM) for status in (128 + number, -number)}
"""Statuses of a run that was asked to end, and can be gone on with; the negative ones of what the signal itself ended,
as whatever is still at its imports, or catches none."""
LOG = "study.log"
"""What the commands printed."""

_COMPLAINT = re.compile(r"\b\w*[eE]rror: ")


class Runner:
    """Runs what is not finished yet, each run after those that it needs.

    Args:
        jobs: Runs at a time.
        gpus: One of them for each job; without them a run sees what there is, and a CPU gives each job its threads.
    """

    def __init__(self, jobs: int = 1, gpus: Sequence[str] = ()) -> None:
        self.jobs = jobs
        self.gpus: SimpleQueue[str] = SimpleQueue()
        for number in range(jobs):
            self.gpus.put(gpus[number % len(gpus)] if gpus else "")
        self.console = Console(soft_wrap=True, highlight=False, markup=False)
        self.processes: set[subprocess.Popen] = set()
        self.is_stopped = False

    def __call__(self, runs: Sequence[Run]) -> list[Run]:
        """Runs them; gives those that failed, or could not begin because another had failed.

        Raises:
            ValueError: A finished run was made by other commands than the study has now.
        """
        waiting = [run for run in runs if not is_finished(run)]
        self.console.print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished already, {self.jobs} at a time")
        lost: list[Run] = []
        with self._minding_signals(), ThreadPoolExecutor(self.jobs) as pool:
            running: dict[Future[bool], Run] = {}
            while waiting or running:
                lost += [run for run in waiting if _needed(run, lost)]
                waiting = [run for run in waiting if run not in lost]
                pending = [*waiting, *running.values()]
                ready = [run for run in waiting if not _needed(run, pending)]
                for run in ready[: self.jobs - len(running)]:
                    waiting.remove(run)
                    running[pool.submit(self.run, run)] = run
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    if not future.result():
                        lost.append(run)
        return lost

    def run(self, run: Run) -> bool:
        """One run, to its end; whether it got there."""
        self.console.print(f"{run.name}: begins, {run.folder / LOG}")
        run.folder.mkdir(parents=True, exist_ok=True)
        done, seconds = _done(run)
        gpu = self.gpus.get()
        try:
            for number, command in list(enumerate(run.commands, start=1))[done:]:
                start = time.perf_counter()
                if status := self._execute(command, run.folder / LOG, gpu):
                    what = "stopped by a signal" if status in STOPPED else f"failed with {status}"
                    self.console.print(f"{run.name}: {what}; see {run.folder / LOG}", style="red")
                    if status not in STOPPED and (complaint := last_complaint(run.folder / LOG)):
                        self.console.print(f"  {complaint}")
                    return False
                seconds += time.perf_counter() - start
                record = {"commands": run.commands[:number], "seconds": seconds}
                replace_text(run.folder / DONE, json.dumps(record, indent=2) + "\n")
        finally:
            self.gpus.put(gpu)
        self.console.print(f"{run.name}: {seconds:.0f} s")
        return True

    def _execute(self, command: Sequence[str], log: Path, gpu: str) -> int:
        if self.is_stopped:
            return 128 + signal.SIGTERM
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ cpt {' '.join(command)}\n")
            file.flush()
            whole = [sys.executable, "-m", "cpt_lightning", *command]
            with subprocess.Popen(whole, env=environment, stdout=file, stderr=subprocess.STDOUT) as process:
                self.processes.add(process)
                status = process.wait()
            self.processes.remove(process)
            return status

    @contextmanager
    def _minding_signals(self) -> Iterator[None]:
        """SIGTERM ends the runs too, which save what they learned; Ctrl-C reaches them by itself."""
        before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._stop)}
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
            before[signal.SIGINT] = signal.signal(signal.SIGINT, self._stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.is_stopped = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        for process in list(self.processes):  # other threads add theirs
            process.send_signal(number)
        raise SystemExit(128 + number)


def is_finished(run: Run) -> bool:
    """Whether a run need not be run.

    Raises:
        ValueError: It was made by other commands.
    """
    return not commands_left(run)


def commands_left(run: Run) -> tuple[tuple[str, ...], ...]:
    """Those of its commands that have not come to their end.

    Raises:
        ValueError: It was made by other commands.
    """
    return run.commands[_done(run)[0] :]


def last_complaint(log: Path) -> str | None:
    """The last line of a log that speaks of an error, if there is one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if _COMPLAINT.search(line)), None)


def why_lost(run: Run, lost: Sequence[Run]) -> str:
    """Why one of the lost runs is among them, for people."""
    if before := _needed(run, lost):
        return f"not begun, for it needs {before[0].name}"
    return f"failed or was stopped, see {run.folder / LOG}"


def _done(run: Run) -> tuple[int, float]:
    """How many commands have come to their end, and the seconds they took."""
    path = run.folder / DONE
    if not path.exists():
        return 0, 0.0
    record = json.loads(path.read_text(encoding="utf-8"))
    done = [tuple(command) for command in record["commands"]]
    if done != list(run.commands[: len(done)]):
        raise ValueError(
            f"{path}: {run.name} was made by other commands than the study has now; remove {run.folder} to run it "
            "anew, or give the study another `out`"
        )
    return len(done), record["seconds"]


def _needed(run: Run, others: Sequence[Run]) -> list[Run]:
    """Those of the others that a run needs."""
    return [other for other in others if other.seed == run.seed and other.arm in run.needs]
