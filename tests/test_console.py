"""What a person sees of a run, at a terminal and in a file: every line of two short runs is read."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path

import pytest

from cpt_lightning.cli.console import Messages, Warnings, say

COLUMNS = 100
CONFIG = """
run_dir: RUN
model:
  class_path: cpt_lightning.modules.MODULE
  init_args: {evaluation: {max_new_tokens: 8, temperature: 0}}
data:
  tasks:
    word2: &toy
      source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: word2}}
      num_train: 4
      num_test: 3
    digit2: {<<: *toy, source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: digit2}}}
  probes:
    facts: {<<: *toy, source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: facts}}}
  prompts_per_step: 2
  steps: 2
trainer: {accelerator: cpu}
"""
RFT = """
model: {init_args: {group_size: 2, sampling: {max_new_tokens: 8}}}
filter: {mode: solvable, completions_per_row: 2, lowest: 0}
"""
NOISE = ("Tip", "TPU", "GPU available", "FLOPs", "Seed set", "train mode", "gemm_4bit", "Epoch", "DataLoader")


def command(folder: Path, module: str, overlay: str = "") -> list[str]:
    text = CONFIG.replace("RUN", str(folder / "run")).replace("MODULE", module)
    (folder / "config.yaml").write_text(text)
    (folder / "overlay.yaml").write_text(overlay or "{}")
    configs = ["-c", str(folder / "config.yaml"), "-c", str(folder / "overlay.yaml")]
    return [sys.executable, "-m", "cpt_lightning", "fit", *configs]


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> list[str]:
    """The lines that stand on a terminal after a run of RFT with a filter."""
    folder = tmp_path_factory.mktemp("terminal")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS)}
    run = subprocess.Popen(
        command(folder, "RFT", RFT), stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=os.getcwd()
    )
    os.close(theirs)
    written = b""
    while part := _read(ours):
        written += part
    os.close(ours)
    assert run.wait() == 0, written.decode()
    return lines_on_screen(written.decode())


def _read(file: int) -> bytes:
    try:
        return os.read(file, 65536)
    except OSError:  # all who wrote there have ended
        return b""


def lines_on_screen(text: str, width: int = COLUMNS) -> list[str]:
    """What a terminal shows: carriage returns overwrite, the cursor goes up, colours are not kept."""
    text = re.sub(r"\x1b\[[0-9;?]*[^A0-9;?]", "", text)
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*A|.|\n", text):
        if part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\r":
            column = 0
        else:
            if part == "\n" or column >= width:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            if part != "\n":
                line = lines[row].ljust(column)
                lines[row], column = line[:column] + part + line[column + 1 :], column + 1
    return [line.rstrip() for line in lines]


def test_the_reader_of_the_screen_reads_as_a_terminal_shows():
    assert lines_on_screen("ab\rc\nlong\x1b[1m er\x1b[0m\n\x1b[Ax", width=6) == ["cb", "long e", "x", ""]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> str:
    """What a run of SFT writes where there is no terminal."""
    folder = tmp_path_factory.mktemp("file")
    run = subprocess.run(
        command(folder, "SFT"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


def test_a_bar_stands_alone_in_its_line_and_names_what_is_done(screen):
    bars = [line for line in screen if "%|" in line]
    assert all(line.count("%|") == 1 for line in bars)
    bars = [line for line in bars if not line.startswith("Loading weights")]  # of transformers
    first = ["filtering word2", "task 1/2 word2", "evaluated"]
    second = ["filtering digit2", "task 2/2 digit2", "evaluated"]
    assert [re.split(r" +\d+%", line)[0] for line in bars] == ["evaluated", *first, *second]
    assert [line for line in bars if not re.search(r"\d+/\d+ \w+, [\d.]+ rows/s, took \d:\d\d", line)] == []
    assert sum("reward" in line for line in bars) == 2
    assert sum("solvable" in line for line in bars) == 2


def test_a_message_does_not_stand_behind_a_bar(screen):
    assert sum(line.startswith("One step: 2 prompts x 2 completions") for line in screen) == 1
    assert sum("One step" in line for line in screen) == 1


@pytest.mark.parametrize("where", ["screen", "log"])
def test_nothing_is_said_of_which_nothing_can_be_made(where, request):
    shown = request.getfixturevalue(where)
    text = shown if isinstance(shown, str) else "\n".join(shown)
    assert [noise for noise in NOISE if noise in text] == []
    assert "warning" not in text.lower()


@pytest.mark.parametrize("where", ["screen", "log"])
def test_a_run_begins_with_its_folder_and_ends_with_what_it_came_to_and_what_to_type_next(where, request):
    shown = request.getfixturevalue(where)
    lines = [line for line in (shown.splitlines() if isinstance(shown, str) else shown) if line]
    folder = lines[0].removeprefix("run directory: ")
    assert folder.endswith("/run")
    text = "".join(lines)  # a narrow terminal breaks long commands
    for command in (f"tensorboard --logdir {folder}", f"cpt export {folder}", f"--ckpt_path {folder}/last.ckpt"):
        assert command in text
    assert "learned and lost" in text and re.search(r"8 rows\b.* in all; this command took \d:\d\d", text)
    assert ("32 rollouts" in text) == (where == "screen")  # 8 rows x 2 learned from, 4 rows x 2 of two tasks judged
    assert text.count("3.0 of 3.0 million parameters are trained") == 1


def test_a_log_is_plain_and_short(log):
    assert [character for character in "\r\x1b\b" if character in log] == []
    lines = [line for line in log.splitlines() if line.strip() and line[0] not in "┏┃┡│├└ "]
    assert len(lines) < 20, lines
    assert "task 1/2 word2: 2/2 steps" in log and "evaluated: 3/3 batches" in log and "loss" in log
    told = [line for line in lines if not line.startswith("evaluated")]
    assert len(set(told)) == len(told), "something is said twice"


# -- warnings and messages -----------------------------------------------------------------------------------------


def warn(shown: Warnings, text: str, filename: str = "/site-packages/library/code.py", line: int = 7) -> None:
    shown(UserWarning(text), UserWarning, filename, line)


def test_a_library_warns_once_whatever_its_numbers_and_we_once_for_each_text(capsys):
    shown = Warnings()
    for number in range(1000):
        warn(shown, f"row {number} is odd")
    ours = str(Path(__file__).parents[1] / "cpt_lightning" / "data" / "checks.py")
    for task in ("word2", "word2", "digit2"):
        warn(shown, f"task {task} is small", ours)
    assert capsys.readouterr().err.splitlines() == [
        "warning: row 0 is odd (code.py:7, UserWarning)",
        "warning: task word2 is small",
        "warning: task digit2 is small",
    ]


def test_python_forgets_what_it_warned_of_and_we_do_not(monkeypatch, capsys):
    """``catch_warnings`` clears the registry by which Python itself would warn once."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(warnings, "showwarning", Warnings())
        for _ in range(3):
            with warnings.catch_warnings():
                warnings.warn("again", stacklevel=1)
    assert capsys.readouterr().err.count("again") == 1


def test_other_processes_than_the_first_leave_it_to_that_one(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    warn(Warnings(), "everywhere")
    for level in (logging.WARNING, logging.ERROR):
        Messages().emit(logging.LogRecord("library", level, "", 0, f"level {level}", None, None))
    assert capsys.readouterr().err == f"level {logging.ERROR}\n"


def test_noise_is_dropped_and_messages_are_printed_as_they_are(capsys):
    for text in ("GPU available: False, used: False", "run directory: runs/demo"):
        Messages().emit(logging.LogRecord("library", logging.INFO, "", 0, text, None, None))
    say("and this")
    assert capsys.readouterr().err == "run directory: runs/demo\nand this\n"


@pytest.mark.parametrize(
    "message, is_shown",
    [
        ("Detected out of order event.step likely caused by a TensorFlow restart. Purging 70 scalars", False),
        ("filter: runs/a/filter/word2.jsonl: 3 of 4 rows are kept", True),
    ],
)
def test_what_tensorboard_says_of_a_run_that_went_back_is_not_shown(message, is_shown, capsys):
    """Its reader takes it for a mishap; a run that goes on from an earlier checkpoint means it."""
    Messages().emit(logging.makeLogRecord({"msg": message, "levelno": logging.WARNING}))
    assert (message in capsys.readouterr().err) == is_shown
