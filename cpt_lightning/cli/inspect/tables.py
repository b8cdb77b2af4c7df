"""An inspection as tables on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cpt_lightning.cli.inspect.report import Complaint, Report, Shown, SplitReport, Spread, TaskReport

MIN_WIDTH = 100
"""Columns that output which goes to a file gets at least."""


def console() -> Console:
    """Where reports are printed."""
    out = Console(highlight=False)
    out.width = out.width if out.is_terminal else max(out.width, MIN_WIDTH)
    return out


def stream_table(report: Report) -> Table:
    """What is learned in which order, and for how long."""
    table = Table("stage", "learns", title="the stream", title_justify="left", title_style="bold")
    for column in ("training rows", "steps", "passes"):
        table.add_column(column, justify="right")
    for number, stage in enumerate(report.stages, start=1):
        passes = "-" if stage.passes is None else f"{stage.passes:.2f}"
        name = Text(stage.name.replace("+", " + "))
        table.add_row(f"{number}", name, _count(stage.num_rows), _count(stage.num_steps), passes)
    return table


def task_section(task: TaskReport) -> RenderableType:
    """Everything about a task or probe."""
    parts: list[RenderableType] = [_facts(task), split_table(task.splits)]
    errors = dict.fromkeys(split.error for split in task.splits if split.error is not None)
    for error in errors:
        names = ", ".join(split.split for split in task.splits if split.error == error)
        parts.append(Text(f"{names} cannot be opened: {error}", style="yellow"))
    for split in task.splits:
        parts += [complaint_text(split, "skipped", "yellow", complaint) for complaint in split.skipped]
        parts += [complaint_text(split, "WOULD STOP THE RUN", "bold red", complaint) for complaint in split.refused]
        parts += [complaint_text(split, "WRONG DATA", "bold red", complaint) for complaint in split.wrong_targets]
    parts += [shown_panel(shown, task.prefixes) for shown in task.examples]
    if task.contact_sheet:
        parts.append(Text.assemble(("contact sheet  ", "dim"), task.contact_sheet))
    return Group(*parts)


def _facts(task: TaskReport) -> Text:
    texts = [f"{name} {text!r}" for name, text in task.prompt.items() if name != "style"]
    target = "the row's own, else its answer" if task.target is None else task.target
    facts = Text()
    for label, text in (
        ("asked", ", ".join([f"style {task.prompt['style']}", *texts])),
        *_beginnings(task.prefixes),
        ("graded", task.reward),
        ("SFT target", target),
        *([("licence", task.licence)] if task.licence else []),
    ):
        facts.append(f"{label:12}", style="dim").append(f"{text}\n")
    return facts


def _beginnings(prefixes: Mapping[str, str]) -> list[tuple[str, str]]:
    """What replies are made to begin with, and by which options, each text once."""
    options = {text: [option for option, other in prefixes.items() if other == text] for text in prefixes.values()}
    return [("begins with", f"{text!r} ({', '.join(names)})") for text, names in options.items()]


def split_table(splits: Sequence[SplitReport]) -> Table:
    """Numbers of a task's splits, a column for each."""
    legend = CAPTION if any(split.error is None for split in splits) else None
    table = Table(show_edge=False, pad_edge=False, caption=legend, caption_justify="left")
    table.add_column("", no_wrap=True)
    for split in splits:
        table.add_column(split.split, justify="right", overflow="fold")
    table.add_row("rows", *[_rows(split) for split in splits])
    for label, cell in ROWS:
        cells = [Text("") if split.error is not None else _as_text(cell(split)) for split in splits]
        if any(cells):
            table.add_row(label, *cells)
    return table


def _as_text(cell: str | Text) -> Text:
    """As it is: an answer in square brackets is no markup."""
    return cell if isinstance(cell, Text) else Text(cell)


def _rows(split: SplitReport) -> str:
    text = _count(split.num_rows)
    return f"{split.num_measured:,} measured of {text}" if 0 < split.num_measured != split.num_rows else text


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _spread(spread: Spread | None, with_p95: bool = True) -> str:
    if spread is None:
        return ""
    middle = [spread.median, spread.p95] if with_p95 else [spread.median]
    values = [spread.minimum, *middle, spread.maximum]
    return f"{values[0]:,}" if values[0] == values[-1] else " · ".join(f"{value:,}" for value in values)


def _sizes(split: SplitReport) -> str:
    shown = list(dict.fromkeys(f"{width}x{height}" for width, height in split.image_sizes))
    return shown[0] if len(shown) == 1 else " · ".join(f"{width}x{height}" for width, height in split.image_sizes)


def _answers(split: SplitReport) -> str:
    if split.answers is None:
        return ""
    return "\n".join(f"{_clip(answer)}  {100 * share:4.1f} %" for answer, share in split.answers.most_frequent)


def _clip(text: str, width: int = 28) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _too_long(split: SplitReport) -> str:
    if not split.num_too_long:
        return ""
    return f"{split.num_too_long:,} {'left out' if split.split == 'train' else 'asked all the same'}"  # as Collate does


def _total(complaints: Sequence[Complaint], style: str) -> Text:
    count = sum(complaint.count for complaint in complaints)
    return Text(f"{count:,}" if count else "", style=style)


def _earned(split: SplitReport) -> str:
    parts = {name: value for name, value in split.target_earns.items() if name != "total"}
    return "\n".join(f"{name} {value:.3f}" for name, value in parts.items())


def _baseline(split: SplitReport) -> str:
    return "" if split.answers is None else f"{100 * split.answers.baseline:.1f} %"


ROWS: tuple[tuple[str, Callable[[SplitReport], str | Text]], ...] = (
    ("  besides, left out by the source", lambda split: _count(split.num_left_out) if split.num_left_out else ""),
    (
        "  of the source's, without options",
        lambda split: _count(split.num_without_options) if split.num_without_options else "",
    ),
    ("  skipped for their images", lambda split: _total(split.skipped, "yellow")),
    ("  that would stop a run", lambda split: _total(split.refused, "bold red")),
    ("  over the limit of tokens", _too_long),
    ("images of a row", lambda split: _spread(split.images_per_row, with_p95=False)),
    ("image size", _sizes),
    ("prompt tokens", lambda split: _spread(split.prompt_tokens)),
    ("  of them of images", lambda split: _spread(split.image_tokens)),
    ("SFT target tokens", lambda split: _spread(split.target_tokens)),
    ("SFT target earns", _earned),
    ("  wrong by the task's reward", lambda split: _total(split.wrong_targets, "bold red")),
    ("different answers", lambda split: "" if split.answers is None else f"{split.answers.num_distinct:,}"),
    ("  most frequent", _answers),
    ("  always the first earns", _baseline),
    ("fingerprint", lambda split: split.fingerprint or ""),
)
"""Of the table of splits: a label, and the cell of a split; a row whose cells are all empty is left out."""
CAPTION = "tokens: min · median · p95 · max, sizes: min · median · max, one number where all are equal"


def complaint_text(split: SplitReport, label: str, style: str, complaint: Complaint) -> Text:
    """A fault of the data with its first row."""
    text = Text(f"{label}: ", style=style)
    text.append(f"{complaint.count:,} of {split.num_measured:,} {split.split} rows: {complaint.what}\n")
    return text.append(f"  first: {complaint.first}", style="not bold")


def shown_panel(shown: Shown, prefixes: Mapping[str, str]) -> Panel:
    """An example, told apart from what is said about it."""
    prompt = Text(shown.prompt.rstrip("\n"))
    prompt.highlight_regex(r"<\|[^|]*\|>(?: x \d+)?", "dim cyan")
    gold = shown.gold if isinstance(shown.gold, str) else " | ".join(shown.gold)
    earns = ", ".join(f"{name} {value:g}" for name, value in shown.earns.items())
    about = Text()
    for label, value in (
        *_beginnings(prefixes),
        ("answer", gold),
        ("SFT target", shown.target or "none"),
        ("it earns", earns or "nothing: the reward cannot grade it"),
    ):
        about.append(f"{label:12}", style="dim").append(f"{value}\n", style="" if label == "it earns" else "green")
    about.rstrip()
    title = Text(shown.row_id)
    return Panel(Group(prompt, Rule(style="dim"), about), title=title, title_align="left", border_style="dim")


def overview(report: Report) -> Table:
    """A line for each task and probe, of the split that is evaluated; numbers are whole on a narrow terminal too."""
    table = Table(title=f"at a glance: the {report.evaluate_on} split", title_justify="left", title_style="bold")
    table.add_column("task", no_wrap=True)
    for column in ("rows", "longest\nprompt", "longest\ntarget", "always\none answer"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("asked", overflow="fold")
    table.add_column("graded", overflow="fold")
    roles = [task.role for task in report.tasks]
    for task, following in zip(report.tasks, [*roles[1:], roles[-1]], strict=True):
        split = next((split for split in task.splits if split.split == report.evaluate_on), None)
        label = Text(task.name) if task.role == "task" else Text.assemble(("probe ", "dim"), task.name)
        kind = task.reward.split(" ")[0]
        table.add_row(label, *_glance(split), task.prompt["style"], kind, end_section=following != task.role)
    return table


def _glance(split: SplitReport | None) -> list[str]:
    if split is None or split.error is not None:
        return ["-"] * 4
    longest = [f"{spread.maximum:,}" if spread else "-" for spread in (split.prompt_tokens, split.target_tokens)]
    return [_count(split.num_rows), *longest, _baseline(split) or "-"]


def warning_lines(warnings: Sequence[str]) -> list[Text]:
    """What may be meant, a line each."""
    return [Text.assemble(("warning: ", "yellow"), warning) for warning in warnings]


def problem_panel(problems: Sequence[str]) -> RenderableType:
    """What must be mended before a run, or that there is nothing."""
    if not problems:
        return Text("no problem was found", style="green")
    lines = Text("\n").join(Text(f"- {problem}") for problem in problems)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return Panel(lines, title=count, title_align="left", border_style="bold red")
