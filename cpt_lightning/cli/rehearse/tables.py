"""A rehearsal on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from rich.table import Table

from cpt_lightning.cli.plan.phases import Workload
from cpt_lightning.cli.plan.tables import size
from cpt_lightning.cli.rehearse.duration import Duration
from cpt_lightning.cli.rehearse.filter_trial import FILTER, name_of
from cpt_lightning.cli.rehearse.memory import DeviceMemory
from cpt_lightning.cli.rehearse.watch import EVALUATION, Part
from cpt_lightning.modules import PostTraining
from cpt_lightning.modules.group_rollouts import GroupRollouts


def what_is_rehearsed(
    module: PostTraining, workload: Workload, steps: int, trainer: Trainer, beside: Sequence[Callback]
) -> str:
    """The largest step in a line."""
    what = f"prompts of {workload.prompt_tokens:,} tokens ({workload.num_images} images)"
    if isinstance(module, GroupRollouts):
        what += f" x {module.group_size} completions of {module.sampling.max_new_tokens:,} tokens"
    else:
        what += f" with targets of {workload.target_tokens:,}"
    others = ", ".join(["", *map(name_of, beside)])
    return (
        f"rehearsing {steps} steps of {workload.prompts_per_step} {what}, and an evaluation of "
        f"{workload.eval_prompts_per_step} x {module.evaluation.max_new_tokens:,}{others}, on {trainer.world_size} x "
        f"{trainer.strategy.root_device.type}"
    )


def part_table(parts: Sequence[Part], memory: DeviceMemory) -> Table:
    """What each part takes."""
    table = Table("", title="the largest batches", title_justify="left", title_style="bold")
    table.add_column("seconds", justify="right")
    table.add_column(f"{'GPU' if memory.is_gpu else 'main'} memory at most", justify="right")
    for part in parts:
        is_known = part.is_of_step or part.name in (EVALUATION, FILTER)
        table.add_row(
            part.name if is_known else f"{part.name}, longest call", f"{part.seconds:.2f}", size(part.peak_bytes)
        )
    return table


def room_line(parts: Sequence[Part], memory: DeviceMemory) -> str:
    """How much of a device that is."""
    most = max(parts, key=lambda part: part.peak_bytes)
    return f"{size(most.peak_bytes)} of {size(memory.total)} ({most.peak_bytes / memory.total:.0%}) in the {most.name}"


def duration_lines(duration: Duration) -> list[str]:
    """How long the run takes if all batches are the largest ones."""
    if duration.unknown:
        return [f"how long the run takes is not known: {duration.unknown}"]
    lines = [
        f"{duration.num_steps:,} steps of {duration.step_seconds:.2f} s: at most {_clock(duration.training_s)}",
        f"{duration.num_evaluations} evaluations of {duration.num_batches:,} batches of "
        f"{duration.batch_seconds:.2f} s: at most {_clock(duration.evaluation_s)}",
    ]
    if duration.num_judged:
        lines += [
            f"{duration.num_judged:,} batches of {duration.judged_seconds:.2f} s to filter: at most "
            f"{_clock(duration.filter_s)}"
        ]
    total_s = duration.training_s + duration.evaluation_s + duration.filter_s
    return [*lines, f"the run: at most {_clock(total_s)}, and what callbacks take"]


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(3661.4)
    '1:01:01'
    """
    return str(timedelta(seconds=round(seconds)))
