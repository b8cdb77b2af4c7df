"""A run's folder, read: whatever it has, and ``None`` for what an older, shorter or other run has not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cpt_lightning.records.environment import FILENAME as ENVIRONMENT
from cpt_lightning.records.logged import Logged
from cpt_lightning.records.matrix import AccuracyMatrix

SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C reads a resolved configuration ten times as fast, where PyYAML was built with it."""

CONFIG = "config.yaml"
OLDER_CONFIG = "config_until_step_{}.yaml"
"""Options that a run had up to a step, at which it went on with others."""
MATRIX = "accuracy_matrix.json"
SAMPLES = "samples.jsonl"
DRIFT = "drift.json"
DIVERGENCES = "forward_kl_per_answer", "reverse_kl_per_answer"
WEIGHT_DISTANCE = "weight_distance.json"
INFLUENCE = "influence.json"
GRADIENT_RISK = "gradient_risk.json"
WEIGHT_CHANGE = "weight_change.json"
STUDY = "study.json"
MARKS = CONFIG, MATRIX
"""What tells a run's folder from another: the first files that are written."""


@dataclass(frozen=True)
class JudgedStage:
    """What a rollout filter found about the rows of a stage.

    Args:
        header: What the verdicts depend on, and how rows were chosen.
        rows: A verdict each.
        is_finished: Whether all rows were judged, and those to keep chosen.
    """

    header: dict[str, Any]
    rows: list[dict[str, Any]]
    is_finished: bool

    @property
    def num_completions(self) -> int:
        """What this run sampled for it: nothing if it took over what another run had judged."""
        if self.header.get("filter_from") is not None:
            return 0
        return self.header["completions_per_row"] * sum(row["refused"] is None for row in self.rows)


@dataclass(frozen=True)
class RunFolder:
    """What a run left. Everything is read when it is asked for.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: There is no such folder, or no run has written to it.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # given as text too
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is no folder; name the folder of a run, such as runs/demo_grpo")
        if not is_run(self.path):
            raise FileNotFoundError(
                f"{self.path} has neither {CONFIG} nor {MATRIX}: it is not the folder of a run that `cpt fit` began"
            )

    # -- how far it came -----------------------------------------------------------------------------------------------

    @cached_property
    def matrix(self) -> AccuracyMatrix | None:
        """What it scored; ``None`` as long as nothing was evaluated."""
        path = self.path / MATRIX
        if not path.exists():
            return None
        try:
            found = AccuracyMatrix.load(path)
            found.metrics()  # complains where a cell is missing, or holds no number
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(path, error) from None
        return found

    @property
    def num_stages(self) -> int:
        """Stages that are learned and evaluated."""
        return 0 if self.matrix is None else len(self.matrix.rows)

    @property
    def is_finished(self) -> bool:
        """Whether all stages are."""
        return self.matrix is not None and self.num_stages == len(self.matrix.stages)

    # -- what it was told ----------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """Its resolved options."""
        path = self.path / CONFIG
        if not path.exists():
            return None
        try:
            found = SafeLoader(path.read_text(encoding="utf-8")).get_single_data()
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise _broken(path, error) from None
        if not isinstance(found, dict):
            raise _broken(path, "it holds no options")
        return found

    @property
    def changed_at(self) -> list[int]:
        """Steps at which it went on with other options than it had."""
        prefix, suffix = OLDER_CONFIG.split("{}")
        found = self.path.glob(OLDER_CONFIG.format("*"))
        return sorted(int(path.name.removeprefix(prefix).removesuffix(suffix)) for path in found)

    @property
    def seed(self) -> int | None:
        """Of all that is random."""
        return (self.config or {}).get("seed_everything")

    @cached_property
    def last_start(self) -> dict[str, Any] | None:
        """Versions, device, commit: with what it was last started or gone on with."""
        path = self.path / ENVIRONMENT
        starts = _part(path, "starts") if path.exists() else []
        return starts[-1] if starts else None

    # -- what it wrote on the way --------------------------------------------------------------------------------------

    @cached_property
    def seconds(self) -> float | None:
        """How long its commands took, where ``cpt study`` gave them."""
        path = self.path / STUDY
        return _part(path, "seconds") if path.exists() else None

    @cached_property
    def drift(self) -> list[dict[str, Any]] | None:
        """Measured divergences from the base, in their order."""
        return _measurements(self.path / DRIFT, {"stage", "step", "name", *DIVERGENCES})

    @cached_property
    def weight_distance(self) -> list[dict[str, Any]] | None:
        """Measured distances of the weights from the base's, one for each stage."""
        return _measurements(self.path / WEIGHT_DISTANCE, {"stage", "distance"})

    @cached_property
    def influence(self) -> list[dict[str, Any]] | None:
        """What single updates did to prior knowledge, one for each that was measured."""
        return _measurements(self.path / INFLUENCE, {"stage", "step", "base_perplexity", "on"})

    @cached_property
    def gradient_risk(self) -> list[dict[str, Any]] | None:
        """The forgetting risk of updates, one for each batch that was measured."""
        return _measurements(self.path / GRADIENT_RISK, {"stage", "step", "grad_norm"})

    @cached_property
    def weight_change(self) -> list[dict[str, Any]] | None:
        """What each stage did to the weights."""
        return _measurements(self.path / WEIGHT_CHANGE, {"stage", "relative_norm", "changed_fraction"})

    @cached_property
    def verdicts(self) -> dict[str, JudgedStage]:
        """Those of a rollout filter, by the name of the stage, in their order."""
        lines = {path: list(_lines(path)) for path in sorted(self.path.glob("filter/*.jsonl"))}
        found = {path.name.split(".")[0]: _verdicts(path, *rows) for path, rows in lines.items() if rows}
        return dict(sorted(found.items(), key=lambda judged: judged[1].header.get("stage", 0)))

    @property
    def num_collected(self) -> int:
        """Completions that ``cpt predict`` sampled into the folder or one within it."""
        return sum(_part(path, "num_completions") for path in self.path.glob("**/*_summary.json"))

    @cached_property
    def logged(self) -> Logged:
        """The scalars of its event files."""
        return Logged.load(self.path)

    def samples(self) -> Iterator[dict[str, Any]]:
        """Every answer of every evaluation, read anew each time, for they may be many; none if none were kept.

        Raises:
            ValueError: The file is empty though there were evaluations, or a line is no answer.
        """
        path = self.path / SAMPLES
        number = 0
        for number, row in enumerate(_lines(path), start=1):
            _check_fields(path, f"line {number}", row, {"row_id", "task", "stage", "accuracy", "completion"})
            yield row
        if path.exists() and number == 0 and self.num_stages:
            raise _broken(path, f"it is empty, but {MATRIX} has scores of {self.num_stages} stages")


def is_run(path: str | Path) -> bool:
    """Whether a run has been begun in a folder."""
    return any((Path(path) / mark).exists() for mark in MARKS)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(path, error) from None


def _part(path: Path, key: str) -> Any:
    try:
        return _json(path)[key]
    except (KeyError, TypeError) as error:
        raise _broken(path, error) from None


def _measurements(path: Path, needed: set[str]) -> list[dict[str, Any]] | None:
    """The entries of an analysis; ``None`` where it was not made."""
    if not path.exists():
        return None
    found = _part(path, "measurements")
    for number, row in enumerate(found):
        _check_fields(path, f"measurements[{number}]", row, needed)
    return found


def _check_fields(path: Path, where: str, row: dict[str, Any], needed: set[str]) -> None:
    if missing := needed - set(row):
        raise _broken(path, f"{where} has no {', '.join(sorted(missing))}")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file, without a last one that a kill cut off."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line.decode())
            except ValueError as error:
                raise _broken(path, f"line {number}: {error}") from None
            if not isinstance(row, dict):
                raise _broken(path, f"line {number} is no JSON object")
            yield row


def _verdicts(path: Path, header: dict[str, Any], *rows: dict[str, Any]) -> JudgedStage:
    if "completions_per_row" not in header:
        raise _broken(path, "line 1 has no completions_per_row")
    for number, row in enumerate(rows, start=2):
        _check_fields(path, f"line {number}", row, {"refused", "pass_count"})
    return JudgedStage(header, list(rows), is_finished=not path.name.endswith(".judging.jsonl"))


def _broken(path: Path, why: object) -> ValueError:
    said = f"{why.args[0]!r} is missing" if isinstance(why, KeyError) else str(why)
    return ValueError(f"{path} cannot be read: {said}; restore it, or move it away to report without it")
