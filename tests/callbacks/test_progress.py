"""What a person watching the run sees."""

import logging

import pytest

from cpt_lightning.callbacks import SkippedRows, TaskProgressBar
from cpt_lightning.tasks import Row, Task
from tests.fakes import LinearModule, NumberSource, make_trainer, number_stream


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


def test_the_bar_names_the_task(tmp_path, capsys):
    stream = number_stream()
    trainer = make_trainer(tmp_path, stream, callbacks=[TaskProgressBar(refresh_rate=1)], enable_progress_bar=True)
    module = LinearModule()
    trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    trainer.test(module, stream, verbose=False)
    shown = capsys.readouterr().out
    for text in ("task 1/3 a", "task 3/3 c", "evaluating p", "testing b"):
        assert text in shown


def test_a_log_file_stays_short(tmp_path, capsys):
    """Not at a terminal the bar is renewed every 20 batches, here: once at the start and once at the end of each."""
    stream = number_stream(steps=60)
    trainer = make_trainer(tmp_path, stream, callbacks=[TaskProgressBar()], enable_progress_bar=True)
    with pytest.warns(UserWarning, match="not evaluated"):
        trainer.fit(LinearModule(), stream)
    assert capsys.readouterr().out.count("task 2/3 b:") < 20


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
    assert "a: 4 rows were left out on this rank" in caplog.text and "max_prompt_tokens=2" in caplog.text
    assert sum(len(batch) for batch in module.seen) == 6
    assert not {f"a/train/{row}" for row in (0, 3, 6, 9)} & {row for batch in module.seen for row in batch}
    assert watched._num_skipped == 4
