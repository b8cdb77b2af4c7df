"""The pictures of the stream: that TensorBoard has them once each, at the right step, whatever happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from cpt_lightning.callbacks import CompletionPanel, StreamPictures
from cpt_lightning.callbacks.display import stream_pictures
from cpt_lightning.cli.run_record import RunRecord
from cpt_lightning.records.environment import read_starts
from tests.fakes import KillAt, Killed, LinearModule, make_trainer, number_stream
from tests.ranks import run_ranks

TAGS = ["stream/accuracy_matrix", "stream/curves"]


def run(folder, *, resume=False, callbacks=(), when="every_task", logger=None, purge_step=0, validate=True, **options):
    """A run as ``cpt fit`` makes it, or the rest of one."""
    module, stream = LinearModule(), number_stream()
    logger = logger or TensorBoardLogger(folder, name="", version="", purge_step=purge_step)
    callbacks = [StreamPictures(when), *callbacks]
    trainer = make_trainer(folder, stream, callbacks=callbacks, logger=logger, log_every_n_steps=1, **options)
    if validate and not resume:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=str(folder / "last.ckpt") if resume else None)
    return trainer


def events_of(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def images_of(folder) -> dict[str, list[tuple[int, bytes]]]:
    """By tag, step and bytes of every image that TensorBoard shows."""
    events = events_of(folder)
    tags = sorted(events.Tags()["images"])
    return {tag: [(image.step, image.encoded_image_string) for image in events.Images(tag)] for tag in tags}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_both_pictures_stand_beside_the_metrics_after_every_task(whole):
    """Ten rows in batches of four: three steps a task, the metrics beside the last of them."""
    images = images_of(whole)
    assert sorted(images) == TAGS
    metrics = [event.step for event in events_of(whole).Scalars("continual/average_accuracy")]
    assert metrics == [2, 5, 8]
    assert all([step for step, _ in shown] == metrics for shown in images.values())
    state = torch.load(whole / "3_c.ckpt", weights_only=True)["callbacks"]["StreamPictures"]
    assert state == {"steps": [3, 6, 9]}


@pytest.mark.parametrize(
    ("kill", "purge_step"),
    [(KillAt(1, batch=2), 5), (KillAt(2, batch=0), 6)],
    ids=["within a task", "between tasks"],
)
def test_a_resumed_run_has_the_pictures_of_a_whole_one_once_each(tmp_path, whole, kill, purge_step):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[kill])
    run(tmp_path, resume=True, purge_step=purge_step)
    assert images_of(tmp_path) == images_of(whole)
    scalars, expected = (
        {tag: len(e.Scalars(tag)) for tag in e.Tags()["scalars"]} for e in map(events_of, (tmp_path, whole))
    )
    assert scalars == expected


def test_what_each_task_has_lost_is_a_curve_whose_mean_is_the_forgetting_measure(whole):
    events = events_of(whole)
    lost = {name: {e.step: e.value for e in events.Scalars(f"continual/forgetting/{name}")} for name in "ab"}
    measure = {event.step: event.value for event in events.Scalars("continual/forgetting_measure")}
    assert set(lost["a"]) == {5, 8} and set(lost["b"]) == {8}
    assert "continual/forgetting/c" not in events.Tags()["scalars"]
    assert measure == pytest.approx({5: lost["a"][5], 8: (lost["a"][8] + lost["b"][8]) / 2})


def test_tensorboard_is_told_which_curves_belong_together(whole):
    events = events_of(whole)
    (event,) = events.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts["accuracy on tasks"] == ["val/a/accuracy", "val/b/accuracy", "val/c/accuracy"]
    assert charts["probes: change since the base"] == ["continual/probe/p"]
    logged = set(events.Tags()["scalars"])
    assert {tag for tags in charts.values() for tag in tags} - logged == {"continual/forgetting/c"}


def test_without_a_base_or_the_steps_of_an_old_checkpoint_it_still_draws(tmp_path):
    with pytest.warns(UserWarning, match="untrained base was not evaluated"), pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAt(1, batch=1)], validate=False)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del state["callbacks"]["StreamPictures"]
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="untrained base was not evaluated"):
        run(tmp_path, resume=True, purge_step=4)
    assert [step for step, _ in images_of(tmp_path)["stream/curves"]] == [2, 5, 8]


@pytest.mark.parametrize(("when", "steps"), [("end", [8]), ("never", [])])
def test_it_may_draw_once_or_not_at_all(tmp_path, when, steps):
    run(tmp_path, when=when)
    assert [step for shown in images_of(tmp_path).values() for step, _ in shown] == 2 * steps
    assert ("custom_scalars__config__" in events_of(tmp_path).Tags()["tensors"]) == (when == "end")


def test_without_a_logger_for_pictures_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_pictures, "heatmap", None)  # drawing would fail
    run(tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    assert "continual/average_accuracy" in (tmp_path / "metrics.csv").read_text()


def test_it_says_so_where_the_record_comes_too_late(tmp_path):
    stream = number_stream()
    trainer = make_trainer(tmp_path, stream)
    trainer.callbacks.insert(0, StreamPictures())
    with pytest.raises(ValueError, match="put that callback before it"):
        trainer.fit(LinearModule(), stream)


def all_that_write() -> list:
    """What else puts pictures and texts into TensorBoard, as ``cpt fit`` sets it up."""
    parser = LightningArgumentParser()
    parser.add_argument("--seed_everything", type=int, default=5)
    parser.add_argument("--ckpt_path", type=str, default=None)
    return [CompletionPanel(), RunRecord(parser, parser.get_defaults(), ["fit", "-c", "a b.yaml"])]


def run_and_write(folder: Path, strategy: str = "auto", devices: int = 1) -> None:
    run(folder, callbacks=all_that_write(), strategy=strategy, devices=devices)


def test_two_ranks_write_what_one_does_and_the_second_one_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # as the command line does
    two, one = tmp_path / "two", tmp_path / "one"
    run_ranks(run_and_write, two, "ddp", 2)
    run_and_write(one)
    assert images_of(two) == images_of(one) and len(images_of(one)) == 6
    for folder in (one, two):
        writers = [path.name.split(".")[-2:] for path in folder.glob("*tfevents*")]  # process, and which of its files
        assert len(writers) == 2 and len({process for process, _ in writers}) == 1
        assert len(events_of(folder).Tensors("environment/text_summary")) == 1
    starts = [read_starts(folder / "environment.json") for folder in (one, two)]
    assert [[start["world_size"] for start in each] for each in starts] == [[1], [2]]
    assert (starts[1][0]["command"], starts[1][0]["seed"]) == ("cpt fit -c 'a b.yaml'", 5)
