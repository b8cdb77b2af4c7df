"""What a reader must know before trusting a comparison."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

from cpt_lightning.records import AccuracyMatrix, RunFolder
from cpt_lightning.report.arms import Arm
from cpt_lightning.report.settings import leaves

T = TypeVar("T")

MEASURE = {
    "model.init_args.backbone.min_pixels": "pixels",
    "model.init_args.backbone.max_pixels": "pixels",
    "model.init_args.evaluation": "how answers are sampled",
    "model.init_args.forced_prefix": "the forced prefix",
    "data.max_prompt_tokens": "the longest prompt",
    "data.evaluate_on": "the split",
}
"""Options (or their beginnings) that decide scores besides the model, and what they set."""


def cautions(arms: Sequence[Arm]) -> list[str]:
    """A sentence for each reason why figures do not compare, or say less than they seem to."""
    runs = [(_name(arm, seed), run) for arm in arms for seed, run in arm.runs.items()]
    scored = [(name, run.matrix) for name, run in runs if run.matrix is not None]
    return [*_unfinished(runs), *_streams(scored), *_asked(scored), *_measured(runs), *_bases(scored), *_seeds(arms)]


def _name(arm: Arm, seed: int | str) -> str:
    return f"{arm.name}, seed {seed}" if len(arm.runs) > 1 else arm.name


def _unfinished(runs: Sequence[tuple[str, RunFolder]]) -> Iterator[str]:
    for _, run in runs:
        if run.matrix is None:
            yield f"{run.path} is not finished: nothing has been measured yet."
        elif not run.is_finished:
            yield (
                f"{run.path} is not finished: {run.num_stages} of {len(run.matrix.stages)} stages are learned, and its "
                "figures are about these alone."
            )


def _streams(scored: Sequence[tuple[str, AccuracyMatrix]]) -> Iterator[str]:
    yield from _differ("learn other tasks, or in another order", scored, lambda matrix: str(matrix.stages))
    yield from _differ("have other probes", scored, lambda matrix: str(sorted(matrix.probes)))


def _asked(scored: Sequence[tuple[str, AccuracyMatrix]]) -> Iterator[str]:
    """Prompts, references, graders and rows."""
    for name in dict.fromkeys(name for _, matrix in scored for name in matrix.names):
        having = [(run, matrix) for run, matrix in scored if name in matrix.names]
        prints = [(run, matrix) for run, matrix in having if name in matrix.fingerprints]
        yield from _differ(
            f"ask or grade {name} otherwise (fingerprints differ), so its scores do not compare",
            prints, lambda matrix, name=name: matrix.fingerprints[name],
        )  # fmt: skip
        counts = [(run, matrix) for run, matrix in having if matrix.rows]
        yield from _differ(
            f"were scored on another number of rows of {name}",
            counts, lambda matrix, name=name: matrix.rows[-1][name]["num_samples"],
        )  # fmt: skip
    if unmarked := [run for run, matrix in scored if not matrix.fingerprints]:
        yield f"{', '.join(unmarked)}: written before fingerprints, so whether prompts and graders agree is not known."


def _measured(runs: Sequence[tuple[str, RunFolder]]) -> Iterator[str]:
    """Pixels, sampling and the like, which fingerprints leave out."""
    told = [(name, dict(leaves(run.config))) for name, run in runs if run.config is not None]
    for option, meaning in MEASURE.items():
        names = sorted({name for _, options in told for name in options if f"{name}.".startswith(f"{option}.")})
        for name in names:
            having = [(run, options) for run, options in told if name in options]
            yield from _differ(f"differ in {meaning} ({name})", having, lambda options, name=name: options[name])


def _bases(scored: Sequence[tuple[str, AccuracyMatrix]]) -> Iterator[str]:
    based = [(run, matrix.zero_shot) for run, matrix in scored if matrix.zero_shot is not None]
    shared = sorted(set.intersection(*(set(scores) for _, scores in based))) if based else []
    yield from _differ(
        "began from another base, as its scores before training show, so that changes since the base do not compare",
        based, lambda scores: tuple(round(scores[name]["accuracy"], 4) for name in shared),
    )  # fmt: skip


def _seeds(arms: Sequence[Arm]) -> Iterator[str]:
    if single := [arm.name for arm in arms if len(arm.runs) == 1]:
        yield f"One seed: {', '.join(single)}. Intervals hold for other test rows, not for other seeds."


def _differ(what: str, runs: Sequence[tuple[str, T]], key: Callable[[T], Hashable]) -> Iterator[str]:
    """A sentence that names who is apart from the first, if anyone is."""
    groups: dict[Hashable, list[str]] = {}
    for name, thing in runs:
        groups.setdefault(key(thing), []).append(name)
    if len(groups) > 1:
        first, *others = groups.items()
        apart = "; ".join(f"{', '.join(names)}{_value(value)}" for value, names in others)
        yield f"Some {what}: {apart}, against {first[1][0]}{_value(first[0])}."


def _value(value: Hashable) -> str:
    return f" ({value})" if isinstance(value, str | int) else ""
