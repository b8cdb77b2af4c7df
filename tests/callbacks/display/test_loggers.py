"""How pictures, texts and options reach loggers: TensorBoard as it reads them itself, others by their own methods."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from cpt_lightning.callbacks.display.loggers import (
    check_names,
    drawn,
    log_charts,
    log_hparams,
    log_image,
    log_text,
    mark_running,
    shows_images,
)

PICTURE = Image.fromarray(
    np.stack(np.meshgrid(8 * np.arange(30), 12 * np.arange(20)) * 2, axis=2)[..., :3].astype("uint8")
)
METRICS = ["continual/average_accuracy"]


class Recorder:
    """Takes any call and remembers it."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


class Plain(Logger):
    """A logger with scalars and options only."""

    name, version = "plain", 0

    def __init__(self):
        self.hparams = None

    def log_metrics(self, metrics, step=None):
        raise AssertionError

    def log_hyperparams(self, params):
        self.hparams = params


class LikeWandb(Plain):
    """A logger with W&B's methods for images and texts."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_image(self, key, images, step=None, **kwargs):
        self.calls.append((key, images, step))

    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.calls.append((key, columns, data, step))


class FakeComet(CometLogger):
    def __init__(self):
        self.recorder = Recorder()

    experiment = property(lambda self: self.recorder)
    log_hyperparams = Plain.log_hyperparams


class MlflowClient(Recorder):
    """Refuses what MLflow's own (3.17) does; its run was ended, as Lightning ends it after ``validate``."""

    def __init__(self):
        super().__init__()
        self.params, self.status = {}, "FINISHED"

    def log_image(self, run_id, image, *, key, step):
        if not re.fullmatch(r"[\w./ -]+", key, re.ASCII):
            raise ValueError("The `key` parameter may only contain alphanumerics, ...")
        self.calls.append(("log_image", (run_id, image), {"key": key, "step": step}))

    def get_run(self, run_id):
        return SimpleNamespace(data=SimpleNamespace(params=dict(self.params)))

    def log_params(self, params):
        if changed := [name for name, value in params.items() if self.params.get(name, str(value)) != str(value)]:
            raise RuntimeError(f"Changing param values is not allowed. {changed}")
        self.params |= {name: str(value) for name, value in params.items()}

    def update_run(self, run_id, status):
        self.status = status


class FakeMLFlow(MLFlowLogger):
    def __init__(self):
        self.recorder = MlflowClient()

    experiment = property(lambda self: self.recorder)
    run_id = "7"

    def log_hyperparams(self, params):
        self.recorder.log_params(params)


def trainer_with(*loggers, is_global_zero=True):
    return SimpleNamespace(loggers=list(loggers), is_global_zero=is_global_zero)


def log_all(trainer):
    log_image(trainer, "stream/curves", PICTURE, 5)
    log_text(trainer, "config", "a *text*", 5)
    log_charts(trainer, "stream", {"all": ["a", "b"]})
    log_hparams(trainer, {"lr": 0.1, "objective": "SFT"}, ["lr", "group_size"], ["objective"], METRICS)


def test_tensorboard_gets_the_picture_and_the_text(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    log_all(trainer_with(logger))
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("stream/curves")
    assert (image.step, image.width, image.height) == (5, 30, 20)
    shown = Image.open(io.BytesIO(image.encoded_image_string))
    assert np.allclose(np.asarray(shown, dtype=float), np.asarray(PICTURE, dtype=float), atol=6)
    (text,) = events.Tensors("config/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (5, b"a *text*")
    assert events.SummaryMetadata("config/text_summary").plugin_data.plugin_name == "text"


def test_tensorboards_page_of_options_compares_runs_of_different_objectives(tmp_path):
    """Read by its own plugin: RFT and SFT in one table, each with the last value of the metric."""
    runs = {"rft": {"lr": 0.1, "objective": "RFT", "group_size": 8.0}, "sft": {"lr": 0.2, "objective": "SFT"}}
    for name, hparams in runs.items():
        logger = TensorBoardLogger(tmp_path, name="", version=name)
        log_hparams(trainer_with(logger), hparams, ["lr", "group_size"], ["objective"], METRICS)
        for step in (0, 1):
            logger.log_metrics({METRICS[0]: hparams["lr"] + step}, step)
        logger.finalize("success")
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(TBContext(data_provider=provider))
    metadata = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, metadata, [])
    assert {info.name for info in experiment.hparam_infos} == {"lr", "group_size", "objective"}
    assert [info.name.tag for info in experiment.metric_infos] == METRICS
    columns = [api_pb2.ColParams(metric=api_pb2.MetricName(tag=METRICS[0]), order=api_pb2.ORDER_ASC)]
    request = api_pb2.ListSessionGroupsRequest(
        experiment_name="", slice_size=10, col_params=columns,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
    )  # fmt: skip
    response = list_session_groups.Handler(RequestContext(), context, "", request).run()
    found = []
    for group in response.session_groups:
        hparams = {name: value.number_value or value.string_value for name, value in group.hparams.items()}
        found.append((hparams, group.metric_values[0].value))
    assert [hparams for hparams, _ in found] == [runs["rft"], runs["sft"]]
    assert [metric for _, metric in found] == pytest.approx([1.1, 1.2])


def test_other_loggers_are_called_as_they_name_it():
    wandb, comet, mlflow = LikeWandb(), FakeComet(), FakeMLFlow()
    trainer = trainer_with(wandb, comet, mlflow)
    assert shows_images(trainer)
    log_all(trainer)
    assert wandb.calls == [("stream/curves", [PICTURE], 5), ("config", ["config"], [["a *text*"]], 5)]
    assert comet.recorder.calls == [
        ("log_image", (PICTURE,), {"name": "stream/curves", "step": 5}),
        ("log_text", ("a *text*",), {"step": 5, "metadata": {"name": "config"}}),
    ]
    assert mlflow.recorder.calls == [
        ("log_image", ("7", PICTURE), {"key": "stream/curves", "step": 5}),
        ("log_text", ("7", "a *text*", "config.md"), {}),
    ]
    assert all(logger.hparams == {"lr": 0.1, "objective": "SFT"} for logger in (wandb, comet))
    assert mlflow.recorder.params == {"lr": "0.1", "objective": "SFT"}


def test_pictures_have_the_names_in_mlflow_that_lightning_gives_to_scalars_there():
    mlflow = FakeMLFlow()
    log_image(trainer_with(mlflow), "completions/größe (A:B)", PICTURE, 5)
    assert mlflow.recorder.calls == [("log_image", ("7", PICTURE), {"key": "completions/gre AB", "step": 5})]


def test_options_that_mlflow_has_of_a_run_stay_when_it_goes_on_with_others():
    """It refuses another value; what is new is added."""
    mlflow = FakeMLFlow()
    log_hparams(trainer_with(mlflow), {"steps": 2.0}, ["steps"], [], METRICS)
    log_hparams(trainer_with(mlflow), {"steps": 3.0, "objective": "SFT"}, ["steps"], ["objective"], METRICS)
    assert mlflow.recorder.params == {"steps": "2.0", "objective": "SFT"}


def test_a_run_that_learns_is_running_in_mlflow(tmp_path):
    mlflow = FakeMLFlow()
    mark_running(trainer_with(mlflow, LikeWandb(), is_global_zero=False))
    assert mlflow.recorder.status == "FINISHED"
    mark_running(trainer_with(mlflow, LikeWandb(), CSVLogger(tmp_path)))
    assert mlflow.recorder.status == "RUNNING"


@pytest.mark.parametrize(
    ("names", "said"),
    [(["a", "größe", "grüße"], "'grüße' that is 'gre', as of 'größe'"), (["a", "数独"], "that is ''")],
)
def test_names_that_mlflow_has_no_different_names_for_are_refused(names, said):
    check_names([LikeWandb(), FakeComet()], names)
    check_names([FakeMLFlow()], names[:2] if said.startswith("'gr") else names[:1])
    with pytest.raises(ValueError, match=re.escape(said)):
        check_names([LikeWandb(), FakeMLFlow()], names)


def test_loggers_without_pictures_or_texts_stay_silent(tmp_path):
    plain, csv = Plain(), CSVLogger(tmp_path, name="", version="")
    trainer = trainer_with(plain, csv)
    assert not shows_images(trainer)
    log_all(trainer)
    assert plain.hparams == {"lr": 0.1, "objective": "SFT"}


def test_other_ranks_log_nothing(tmp_path):
    wandb, board = LikeWandb(), TensorBoardLogger(tmp_path / "board", name="", version="")
    trainer = trainer_with(wandb, board, is_global_zero=False)
    assert not shows_images(trainer)
    log_all(trainer)
    assert wandb.calls == [] and wandb.hparams is None and not (tmp_path / "board").exists()


def test_a_figure_is_drawn_as_it_is_saved():
    figure = Figure(figsize=(1.2, 0.8))
    figure.subplots().plot([0, 1])
    saved = io.BytesIO()
    figure.savefig(saved, dpi=100)
    assert np.array_equal(np.asarray(drawn(figure)), np.asarray(Image.open(saved).convert("RGB")))
