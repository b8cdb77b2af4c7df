"""The meter, at a terminal that is none and on a clock that is set by hand."""

import io
from types import SimpleNamespace

import pytest

from cpt_lightning.callbacks.display import meter as module
from cpt_lightning.callbacks.display.meter import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, in a list; the first entry counts."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    shown = Terminal()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setattr(module, "sys", SimpleNamespace(stdout=shown))  # pytest sets sys.stdout itself after a fixture
    return shown


def test_pace_and_time_left(clock):
    """3 of 10 steps of 16 rows in 12 s: 4 rows a second, 4 s a step, so 28 s are left; a resumed one begins anew."""
    meter = Meter("task 1/2 a", total=10, unit="steps", is_shown=False)
    assert meter.text() == "0/10 steps"
    clock[0] += 12
    for _ in range(3):
        meter.advance(1, rows=16, said="loss 0.5")
    assert meter.text() == "3/10 steps, 4.0 rows/s, 0:28 left, loss 0.5"
    resumed = Meter("task 1/2 a", total=10, unit="steps", num_done=6, is_shown=False)
    clock[0] += 8
    resumed.advance(2, rows=32)
    assert resumed.text() == "8/10 steps, 4.0 rows/s, 0:08 left"
    resumed.advance(2, rows=32)
    assert resumed.text() == "10/10 steps, 8.0 rows/s, took 0:08"


def test_a_line_a_minute_where_there_is_no_terminal(clock, capsys):
    """90 batches of two seconds: after 62 and 124 s, and one at the end."""
    with Meter("evaluating", total=90, unit="batches") as meter:
        for number in range(90):
            clock[0] += 2
            meter.advance(1, rows=4, name=f"evaluating {'a' if number < 45 else 'b'}")
            meter.show_phase("rollout")  # for a person at a terminal
    assert capsys.readouterr().out.splitlines() == [
        "evaluating a: 31/90 batches, 2.0 rows/s, 1:58 left",
        "evaluating b: 62/90 batches, 2.0 rows/s, 0:56 left",
        "evaluating b: 90/90 batches, 2.0 rows/s, took 3:00",
    ]


def test_a_bar_at_a_terminal_shows_the_phase_of_a_long_step_and_leaves_a_line(clock, terminal):
    meter = Meter("task 1/2 a", total=2, unit="steps")
    for token in range(4):  # a look every half a second
        clock[0] += 0.4
        meter.show_phase(f"rollout 1-8/8: {token}/64 tokens")
    shown = terminal.getvalue()
    assert [token for token in range(4) if f" {token}/64 tokens" in shown] == [1, 3]
    clock[0] += 8.4
    meter.advance(1, rows=8, said="reward 0.25")
    meter.advance(1, rows=8, said="reward 0.5")
    meter.close("done")
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("done 100%|") and last.rstrip(" \n").endswith(
        "| 2/2 steps, 1.6 rows/s, took 0:10, reward 0.5"
    )
    assert last.endswith("\n") and terminal.getvalue().count("\n") == 1


def test_a_meter_that_is_not_shown_or_did_nothing_says_nothing(clock, capsys, terminal):
    meter = Meter("a", total=2, unit="steps", is_shown=False)
    meter.advance(1, rows=1)
    meter.close()
    assert terminal.getvalue() == ""


def test_nothing_done_is_no_line(capsys):
    Meter("a", total=2, unit="steps").close()
    assert capsys.readouterr().out == ""
