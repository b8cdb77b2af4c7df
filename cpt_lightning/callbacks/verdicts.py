"""What a model's attempts at the rows of a stage say about them: verdicts, which rows are kept, and their file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cpt_lightning.callbacks.files import append_lines, keep_lines, replace_text

Mode = Literal["solvable", "unsolvable", "random"]
"""Rows inside the window, an equal number below it, or an equal number of any."""


@dataclass
class Window:
    """Which rows are kept, by how many of a row's attempts passed.

    Args:
        mode: What is kept.
        lowest: Fewest passes of a solvable row.
        highest: Most.
        cap: Most rows kept; drawn at random from those in the window.
        key: Keys the draws.
    """

    mode: Mode
    lowest: int
    highest: int
    cap: int | None
    key: Sequence[int]

    def decide(self, verdicts: Sequence[dict]) -> list[dict]:
        """The verdicts with ``kept`` and ``reason``.

        Raises:
            ValueError: There are fewer unsolvable rows than solvable ones, so that the arms differ in size.
        """
        usable = [index for index, verdict in enumerate(verdicts) if verdict["refused"] is None]
        passes = {index: verdicts[index]["pass_count"] for index in usable}
        solvable = [index for index in usable if self.lowest <= passes[index] <= self.highest]
        pools = {
            "solvable": solvable,
            "unsolvable": [index for index in usable if passes[index] < self.lowest],
            "random": usable,
        }
        size = len(solvable) if self.cap is None else min(len(solvable), self.cap)
        pool = pools[self.mode]
        if len(pool) < size:
            raise ValueError(
                f"filter.mode={self.mode}: only {len(pool)} rows have fewer than {self.lowest} passes, but {size} are "
                f"solvable; set filter.cap={len(pool)} in all arms, so that they have equal size"
            )
        drawn = np.random.default_rng(list(self.key)).permutation(len(pool))[:size]
        kept = {pool[index] for index in drawn}
        return [
            {**verdict, "kept": index in kept, "reason": self._reason(verdict, index in pool, index in kept)}
            for index, verdict in enumerate(verdicts)
        ]

    def _reason(self, verdict: dict, in_pool: bool, kept: bool) -> str:
        if verdict["refused"] is not None:
            return verdict["refused"]
        if in_pool:
            return self.mode if kept else "not drawn"
        side = "fewer" if verdict["pass_count"] < self.lowest else "more"
        return f"{side} passes than filter.{'lowest' if side == 'fewer' else 'highest'}"


class VerdictFile:
    """``filter/<stage>.jsonl``: a header line, then a line per row; ``<stage>.judging.jsonl`` until all are judged.

    Args:
        folder: The run directory.
        name: Name of the stage.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / "filter" / f"{name}.jsonl"
        self.judging = self.path.with_suffix(".judging.jsonl")

    def read(self) -> tuple[dict[str, Any], list[dict]] | None:
        """Header and verdicts of the finished file; else of the unfinished one, without a line that a kill cut off."""
        if not self.path.exists():
            keep_lines(self.judging, lambda row: True)
        path = self.path if self.path.exists() else self.judging
        if not path.exists():
            return None
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return (lines[0], lines[1:]) if lines else None

    def begin(self, header: Mapping[str, Any]) -> None:
        """Begins anew."""
        self.path.unlink(missing_ok=True)
        replace_text(self.judging, json.dumps(header) + "\n")

    def append(self, verdicts: Sequence[dict]) -> None:
        """Adds verdicts of rows that were just judged."""
        append_lines(self.judging, verdicts)

    def finish(self, header: Mapping[str, Any], verdicts: Sequence[dict]) -> None:
        """Puts the finished file in the place of what there was."""
        rows = [json.dumps(row, ensure_ascii=False) for row in (header, *verdicts)]
        replace_text(self.path, "\n".join(rows) + "\n")
        self.judging.unlink(missing_ok=True)
