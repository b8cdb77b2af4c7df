"""Which test rows a run gained and lost, and what it said about some of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cpt_lightning.records import RunFolder

NUM_SHOWN = 2
"""Of each task or probe and kind."""
STEP = 0.5
"""A row is gained or lost where its score rose or fell by as much."""

Cell = tuple[str, int]
"""A task or probe, and the stage after which it was evaluated; 0 is before the first."""


@dataclass(frozen=True)
class Change:
    """A row that was answered right at one time and wrong at the other.

    Args:
        row_id: Its name.
        position: Of the row among those of its task.
        prompt: What was asked.
        gold: The reference answer.
        before: The completion before.
        after: The completion at the end.
        images: Addresses of what was asked about, if they were looked up.
    """

    row_id: str
    position: int
    prompt: str
    gold: str
    before: str
    after: str
    images: list[str] = field(default_factory=list)


@dataclass
class Changes:
    """What became of a task's or probe's test rows.

    Args:
        name: Of the task or probe.
        since: What the end is compared with, when rows were lost: ``learned`` or ``base``.
        num_rows: Rows that were answered at both times.
        num_gained: Wrong by the base and right at the end; ``None`` where the base was not asked.
        num_lost: Right when the task had just been learned (of a probe: by the base), and wrong at the end.
        gained: Some of them.
        lost: Some of them.
    """

    name: str
    since: str
    num_rows: int = 0
    num_gained: int | None = None
    num_lost: int = 0
    gained: list[Change] = field(default_factory=list)
    lost: list[Change] = field(default_factory=list)


def changes_of(run: RunFolder) -> list[Changes]:
    """What became of the test rows of every task and probe; nothing where the run did not keep all last answers."""
    matrix = run.matrix
    scores: dict[Cell, dict[str, float]] = {}
    for row in run.samples():
        scores.setdefault((row["task"], row["stage"]), {})[row["row_id"]] = row["accuracy"]
    if matrix is None or not scores:
        return []
    last = len(matrix.rows)
    ends = matrix.rows[-1] if matrix.rows else matrix.zero_shot or {}
    if any(len(scores.get((name, last), {})) != cell["num_samples"] for name, cell in ends.items()):
        return []
    learned = {task: at + 1 for task, at in zip(matrix.tasks, matrix.learned_at, strict=True) if at < last}
    found: list[Changes] = []
    picked: list[tuple[list[Change], Cell, str, int]] = []
    for name in matrix.names:
        since, base = learned.get(name, 0), scores.get((name, 0), {})
        end, before = scores.get((name, last), {}), scores.get((name, since), {})
        gained = [(row, at) for at, row in enumerate(end) if end[row] - base.get(row, 1.0) >= STEP]
        lost = [(row, at) for at, row in enumerate(end) if before.get(row, 0.0) - end[row] >= STEP]
        num_gained = len(gained) if base else None
        changes = Changes(name, "learned" if since else "base", len(end), num_gained, len(lost))
        picked += [(changes.gained, (name, 0), *row) for row in gained[:NUM_SHOWN]]
        picked += [(changes.lost, (name, since), *row) for row in lost[:NUM_SHOWN]]
        found.append(changes)
    _fill_in(picked, run, last)
    return found


def _fill_in(picked: list[tuple[list[Change], Cell, str, int]], run: RunFolder, last: int) -> None:
    """Reads the answers that are shown, and these alone: all of them may not fit into memory."""
    wanted = {(name, at, row) for _, (name, stage), row, _ in picked for at in (stage, last)}
    said: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in run.samples():
        if (key := (row["task"], row["stage"], row["row_id"])) in wanted:
            said[key] = row
    for changes, (name, stage), row_id, position in picked:
        before, after = said[name, stage, row_id], said[name, last, row_id]
        texts = before["completion"], after["completion"]
        changes.append(Change(row_id, position, after.get("prompt", ""), _text(after.get("gold")), *texts))


def _text(gold: Any) -> str:
    return ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold)
