"""What a person watching the run sees."""

import logging

import pytest

from cpt_lightning.callbacks import SkippedRows, TaskProgressBar
from cpt_lightning.tasks import Row, Task
from tests.fakes import KillAt, Killed, LinearModule, NumberSource, make_trainer, number_stream


class MixedLengths(NumberSource):
    """Every third question is long."""

    def split(self, split):
        return [
            Row(row.row_id, row.question + " and so on" * (number % 3 == 0), row.answer)
            for number, row in enumerate(super().split(split))
        ]


class Watched(SkippedRows):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        self.logged.append(trainer.callback_metrics.get("train/skipped_rows"))


def test_lines_name_the_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cpt_lightning.callbacks.display.meter.LINE_EVERY_S", 0.0)
    stream = number_stream()
    trainer = make_trainer(tmp_path, stream, callbacks=[TaskProgressBar()], enable_progress_bar=True)
    module = LinearModule()
    trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    trainer.test(module, stream, verbose=False)
    shown = capsys.readouterr().out
    for text in ("task 1/3 a", "task 3/3 c", "evaluating p", "testing b"):
        assert text in shown


def test_a_log_file_stays_short(tmp_path, capsys):
    """Not at a terminal there is a line at the end of each piece of work, and none before a minute is over."""
    stream = number_stream(steps=60)
    trainer = make_trainer(tmp_path, stream, callbacks=[TaskProgressBar()], enable_progress_bar=True)
    with pytest.warns(UserWarning, match="not evaluated"):
        trainer.fit(LinearModule(), stream)
    shown = capsys.readouterr().out
    assert [line.split(",")[0] for line in shown.splitlines()] == [
        line for task in ("1/3 a", "2/3 b", "3/3 c") for line in (f"task {task}: 60/60 steps", "evaluated: 8/8 batches")
    ]
    assert not {"\r", "\x1b"} & set(shown)


def test_an_evaluation_within_a_task_ends_the_bar_and_the_next_goes_on(tmp_path, capsys):
    """Every third of six batches, the last of which is the task's end; so no bar is ever inside another's line."""
    stream = number_stream(tasks={"a": Task(NumberSource("a"))}, steps=6)
    options = {"callbacks": [TaskProgressBar()], "enable_progress_bar": True, "val_check_interval": 3}
    trainer = make_trainer(tmp_path, stream, **options)
    with pytest.warns(UserWarning, match="not evaluated"):
        trainer.fit(LinearModule(), stream)
    shown = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == [line for done in (3, 6) for line in (f"task 1/1 a: {done}/6 steps", "evaluated: 4/4 batches")]


def test_a_run_that_breaks_off_leaves_its_bar_behind(tmp_path, capsys):
    stream = number_stream(steps=4)
    options = {"callbacks": [TaskProgressBar(), KillAt(0, batch=2)], "enable_progress_bar": True}
    trainer = make_trainer(tmp_path, stream, **options)
    with pytest.warns(UserWarning, match="not evaluated"), pytest.raises(Killed):
        trainer.fit(LinearModule(), stream)
    assert capsys.readouterr().out.startswith("task 1/3 a: 2/4 steps")


def test_skipped_rows_are_counted_logged_and_said(tmp_path, caplog):
    """Rows 0, 3, 6, 9 of 10 are over-long; a pass of 10 rows in batches of 5 skips all four."""
    stream = number_stream(
        tasks={"a": Task(MixedLengths("a"))}, prompts_per_step=5, max_prompt_tokens=2, eval_prompts_per_step=5
    )
    watched, module = Watched(), LinearModule()
    trainer = make_trainer(tmp_path, stream, callbacks=[watched])
    trainer.validate(module, stream, verbose=False)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, stream)
    assert "a: 4 rows were left out: their prompts are longer than data.max_prompt_tokens=2; cpt inspect" in caplog.text
    assert sum(len(batch) for batch in module.seen) == 6
    assert not {f"a/train/{row}" for row in (0, 3, 6, 9)} & {row for batch in module.seen for row in batch}
    assert watched._num_skipped == 4
