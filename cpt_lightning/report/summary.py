"""What is said when a run is done: what was learned, lost and spent, where it lies, and what to type next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cpt_lightning.callbacks.display.meter import clock
from cpt_lightning.records.matrix import AccuracyMatrix
from cpt_lightning.records.run import MATRIX, RunFolder
from cpt_lightning.report.figures import figures_of


def print_summary(folder: Path, seconds: float) -> None:
    """Prints the summary of a run; of one that was cut short, how far it came.

    Args:
        folder: Of the run.
        seconds: How long the command has taken.
    """
    path = folder / MATRIX
    if not path.exists():
        return
    matrix, console = AccuracyMatrix.load(path), Console(highlight=False, soft_wrap=True)
    console.print()
    if len(matrix.rows) < len(matrix.stages):
        console.print(f"{len(matrix.rows)} of {len(matrix.stages)} tasks are learned. To go on, --ckpt_path last")
        return
    console.print(summary_table(matrix))
    console.print("\n".join([spent(folder, seconds), *what_next(folder)]), markup=False)


def summary_table(matrix: AccuracyMatrix) -> Table:
    """What each task and probe was at the base, right after it was learned, and at the end, in per cent.

    ``lost`` is the best of a task since it was learned, of a probe ever, minus the end, in points.
    """
    table = Table("learned and lost, in %")
    for title in ("base", "learned", "end", "lost"):
        table.add_column(title, justify="right")
    rows = [*([matrix.zero_shot] if matrix.zero_shot is not None else []), *matrix.rows]
    num_bases = len(rows) - len(matrix.rows)
    for name in matrix.names:
        accuracy = [row[name]["accuracy"] for row in rows]
        is_task = name in matrix.tasks
        first = num_bases + matrix.learned_at[matrix.tasks.index(name)] if is_task else 0
        table.add_row(
            name if is_task else f"[dim]probe[/] {name}",
            f"{100 * accuracy[0]:.1f}" if num_bases else "",
            f"{100 * accuracy[first]:.1f}" if is_task else "",
            f"{100 * accuracy[-1]:.1f}",
            f"{100 * (max(accuracy[first:]) - accuracy[-1]):.1f}",
            end_section=name == matrix.tasks[-1],
        )
    return table


def spent(folder: Path, seconds: float) -> str:
    """Time of the command, as on a clock; rows and rollouts of the whole run, as far as they were logged."""
    figures = figures_of(RunFolder(folder))
    counts = {name: figures[name] for name in ("rows", "rollouts")}
    said = [f"{1000 * count:,.0f} {name}" for name, count in counts.items() if count]
    return ", ".join([f"took {clock(seconds)}", *said])


def what_next(folder: Path) -> list[str]:
    """Commands for what lies in the folder."""
    config, last = folder / "config.yaml", folder / "last.ckpt"
    lines = [f"{folder}: all that the run left", "next:", f"  cpt report {folder}", f"  tensorboard --logdir {folder}"]
    if config.exists() and last.exists():
        lines += [f"  cpt test -c {config} --ckpt_path {last}", f"  cpt export {folder}"]
    return lines
