"""What a stream wants of a Trainer; and names, stages, numbers and Trainers that would make it another, or none."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Timer

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


def check_names(tasks: Collection[str], probes: Collection[str]) -> None:
    """Refuses a stream without tasks, and names that are doubled or would be mistaken in results.

    Raises:
        ValueError: Names the task or probe.
    """
    if not tasks:
        raise ValueError("data.tasks is empty: a stream needs at least one task")
    if both := sorted(set(tasks) & set(probes)):
        raise ValueError(f"{both[0]!r} is both a task and a probe; give the probe another name")
    if odd := [name for name in [*tasks, *probes] if not name or set(name) & set("/+")]:
        raise ValueError(f"{odd[0]!r} cannot be the name of a task or probe: '/' and '+' have a meaning in results")


def check_stages(stages: Sequence[Sequence[str]], tasks: Sequence[str], given: object) -> None:
    """Refuses stages with nothing in them, and tasks that are unknown or named twice.

    Raises:
        ValueError: Names the stage or the task.
    """
    if given is not None and (not given or not all(stages)):
        raise ValueError(f"data.stages={given} has nothing to learn; leave it out to learn every task in turn")
    for stage in stages:
        for name in stage:
            _check_known(name, tasks, "data.stages")
        if len(set(stage)) < len(stage):
            raise ValueError(f"data.stages: the mixed stage {stage} names a task twice; use `mixing` to weigh tasks")


def check_numbers(stream: TaskStream) -> None:
    """Refuses numbers out of range, and two options that say the same thing.

    Raises:
        ValueError: Names the option.
    """
    for option in ("passes", "steps"):
        value = getattr(stream, option)
        by_stage = value if isinstance(value, Mapping) else {"every stage": value}
        for name, number in by_stage.items():
            if isinstance(value, Mapping):
                _check_known(name, [*stream.stage_names, *stream.probe_names], f"data.{option}")
            if number is not None and not number > 0:
                raise ValueError(f"data.{option} of {name} is {number}; it must be positive")
    if isinstance(stream.steps, int) and stream.passes is not None:
        raise ValueError(
            f"data.passes={stream.passes} and data.steps={stream.steps} both say how long a stage lasts; "
            "to use passes, set data.steps=null"
        )
    for option in ("prompts_per_step", "eval_prompts_per_step", "max_prompt_tokens"):
        number = getattr(stream, option)
        if number is not None and number < 1:
            raise ValueError(f"data.{option}={number} must be at least 1")
    if not isinstance(stream.mixing, str) and not stream.mixing > 0:
        raise ValueError(f"data.mixing={stream.mixing}: a temperature must be positive")
    if stream.seed < 0:
        raise ValueError(f"data.seed={stream.seed} must be 0 or more")


def check_trainer(stream: TaskStream) -> None:
    """Refuses settings of a Trainer with which the stream would silently be another one.

    Raises:
        ValueError: Names the setting.
    """
    trainer = stream.trainer
    if trainer is None or trainer.fast_dev_run:
        return
    stages = f"the stream has {stream.num_stages} stages, and an epoch is a stage"
    if trainer.max_epochs is None or not 0 <= trainer.max_epochs <= stream.num_stages:
        raise ValueError(f"trainer.max_epochs={trainer.max_epochs}: {stages}; set it to {stream.num_stages}")
    if trainer.max_steps != -1 or any(isinstance(callback, Timer) for callback in trainer.callbacks):
        raise ValueError(
            "trainer.max_steps or max_time would end the run in the middle of a task, whose row of scores would be "
            "missing; data.steps says how long tasks are, and a run that is stopped (Ctrl-C, SIGTERM) can go on later"
        )
    if stream.num_stages > 1 and trainer.reload_dataloaders_every_n_epochs != 1:
        raise ValueError(f"trainer.reload_dataloaders_every_n_epochs must be 1: {stages}")
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError("trainer.use_distributed_sampler must be false: the stream splits batches over ranks itself")


def _check_known(name: str, known: Sequence[str], where: str) -> None:
    if name in known:
        return
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    raise ValueError(f"{where} names {name!r}, which the stream does not have; {hint}")
