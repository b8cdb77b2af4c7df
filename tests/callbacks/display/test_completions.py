"""The panels of completions: which rows they show, and that TensorBoard has them, once each, whatever happened."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cpt_lightning.callbacks import CompletionPanel
from cpt_lightning.callbacks.display import completions
from cpt_lightning.callbacks.display.completions import choose, find
from cpt_lightning.tasks import Row, SkippedRow, Task
from cpt_lightning.types import Evaluation, Example
from tests.fakes import KillAt, Killed, LinearModule, NumberSource, make_trainer, number_stream

RIGHT = {  # rows of each task that are right: by the base, after a, after b, after c
    "a": ({0}, {0, 1, 2, 3}, {0, 1}, {0, 2}),
    "b": ({1, 2}, {1}, {3, 4}, {3, 5}),
    "c": ({5}, {5}, set(), {0}),
    "p": ({0, 1, 2}, {0, 1}, {2}, {2, 3}),
}


class PaintedSource(NumberSource):
    """The numbers of a task, with a picture each."""

    def split(self, split):
        images = [Image.new("RGB", (28, 28), (20 * place, 0, 0)) for place in range(self.sizes[split])]
        return [
            Row(row.row_id, row.question, row.answer, [image])
            for row, image in zip(super().split(split), images, strict=True)
        ]


class Scripted(LinearModule):
    """Answers as the script says, whatever it has learned."""

    def validation_step(self, batch, batch_idx: int) -> Evaluation:
        found = super().validation_step(batch, batch_idx)
        stage = self.trainer.current_epoch + 1 if self.trainer.training or self.trainer.state.fn == "fit" else 0
        for place, example in enumerate(found.examples):
            is_right = int(example.row_id.rpartition("/")[2]) in RIGHT[example.task][stage]
            found.texts[place] = example.gold if is_right else "x"
            found.scores[place] = {"total": float(is_right), "accuracy": float(is_right)}
        return found

    test_step = predict_step = validation_step


def painted_stream(**options):
    stream = number_stream(**options)
    stream.everything |= {
        name: Task(PaintedSource(name), prompt=task.prompt) for name, task in stream.everything.items()
    }
    return stream


def run(folder, *, resume=False, callbacks=(), num_rows=6, logger=None, purge_step=0, **options):
    """A run as ``cpt fit`` makes it, or the rest of one."""
    module, stream = Scripted(), painted_stream()
    logger = logger or TensorBoardLogger(folder, name="", version="", purge_step=purge_step)
    trainer = make_trainer(
        folder, stream, callbacks=[CompletionPanel(num_rows), *callbacks], logger=logger, log_every_n_steps=1, **options
    )
    if not resume:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=str(folder / "last.ckpt") if resume else None)
    return trainer


def images_of(folder) -> dict[str, list[tuple[int, bytes]]]:
    """By tag, step and bytes of every image that TensorBoard shows."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()["images"]
    return {tag: [(image.step, image.encoded_image_string) for image in events.Images(tag)] for tag in tags}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The images of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return images_of(folder)


def test_what_was_right_after_its_own_task_and_is_wrong_now_is_forgotten(tmp_path, monkeypatch):
    """By hand from the table above; all 6 rows (5 of the probe) are shown, the first of them first forgotten.

    Task a, after b: of 0, 1, 2, 3 that were right when it had been learned, 2 and 3 are wrong; they were right when
    asked last. After c: 1 is wrong for the first time, 3 again, and 2 is right again. Task b was never learned before
    its own stage, so until then it is the base that counts: after a, 2 is wrong; after its own stage nothing is
    forgotten, though 1 is wrong; after c it is 4, and no more 1 or 2. The probe is held to the base for good.
    """
    shown: dict[str, list[tuple[int, str]]] = {}

    def draw(title, rows):
        places = [(int(row.example.row_id.rpartition("/")[2]), row.outcome) for row in rows]
        assert all(
            row.example.images[0].getpixel((0, 0)) == (20 * place, 0, 0)
            for (place, _), row in zip(places, rows, strict=True)
        )
        assert all((row.completion == row.example.gold) == (row.outcome == "right") for row in rows)
        shown[title.partition(":")[0]] = [pair for pair in places if pair[1] not in ("right", "wrong")]
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(completions, "completion_panel", draw)
    run(tmp_path)
    newly, again = "newly forgotten", "forgotten"
    assert shown == {
        "a, base": [], "b, base": [], "c, base": [], "p, base": [],
        "a, after a": [], "b, after a": [(2, newly)], "c, after a": [], "p, after a": [(2, newly)],
        "a, after b": [(2, newly), (3, newly)], "b, after b": [], "c, after b": [(5, newly)],
        "p, after b": [(0, newly), (1, newly)],
        "a, after c": [(1, newly), (3, again)], "b, after c": [(4, newly)], "c, after c": [],
        "p, after c": [(0, again), (1, again)],
    }  # fmt: skip


def test_tensorboard_has_a_picture_of_every_task_and_probe_after_every_evaluation(whole):
    """Ten rows in batches of four: three steps a task, evaluated beside their last one."""
    assert sorted(whole) == [f"completions/{name}" for name in "abcp"]
    assert all([step for step, _ in images] == [0, 2, 5, 8] for images in whole.values())
    assert all(jpeg.startswith(b"\xff\xd8") for images in whole.values() for _, jpeg in images)


@pytest.mark.parametrize(
    ("kill", "purge_step"),
    [(KillAt(1, batch=2), 5), (KillAt(2, batch=0), 6), (KillAt(1, "on_validation_batch_start", batch=3), 5)],
    ids=["within a task", "between tasks", "within an evaluation"],
)
def test_a_resumed_run_has_the_pictures_of_a_whole_one_once_each(tmp_path, whole, kill, purge_step):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[kill])
    run(tmp_path, resume=True, purge_step=purge_step)
    assert images_of(tmp_path) == whole


def test_outcomes_of_earlier_evaluations_are_in_the_checkpoint_as_plain_lists(tmp_path):
    run(tmp_path)
    state = torch.load(tmp_path / "2_b.ckpt", weights_only=True)["callbacks"]["CompletionPanel"]
    assert state["right_then"]["a"] == [f"a/test/{place}" for place in (0, 1, 2, 3)]
    assert state["right_last"]["a"] == [f"a/test/{place}" for place in (0, 1)]
    assert state["right_then"]["p"] == [f"p/test/{place}" for place in (0, 1, 2)]


def test_several_evaluations_within_a_task_are_shown_and_the_last_one_is_remembered(tmp_path):
    run(tmp_path, val_check_interval=1)
    images = images_of(tmp_path)
    assert [step for step, _ in images["completions/a"]] == [0, *range(9)]  # the base, then after every batch
    state = torch.load(tmp_path / "3_c.ckpt", weights_only=True)["callbacks"]["CompletionPanel"]
    assert state["right_then"]["b"] == ["b/test/3", "b/test/4"]


def test_without_a_logger_for_pictures_nothing_is_drawn_and_the_run_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "completion_panel", None)  # drawing would fail
    run(tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    assert (tmp_path / "metrics.csv").exists() and (tmp_path / "last.ckpt").exists()


def test_no_rows_switch_it_off(tmp_path):
    run(tmp_path, num_rows=0)
    assert images_of(tmp_path) == {}
    with pytest.raises(ValueError, match="num_rows=-1.*0 shows no completions"):
        CompletionPanel(-1)


def test_a_validated_checkpoint_is_not_shown_as_the_base(tmp_path):
    trainer = run(tmp_path)
    before = images_of(tmp_path)
    trainer.validate(
        Scripted(), painted_stream(), ckpt_path=str(tmp_path / "1_a.ckpt"), verbose=False, weights_only=True
    )
    assert images_of(tmp_path) == before


def test_rows_are_chosen_of_each_outcome_in_turn():
    outcomes = ["right"] * 5 + ["wrong"] * 5 + ["newly forgotten"] * 5
    assert choose(outcomes, 4) == [10, 11, 5, 0]
    assert choose(outcomes, 15) == [*range(10, 15), *range(5, 10), *range(5)]
    assert choose([], 4) == []


def test_a_row_is_found_behind_rows_whose_image_was_refused():
    """Answers have no place for the second row, so the third row's answer is the second one."""

    class Rows(list):
        def __getitem__(self, index):
            if index == 1:
                raise SkippedRow("t, row 1: broken", filler=super().__getitem__(index))
            return super().__getitem__(index)

    examples = Rows(Example("t", f"r/{place}", [], "", SimpleNamespace) for place in range(4))
    assert find(examples, "r/2", 1) is examples[2]
    assert find(examples, "r/3", 2) is examples[3]
    assert find(examples, "elsewhere", 0) is None
