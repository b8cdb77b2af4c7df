"""How pictures and texts reach the loggers of a run: those that have them, and silently no other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning import Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

DOTS_PER_INCH = 100


@runtime_checkable
class LogsImages(Protocol):
    """A logger with W&B's method."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Logs images under a name."""


@runtime_checkable
class LogsText(Protocol):
    """A logger with W&B's method."""

    def log_text(self, key: str, columns: list[str], data: list[list[Any]], *, step: int | None = None) -> None:
        """Logs a table of texts under a name."""


def log_image(trainer: Trainer, name: str, image: Image, step: int) -> None:
    """Gives a picture to every logger that has pictures.

    Args:
        trainer: Whose loggers; on ranks other than the first nothing happens.
        name: Of the picture; of equal names the later ones are shown along the steps.
        image: What is shown.
        step: On the axis of :func:`logged_step`.
    """
    for logger in _loggers(trainer):
        match logger:
            case TensorBoardLogger():
                _write_image(logger, name, image, step)
            case CometLogger():
                logger.experiment.log_image(image, name=name, step=step)
            case MLFlowLogger():
                logger.experiment.log_image(logger.run_id, image, key=_in_mlflow(name), step=step)
            case LogsImages():
                logger.log_image(name, [image], step=step)


def log_text(trainer: Trainer, name: str, markdown: str, step: int) -> None:
    """Gives a text to every logger that has texts.

    Args:
        trainer: Whose loggers; on ranks other than the first nothing happens.
        name: Of the text.
        markdown: What is shown.
        step: On the axis of :func:`logged_step`.
    """
    for logger in _loggers(trainer):
        match logger:
            case TensorBoardLogger():
                logger.experiment.add_text(name, markdown, step)
            case CometLogger():
                logger.experiment.log_text(markdown, step=step, metadata={"name": name})
            case MLFlowLogger():
                logger.experiment.log_text(logger.run_id, markdown, f"{name}.md")
            case LogsText():
                logger.log_text(name, columns=[name], data=[[markdown]], step=step)


def log_hparams(
    trainer: Trainer,
    hparams: Mapping[str, float | str],
    numbers: Sequence[str],
    texts: Sequence[str],
    metrics: Sequence[str],
) -> None:
    """Gives every logger the options by which runs are compared.

    TensorBoard takes the columns of its page from one of the runs, so that all must name the same ones; the figures
    beside them are the last values of scalars.

    Args:
        trainer: Whose loggers; on ranks other than the first nothing happens.
        hparams: The options of this run.
        numbers: All options of any run that are numbers.
        texts: All options of any run that are texts.
        metrics: Scalars that are compared.
    """
    for logger in _loggers(trainer):
        match logger:
            case TensorBoardLogger():
                _write_hparams(logger, hparams, dict.fromkeys(numbers, True) | dict.fromkeys(texts, False), metrics)
            case MLFlowLogger():
                known = logger.experiment.get_run(logger.run_id).data.params  # it refuses to change any
                logger.log_hyperparams({name: value for name, value in hparams.items() if name not in known})
            case _:
                logger.log_hyperparams(dict(hparams))


def log_charts(trainer: Trainer, category: str, charts: Mapping[str, Sequence[str]]) -> None:
    """Tells TensorBoard which scalars to show together, under *Custom Scalars*; others have no such thing.

    Args:
        trainer: Whose loggers; on ranks other than the first nothing happens.
        category: Heading of the charts.
        charts: The scalars of each chart, by its title.
    """
    layout = {category: {title: ["Multiline", [re.escape(name) for name in names]] for title, names in charts.items()}}
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout)


def mark_running(trainer: Trainer) -> None:
    """Has MLflow know that the run goes on: Lightning (2.6) ends it with the evaluation before ``fit``.

    Args:
        trainer: Whose loggers; on ranks other than the first nothing happens.
    """
    for logger in _loggers(trainer):
        if isinstance(logger, MLFlowLogger):
            logger.experiment.update_run(logger.run_id, status="RUNNING")


def check_names(loggers: Iterable[Logger], names: Sequence[str]) -> None:
    """Refuses names of tasks that a logger has no different names for.

    Args:
        loggers: Of a run.
        names: Of all tasks and probes.

    Raises:
        ValueError: Names the task.
    """
    if not any(isinstance(logger, MLFlowLogger) for logger in loggers):
        return
    taken: dict[str, str] = {}
    for name in names:
        left = _in_mlflow(name)
        if not left or left in taken:
            like = f"as of {taken[left]!r}" if left else "and a name needs one"
            raise ValueError(
                f"MLFlowLogger keeps ASCII letters, digits, '_', '-' and spaces: of {name!r} that is {left!r}, "
                f"{like}; give the task another name, or the run another logger"
            )
        taken[left] = name


def shows_images(trainer: Trainer) -> bool:
    """Whether this rank has a logger for pictures, so that they are not drawn for nobody."""
    kinds = (TensorBoardLogger, CometLogger, MLFlowLogger, LogsImages)
    return any(isinstance(logger, kinds) for logger in _loggers(trainer))


def drawn(figure: Figure) -> Image:
    """A matplotlib figure as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from PIL import Image

    figure.set_dpi(DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def logged_step(trainer: Trainer) -> int:
    """The step under which Lightning logs scalars: batches of the run so far, which is not ``trainer.global_step``.

    At the end of an epoch Lightning logs them one step lower, beside the last batch. It has no public name for the
    number; its own callbacks use this one.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _loggers(trainer: Trainer) -> Sequence[Any]:
    return trainer.loggers if trainer.is_global_zero else ()


def _in_mlflow(name: str) -> str:
    """What Lightning (2.6) makes of the name of a scalar; MLflow refuses others, of pictures too."""
    return re.sub("[^a-zA-Z0-9_/. -]+", "", name)


def _write_image(logger: TensorBoardLogger, name: str, image: Image, step: int) -> None:
    """As ``SummaryWriter.add_image``, but as JPEG: PNG takes seven times as long, more than the drawing itself."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    jpeg = BytesIO()
    image.save(jpeg, "JPEG", quality=90, subsampling=0)  # colours as sharp as brightness, for text
    shown = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=jpeg.getvalue())
    summary = Summary(value=[Summary.Value(tag=name, image=shown)])
    logger.experiment._get_file_writer().add_summary(summary, step)  # Lightning's hyper-parameters go this way too


def _write_hparams(
    logger: TensorBoardLogger, hparams: Mapping[str, float | str], is_number: Mapping[str, bool], metrics: Sequence[str]
) -> None:
    """As ``SummaryWriter.add_hparams``, which would name this run's own options only, and write a run of its own."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    kinds = {True: api_pb2.DATA_TYPE_FLOAT64, False: api_pb2.DATA_TYPE_STRING}
    experiment = api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=name, type=kinds[number]) for name, number in is_number.items()],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name)) for name in metrics],
    )
    start = plugin_data_pb2.SessionStartInfo()
    for name, value in hparams.items():
        setattr(start.hparams[name], "number_value" if is_number[name] else "string_value", value)
    parts = {
        metadata.EXPERIMENT_TAG: {"experiment": experiment},
        metadata.SESSION_START_INFO_TAG: {"session_start_info": start},
    }
    for tag, part in parts.items():
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**part))
        value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
        logger.experiment._get_file_writer().add_summary(Summary(value=[value]))
