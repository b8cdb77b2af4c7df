"""What a stream wants of a Trainer; and names, stages, numbers and Trainers that would make it another, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import inf
from numbers import Integral, Real
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.data.replay import Replay
from cpt_lightning.tasks import Task
from cpt_lightning.tasks.records import kind_of
from cpt_lightning.tasks.rows import SPLITS

if TYPE_CHECKING:
    from cpt_lightning.data.datamodule import TaskStream

TRAINER_OPTIONS = {
    "reload_dataloaders_every_n_epochs": 1,  # an epoch is a task
    "use_distributed_sampler": False,  # the stream splits batches over ranks
    "inference_mode": False,  # a validation must not leave inference tensors in what trains on
    "num_sanity_val_steps": 0,  # the zero-shot evaluation comes first anyway
    "log_every_n_steps": 1,
}
"""What every stream wants of a Trainer."""

_UNFIT: dict[type[Callback], str] = {
    EarlyStopping: "would end the stream, not the task; data.steps or data.passes says how long each task is learned",
    StochasticWeightAveraging: (
        "averages over epochs, which are stages here, and leaves weights that were neither evaluated nor saved; the "
        "callback ModelMerging averages what the stages end in"
    ),
    WeightAveraging: (
        "has other weights evaluated and saved than those that exports, filters and measures see; the callback "
        "ModelMerging averages what the stages end in"
    ),
    OnExceptionCheckpoint: (
        "saves in the middle of a batch, which a run that goes on would leave out; TaskCheckpoint keeps a last.ckpt, "
        "with every_n_steps as fresh as you like"
    ),
    BatchSizeFinder: (
        "would run through the first stages to see what fits; `cpt rehearse` measures the largest steps beforehand"
    ),
    LearningRateFinder: (
        "would run through the first stages at rising rates; compare whole streams with `cpt study` (grid)"
    ),
}
"""Callbacks of Lightning that mean something else where an epoch is a stage, and what does it here."""

_LEAST = {"prompts_per_step": 1, "eval_prompts_per_step": 1, "max_prompt_tokens": 1, "num_workers": 0, "seed": 0}
"""Whole numbers, and the least that each may be."""

LONGEST_NAME = 100
"""Bytes of a task's name: checkpoints, exports and pictures are named after it, and file systems take 255."""


def check_tasks(tasks: object, probes: object) -> None:
    """Refuses a stream without tasks, what is no task, and names that are doubled or would be mistaken in results.

    Raises:
        TypeError: Something else than tasks by name.
        ValueError: Names the task or probe.
    """
    for group, given in (("tasks", tasks), ("probes", probes)):
        if not isinstance(given, Mapping):
            raise TypeError(f"data.{group} is {kind_of(given)}; give a dict of tasks by name")
        for name, task in given.items():
            _check_name(name)
            if not isinstance(task, Task):
                raise TypeError(f"data.{group}: {name!r} is {kind_of(task)}; give a Task")
    if not tasks:
        raise ValueError("data.tasks is empty: a stream needs at least one task")
    if both := sorted(set(tasks) & set(probes)):  # type: ignore[call-overload]  # both are mappings
        raise ValueError(f"{both[0]!r} is both a task and a probe; give the probe another name")


def _check_name(name: object) -> None:
    problem = None
    if not isinstance(name, str):
        problem = f"it is {kind_of(name)} and not text; quote it"
    elif not name.strip():
        problem = "it says nothing; give it one"
    elif odd := [letter for letter in name if letter in "/+."]:
        problem = f"{odd[0]!r} has a meaning in results or in PyTorch; write '_' or '-' in its place"
    elif not name.isprintable():
        problem = "it holds a character that cannot be seen; leave that out"
    elif len(name.encode()) > LONGEST_NAME:
        problem = f"files are named after it, and {LONGEST_NAME} bytes are the most; shorten it"
    if problem is not None:
        raise ValueError(f"{name!r} cannot be the name of a task or probe: {problem}")


def check_stages(stages: Sequence[Sequence[str]], tasks: Sequence[str], given: object) -> None:
    """Refuses stages with nothing in them, and tasks that are unknown or named twice.

    Raises:
        TypeError: One text in the place of a list.
        ValueError: Names the stage or the task.
    """
    if isinstance(given, str):
        raise TypeError(f"data.stages={given!r} is text; give a list of tasks by name")
    if given is not None and (not given or not all(stages)):
        raise ValueError(f"data.stages={given} has nothing to learn; leave it out to learn every task in turn")
    for stage in stages:
        for name in stage:
            _check_known(name, tasks, "data.stages")
        if len(set(stage)) < len(stage):
            raise ValueError(f"data.stages: the mixed stage {stage} names a task twice; use `mixing` to weigh tasks")


def check_numbers(stream: TaskStream) -> None:
    """Refuses numbers that are none or out of range, and two options that say the same thing.

    Raises:
        ValueError: Names the option.
    """
    for option, is_number, kind in (("passes", _is_real, "number"), ("steps", _is_whole, "whole number")):
        value = getattr(stream, option)
        by_stage = value if isinstance(value, Mapping) else {"every stage": value}
        for name, number in by_stage.items():
            if isinstance(value, Mapping):
                _check_known(name, [*stream.stage_names, *stream.probe_names], f"data.{option}")
            if number is not None and not (is_number(number) and 0 < number < inf):
                raise ValueError(f"data.{option} of {name} is {number!r}; it must be a positive {kind}")
    if stream.passes is not None and stream.steps is not None and not isinstance(stream.steps, Mapping):
        raise ValueError(
            f"data.passes={stream.passes} and data.steps={stream.steps} both say how long a stage lasts; "
            "to use passes, set data.steps=null"
        )
    for option, least in _LEAST.items():
        number = getattr(stream, option)
        if number is None and option == "max_prompt_tokens":
            continue
        if not _is_whole(number):
            raise ValueError(f"data.{option}={number!r} must be a whole number")
        if number < least:
            raise ValueError(f"data.{option}={number} must be at least {least}")


def check_choices(stream: TaskStream) -> None:
    """Refuses a mixing, a replay or a split that is none; ``cpt`` has refused them when it parsed.

    Raises:
        ValueError: Names the option.
    """
    mixing: object = stream.mixing
    if isinstance(mixing, str) and mixing not in ("size", "uniform"):
        raise ValueError(f"data.mixing={mixing!r} is unknown; there are 'size', 'uniform' and temperatures such as 2.0")
    if not isinstance(mixing, str) and not (_is_real(mixing) and mixing > 0):  # type: ignore[operator]
        raise ValueError(f"data.mixing={mixing!r}: a temperature must be a positive number")
    replay: object = stream.replay
    if replay is not None and not isinstance(replay, Replay):
        raise ValueError(f"data.replay={replay!r} is {kind_of(replay)}; give a Replay, such as Replay(ratio=0.1)")
    if stream.evaluate_on not in ("val", "test"):
        raise ValueError(f"data.evaluate_on={stream.evaluate_on!r} is unknown; there are 'val' and 'test'")
    if stream.predict_on not in SPLITS:
        raise ValueError(f"data.predict_on={stream.predict_on!r} is unknown; there are {', '.join(map(repr, SPLITS))}")


def check_trainer(stream: TaskStream) -> None:
    """Refuses settings of a Trainer with which the stream would silently be another one.

    Raises:
        ValueError: Names the setting.
    """
    trainer = stream.trainer
    if trainer is None:
        return
    _check_callbacks(stream, trainer.callbacks)
    if trainer.fast_dev_run:
        if stream.num_stages > 1:
            name, others = stream.stage_names[0], stream.num_stages - 1
            rank_zero_info(f"fast_dev_run tries the first stage, {name}; {others} more are not tried")
        return
    stages = f"the stream has {stream.num_stages} stages, and an epoch is a stage"
    if trainer.max_epochs is None or not 0 <= trainer.max_epochs <= stream.num_stages:
        raise ValueError(f"trainer.max_epochs={trainer.max_epochs}: {stages}; set it to {stream.num_stages}")
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    if trainer.max_steps != -1 or any(timer.time_remaining() is not None for timer in timers):
        raise ValueError(
            "trainer.max_steps or max_time would end the run in the middle of a task, whose row of scores would be "
            "missing; data.steps says how long tasks are, and a run that is stopped (Ctrl-C, SIGTERM) can go on later"
        )
    if trainer.limit_train_batches == 0:
        raise ValueError("trainer.limit_train_batches=0 learns nothing; `cpt test` or trainer.validate evaluates alone")
    if trainer.overfit_batches:
        raise ValueError(
            f"trainer.overfit_batches={trainer.overfit_batches} would learn and evaluate other rows than the "
            "stream's; num_train of the tasks takes fewer rows"
        )
    if stream.num_stages > 1 and trainer.reload_dataloaders_every_n_epochs != 1:
        raise ValueError(f"trainer.reload_dataloaders_every_n_epochs must be 1: {stages}")
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError("trainer.use_distributed_sampler must be false: the stream splits batches over ranks itself")


def check_processor(stream: TaskStream) -> None:
    """Refuses a processor that was set when the stream was looked at with another module than the Trainer's.

    Raises:
        ValueError: As said.
    """
    if stream.trainer is None or stream._processor is None:
        return
    own = stream.trainer.lightning_module.processor
    if stream._processor is not own and type(stream._processor) is type(own):
        raise ValueError(
            "stream.processor was set, and is not that of the module that is given with it: stream.processor = None "
            "takes the module's; to have another one used, set module.processor"
        )


def _check_callbacks(stream: TaskStream, callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        for kind, why in _UNFIT.items():
            if isinstance(callback, kind) and not (kind is EarlyStopping and stream.num_stages == 1):
                raise ValueError(f"{type(callback).__name__} {why}")
        if isinstance(callback, ModelCheckpoint | EarlyStopping) and str(callback.monitor).startswith("val/"):
            # Lightning says so too, when a stage has been learned.
            where = f"{type(callback).__name__}(monitor={callback.monitor!r})"
            _check_known(str(callback.monitor).split("/")[1], stream.asked, where)


def _is_whole(number: object) -> bool:
    """Also of NumPy's."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def _is_real(number: object) -> bool:
    return isinstance(number, Real) and not isinstance(number, bool)


def _check_known(name: str, known: Sequence[str], where: str) -> None:
    if name in known:
        return
    close = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    raise ValueError(f"{where} names {name!r}, which the stream does not have; {hint}")
