"""What a model's attempts at the rows of a stage came to, and the file that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cpt_lightning.records.files import append_lines, keep_lines, replace_text


@dataclass
class Verdict:
    """What the attempts at a row came to.

    Args:
        task: The row's task.
        row: Its number in the task's training rows.
        row_id: Its name.
        pass_count: Attempts that were right and in the format asked for.
        mean_reward: Mean total reward of all attempts.
        completion: An attempt that passed, or the first one.
        refused: Why the row was not tried, for it cannot be learned from.
        time_s: What the attempts took: the time of their batch, in equal parts.
        kept: Whether the row is learned from.
        reason: Why it is, or is not.
    """

    task: str
    row: int
    row_id: str
    pass_count: int
    mean_reward: float
    completion: str | None
    refused: str | None
    time_s: float = 0.0
    kept: bool | None = None
    reason: str | None = None


class VerdictFile:
    """``filter/<stage>.jsonl``: a header line, then a verdict a line; ``<stage>.judging.jsonl`` until rows are chosen.

    Args:
        folder: The run directory.
        name: Name of the stage.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / "filter" / f"{name}.jsonl"
        self.judging = self.path.with_suffix(".judging.jsonl")

    def begin(self, header: Mapping[str, Any]) -> list[Verdict]:
        """Goes on behind the verdicts that were made under the same header; under another one they are given up."""
        keep_lines(self.judging, lambda line: True)
        found = _read(self.path) or _read(self.judging)
        if found is not None:
            other = [name for name, now in header.items() if found[0].get(name) != now]
            if not other:
                rank_zero_info(f"filter: {len(found[1])} rows were judged before, see {self.path.parent}")
                return found[1]
            rank_zero_warn(
                f"filter: {self.path.parent} has {len(found[1])} verdicts of '{self.path.stem}' that differ in "
                f"{', '.join(other)}; its rows are judged again"
            )
        self.path.unlink(missing_ok=True)
        replace_text(self.judging, json.dumps(header) + "\n")
        return []

    def append(self, verdicts: Sequence[Verdict]) -> None:
        """Adds verdicts on rows that were just judged; what was finished before stands."""
        append_lines(self.judging, map(asdict, verdicts))

    def finish(self, header: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
        """Writes the whole file in the place of what there was."""
        rows = [json.dumps(row, ensure_ascii=False) for row in (dict(header), *map(asdict, verdicts))]
        replace_text(self.path, "\n".join(rows) + "\n")
        self.judging.unlink(missing_ok=True)

    def taken_over(self, expected: Mapping[str, Any]) -> list[Verdict]:
        """All verdicts of the finished file, for another run.

        Args:
            expected: What its header must say.

        Raises:
            ValueError: There is no such file, or its rows were judged otherwise.
        """
        found = _read(self.path)
        if found is None:
            raise ValueError(
                f"filter_from: {self.path} is missing; name the folder of a run that judged every stage of the stream"
            )
        for option, now in expected.items():
            if (before := found[0].get(option)) != now:
                raise ValueError(
                    f"filter_from: {self.path} has {option}={before}, this run {now}; give this run the same data and "
                    "filter options, or let it judge its rows itself"
                )
        return found[1]


def _read(path: Path) -> tuple[dict[str, Any], list[Verdict]] | None:
    if not path.exists() or not (lines := path.read_text(encoding="utf-8").splitlines()):
        return None
    return json.loads(lines[0]), [Verdict(**json.loads(line)) for line in lines[1:]]
