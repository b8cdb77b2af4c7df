"""What a study is about to run, parsed before any of it runs: an option that does not exist is no night's work lost."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from cpt_lightning.cli import VERBS
from cpt_lightning.cli.study.arms import Run
from cpt_lightning.cli.study.runner import commands_left

TRAINER_VERBS = ("fit", "validate", "test", "predict")

_ERROR = re.compile(r"^(?:cpt[^\n]*: )?error: ", re.MULTILINE)


def check_commands(path: Path, runs: Sequence[Run]) -> None:
    """Parses what arms have still to run; of each arm what its first seed runs.

    It takes 0.4 s a command, and once 3 s for what parses. Verbs other than those of the Trainer are left to their
    turn, and so is a command with a file of options that an earlier run writes.

    Args:
        path: The study's file.
        runs: Its runs.

    Raises:
        ValueError: A command that would not begin; the message names the arm and has the parser's own words.
    """
    first = {run.arm: run for run in reversed(runs) if commands_left(run)}
    folders = [run.folder for run in runs]
    for run in reversed(first.values()):
        for command in commands_left(run):
            verb = command[0]
            if verb not in VERBS:
                raise ValueError(f"{path}: arm {run.arm}: unknown verb {verb!r}; there are {', '.join(VERBS)}")
            if verb in TRAINER_VERBS and not _waits(command, folders) and (said := _complaint(command)):
                raise ValueError(f"{path}: arm {run.arm} could not begin, so nothing is run: cpt {verb}: {said}")


def _waits(command: Sequence[str], folders: Sequence[Path]) -> bool:
    """Whether a command names a file of options that is not there yet, in the folder of a run."""
    paths = (Path(word.rpartition("=")[2]) for word in command if word.endswith((".yaml", ".yml", ".json")))
    return any(path.is_relative_to(folder) and not path.exists() for path in paths for folder in folders)


def _complaint(command: Sequence[str]) -> str | None:
    """Why a command of the Trainer would not begin, in its parser's words; ``None`` if nothing is wrong with it."""
    from cpt_lightning.cli.lightning_cli import CPTCLI  # which takes seconds, if there is something to run

    class Parsed(CPTCLI):
        """Makes and runs nothing."""

        def _set_seed(self) -> None: ...

        def before_instantiate_classes(self) -> None: ...

        def instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        try:
            Parsed(list(command))
        except SystemExit as stop:
            if stop.code:
                return _ERROR.split(said.getvalue())[-1].strip()
    return None
