"""The stream -> its report: every task and probe in turn, printed as soon as it is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cpt_lightning.cli.inspect.measure import measure_split, show
from cpt_lightning.cli.inspect.report import Report, SplitReport, StageReport, TaskReport
from cpt_lightning.cli.inspect.tables import stream_table, task_section
from cpt_lightning.data import TaskStream
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.pictures.contact_sheet import contact_sheet, with_thumbnails
from cpt_lightning.rewards import Reward
from cpt_lightning.tasks import HubRows, Prompt, Row, Source, Split, TableRows
from cpt_lightning.tasks.splits import spaced
from cpt_lightning.types import Example

MANY_SKIPPED = 0.1
"""Share of a split's rows above which leaving them out is worth a warning."""


class Options(Protocol):
    """What of the options of ``cpt inspect`` matters here."""

    num_examples: int
    max_rows: int | None
    num_thumbnails: int

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits to look at."""
        ...


@dataclass
class Unopened(Source):
    """Stands for a source that could not be made, so that the others can be inspected.

    Args:
        error: What its constructor said.
    """

    error: str

    def split(self, split: Split) -> Sequence[Row]:
        """Says why there are no rows.

        Raises:
            ValueError: Always.
        """
        raise ValueError(self.error)


def inspect_stream(
    stream: TaskStream,
    processor: PromptProcessor,
    backbone: str,
    prefixes: dict[str, str],
    options: Options,
    folder: Path,
    out: Console,
) -> Report:
    """Measures the whole stream and prints what it finds on the way.

    Args:
        stream: The tasks.
        processor: Encodes prompts.
        backbone: What the processor belongs to.
        prefixes: What replies are made to begin with, by option.
        options: What to look at.
        folder: Gets the contact sheets.
        out: Where to print.
    """
    with progress_bar() as progress:
        stages = stages_of(stream, progress)
    report = Report(backbone, stream.max_prompt_tokens, stream.evaluate_on, stages)
    report.problems += problems_of_prefixes(prefixes, processor)
    limit = "none" if stream.max_prompt_tokens is None else f"{stream.max_prompt_tokens:,} tokens"
    out.print(Text(f"backbone {backbone}, limit of training prompts: {limit}, evaluated on: {stream.evaluate_on}\n"))
    out.print(stream_table(report))
    with progress_bar() as progress:
        for name in stream.everything:
            inspected = inspect_task(stream, name, processor, prefixes, options, folder, progress)
            report.tasks.append(inspected)
            report.problems += problems_of(inspected, stream.evaluate_on)
            report.warnings += warnings_of(inspected, stream.evaluate_on)
            out.print()
            out.rule(Text(f"{inspected.role} {name}", style="bold"), align="left")
            out.print(task_section(inspected))
    out.print()
    return report


def progress_bar() -> Progress:
    """A bar on the error stream, where there is a person to see it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def opening(stream: TaskStream, name: str, progress: Progress) -> Iterator[None]:
    """Says that a task's data are being opened, which takes long where they are fetched or the network is slow."""
    source = stream.everything[name].source
    bar = progress.add_task(
        f"opening {name}" + (f" ({source.path})" if isinstance(source, HubRows) else ""), total=None
    )
    try:
        yield
    finally:
        progress.remove_task(bar)


def stages_of(stream: TaskStream, progress: Progress) -> list[StageReport]:
    """What is learned in which order; numbers are missing where rows are."""
    stages = []
    for index, name in enumerate(stream.stage_names):
        stage = StageReport(name)
        try:
            stage.num_rows = 0
            for task in stream.stages[index]:
                with opening(stream, task, progress):
                    stage.num_rows += len(stream.examples(task, "train"))
        except (ValueError, OSError):
            stage.num_rows = None  # why is said where the task's splits are
        else:
            stage.num_steps = stream.num_steps(index)
            stage.passes = stage.num_steps * stream.own_rows_per_step(index) / stage.num_rows
        stages.append(stage)
    return stages


def inspect_task(
    stream: TaskStream,
    name: str,
    processor: PromptProcessor,
    prefixes: dict[str, str],
    options: Options,
    folder: Path,
    progress: Progress,
) -> TaskReport:
    """Measures a task or probe and draws its contact sheet."""
    task = stream.everything[name]
    role = "task" if name in stream.task_names else "probe"
    # A probe is only evaluated.
    own = {option: text for option, text in prefixes.items() if role == "task" or option == "evaluation.prefix"}
    report = TaskReport(name, role, asked_how(task.prompt), own, graded_how(task.reward), task.target, task.licence)
    learned: set[bytes] = set()
    for split in sorted(options.splits, key=lambda split: split != "train"):  # the others are compared with it
        report.splits.append(_inspect_split(stream, name, split, processor, options.max_rows, progress, learned))
    report.splits.sort(key=lambda split: options.splits.index(split.split))
    # What is learned is shown as it is learned; what is only asked, as it is asked.
    order = ["train" if role == "task" else stream.evaluate_on, stream.evaluate_on, *options.splits]
    opened = [split.split for split in report.splits if split.error is None]
    chosen = next((split for split in order if split in opened), None)
    if chosen is not None:
        rows = stream.examples(name, chosen)
        report.examples = [show(row, processor) for row in readable(rows, options.num_examples)]
        report.contact_sheet = _draw(name, chosen, readable(rows, options.num_thumbnails), folder)
    return report


def _inspect_split(
    stream: TaskStream, name: str, split: Split, processor: PromptProcessor, max_rows: int | None, progress: Progress,
    learned: set[bytes],
) -> SplitReport:  # fmt: skip
    try:
        with opening(stream, name, progress):
            rows = stream.examples(name, split)
    except (ValueError, OSError) as error:
        return SplitReport(split, error=str(error).removeprefix(f"task '{name}': "))
    bar = progress.add_task(f"{name}, {split}", total=len(spaced(len(rows), max_rows)))
    report = measure_split(
        split, rows, processor, stream.max_prompt_tokens, max_rows, lambda: progress.advance(bar), learned
    )
    report.fingerprint = stream.fingerprint(name, split)
    source = stream.everything[name].source
    if isinstance(source, TableRows):
        report.num_left_out = source.num_left_out(split)
        report.num_without_options = source.num_without_options(split)
    progress.remove_task(bar)
    return report


def readable(rows: Sequence[Example], num_wanted: int) -> Iterator[Example]:
    """Evenly spaced rows, one at a time; those that cannot be read are left out here and counted elsewhere."""
    for index in spaced(len(rows), num_wanted):
        try:
            yield rows[index]
        except ValueError:
            continue


def _draw(name: str, split: str, examples: Iterator[Example], folder: Path) -> str | None:
    small = [with_thumbnails(example) for example in examples]
    if not small:
        return None
    path = folder / f"{name}.png"
    contact_sheet(f"{name}, {len(small)} {split} rows", small).save(path)
    return str(path)


def asked_how(prompt: Prompt) -> dict[str, str]:
    """What a prompt adds to a row's question."""
    texts = {"system": prompt.system, "prefix": prompt.prefix, "suffix": prompt.suffix}
    return {"style": prompt.style, **{name: text for name, text in texts.items() if text}}


def graded_how(reward: Reward) -> str:
    """A reward in a line."""
    parts = [f"{part.weight:g} {name}" for name, part in reward.extra.items()]
    if reward.format != "none":
        needs = " if in format" if reward.accuracy_needs_format else ""
        weights = f"{reward.accuracy_weight:g} accuracy{needs} + {reward.format_weight:g} {reward.format}"
        parts.insert(0, weights)
    elif parts:
        parts.insert(0, "accuracy")
    return f"{reward.kind_name} ({' + '.join(parts)})" if parts else reward.kind_name


def problems_of_prefixes(prefixes: dict[str, str], processor: PromptProcessor) -> list[str]:
    """Why replies cannot be made to begin so, where they cannot."""
    problems = []
    for option, text in prefixes.items():
        try:
            processor.encode_prefix(text)
        except ValueError as error:
            problems.append(f"{option}: {error}")
    return problems


def needed_splits(task: TaskReport, evaluate_on: str) -> set[str]:
    """Splits that a run opens: for learning, and for the evaluation."""
    return {evaluate_on, "train"} if task.role == "task" else {evaluate_on}


def problems_of(task: TaskReport, evaluate_on: str) -> list[str]:
    """What of a task would stop a run or spoil its numbers.

    A split that is not there is one only where the run needs it: for learning, or for the evaluation.
    """
    needed = needed_splits(task, evaluate_on)
    splits_of: dict[str, list[str]] = {}
    for split in task.splits:
        for problem in _problems_of_split(split, split.split in needed, "train" in needed and split.split == "train"):
            splits_of.setdefault(problem, []).append(split.split)
    return [f"{task.role} {task.name}, {', '.join(splits)}: {problem}" for problem, splits in splits_of.items()]


def _problems_of_split(split: SplitReport, is_needed: bool, is_learned: bool) -> Iterator[str]:
    if split.error is not None and is_needed:
        yield split.error
    for complaint in split.wrong_targets:
        yield f"{complaint.count:,} of {split.num_measured:,} rows: {complaint.what}"
    for complaint in split.refused:
        yield f"{complaint.count:,} of {split.num_measured:,} rows refused; first: {complaint.first}"
    if is_needed and _all_are_skipped(split):
        first = split.skipped[0].first
        yield f"all {split.num_measured:,} measured rows would be skipped for their images; first: {first}"
    if is_learned and 0 < split.num_too_long == split.num_measured:
        yield "every prompt is over data.max_prompt_tokens"


def _all_are_skipped(split: SplitReport) -> bool:
    return 0 < split.num_skipped == split.num_measured


def warnings_of(task: TaskReport, evaluate_on: str) -> list[str]:
    """What of a task a run would do all the same, and perhaps should not."""
    needed = needed_splits(task, evaluate_on)
    known = [
        f"task {task.name}, {split.split}: {split.num_learned:,} of {split.num_measured:,} measured rows stand in "
        "train too, in the same words with the same images: what they score may be remembered"
        for split in task.splits
        if split.num_learned and task.role == "task" and split.split in needed
    ]
    return known + [
        f"{task.role} {task.name}, {split.split}: {split.num_skipped / split.num_measured:.0%} of the measured rows "
        f"would be skipped for their images; first: {split.skipped[0].first}"
        for split in task.splits
        if split.num_skipped > MANY_SKIPPED * split.num_measured
        and not (split.split in needed and _all_are_skipped(split))  # which is a problem
    ]
