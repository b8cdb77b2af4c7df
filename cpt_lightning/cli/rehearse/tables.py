"""A rehearsal on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from lightning import Trainer
from rich.table import Table

from cpt_lightning.cli.plan.phases import Workload
from cpt_lightning.cli.plan.tables import size
from cpt_lightning.cli.rehearse.duration import Duration
from cpt_lightning.cli.rehearse.memory import DeviceMemory
from cpt_lightning.cli.rehearse.watch import Part
from cpt_lightning.modules import PostTraining
from cpt_lightning.modules.group_rollouts import GroupRollouts


def what_is_rehearsed(module: PostTraining, workload: Workload, steps: int, trainer: Trainer) -> str:
    """The largest step in a line."""
    what = f"prompts of {workload.prompt_tokens:,} tokens ({workload.num_images} images)"
    if isinstance(module, GroupRollouts):
        what += f" x {module.group_size} completions of {module.sampling.max_new_tokens:,} tokens"
    else:
        what += f" with targets of {workload.target_tokens:,}"
    return (
        f"rehearsing {steps} steps of {workload.prompts_per_step} {what}, and an evaluation of "
        f"{workload.eval_prompts_per_step} x {module.evaluation.max_new_tokens:,}, on {trainer.world_size} x "
        f"{trainer.strategy.root_device.type}"
    )


def part_table(parts: Sequence[Part], memory: DeviceMemory) -> Table:
    """What each part takes."""
    table = Table("", title="the largest batches", title_justify="left", title_style="bold")
    table.add_column("seconds", justify="right")
    table.add_column(f"{'GPU' if memory.is_gpu else 'main'} memory at most", justify="right")
    for part in parts:
        table.add_row(part.name, f"{part.seconds:.2f}", size(part.peak_bytes))
    return table


def room_line(parts: Sequence[Part], memory: DeviceMemory) -> str:
    """How much of a device that is."""
    most = max(parts, key=lambda part: part.peak_bytes)
    return f"{size(most.peak_bytes)} of {size(memory.total)} ({most.peak_bytes / memory.total:.0%}) in the {most.name}"


def duration_lines(duration: Duration) -> list[str]:
    """How long the run takes if all batches are the largest ones."""
    if duration.unknown:
        return [f"how long the run takes is not known: {duration.unknown}"]
    step, batch = f"{duration.step_seconds:.2f} s", f"{duration.batch_seconds:.2f} s"
    return [
        f"{duration.num_steps:,} steps of {step}: at most {_clock(duration.training_s)}",
        f"{duration.num_evaluations} evaluations of {duration.num_batches:,} batches of {batch}: at most "
        f"{_clock(duration.evaluation_s)}",
        f"the run: at most {_clock(duration.training_s + duration.evaluation_s)}, and what callbacks and filter take",
    ]


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(3661.4)
    '1:01:01'
    """
    return str(timedelta(seconds=round(seconds)))
