"""What is said when a run is done: what was learned, lost and spent, where it lies, and what to type next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
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

    ``lost`` is the best of a task since it was learned, of a probe ever, minus the end, in points. What came to the
    stream later has no score of the base.
    """
    table = Table("learned and lost, in %")
    for title in ("base", "learned", "end", "lost"):
        table.add_column(title, justify="right")
    base = matrix.zero_shot or {}
    for name in matrix.names:
        is_task = name in matrix.tasks
        learned = matrix.learned_at[matrix.tasks.index(name)] if is_task else 0
        since = [row[name]["accuracy"] for row in matrix.rows[learned:] if name in row]
        before = [base[name]["accuracy"]] if name in base else []
        best = max(since if is_task else [*before, *since])
        figures = [before, since[:1] if is_task else [], since[-1:], [best - since[-1]]]
        table.add_row(
            escape(name) if is_task else f"[dim]probe[/] {escape(name)}",
            *("".join(f"{100 * value:.1f}" for value in figure) for figure in figures),
            end_section=name == matrix.tasks[-1],
        )
    return table


def spent(folder: Path, seconds: float) -> str:
    """Rows and rollouts of the whole run, as far as they were logged; time of the command, as on a clock."""
    figures = figures_of(RunFolder(folder))
    counts = {name: figures[name] for name in ("rows", "rollouts")}
    said = [f"{1000 * count:,.0f} {name}" for name, count in counts.items() if count]
    return "; ".join([*([", ".join(said) + " in all"] if said else []), f"this command took {clock(seconds)}"])


def what_next(folder: Path) -> list[str]:
    """Commands for what lies in the folder."""
    config, last = folder / "config.yaml", folder / "last.ckpt"
    lines = [f"{folder}: all that the run left", "next:", f"  cpt report {folder}"]
    lines += [f"  tensorboard --logdir {folder}"] if any(folder.glob("events.out.tfevents.*")) else []
    if config.exists() and last.exists():
        merge = " --merge" if _is_renewed(RunFolder(folder)) else ""
        lines += [f"  cpt test -c {config} --ckpt_path {last}", f"  cpt export {folder}{merge}"]
    return lines


def _is_renewed(run: RunFolder) -> bool:
    """Whether adapters were merged along the stream: no single one is the model."""
    backbone = (run.config or {}).get("model", {}).get("init_args", {}).get("backbone", {})
    return backbone.get("lora", {}).get("along_stream") == "renewed"
