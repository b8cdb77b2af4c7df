"""What a reader must know before trusting a comparison."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from cpt_lightning.records import AccuracyMatrix, RunFolder
from cpt_lightning.report.arms import Arm
from cpt_lightning.report.settings import leaves

MEASURE = {
    "model.init_args.backbone.min_pixels": "pixels",
    "model.init_args.backbone.max_pixels": "pixels",
    "model.init_args.evaluation": "how answers are sampled",
    "model.init_args.forced_prefix": "the forced prefix",
    "data.max_prompt_tokens": "the longest prompt",
    "data.evaluate_on": "the split",
}
"""Options (or their beginnings) that decide scores besides the model, and what they set."""


class Seed(NamedTuple):
    """A run, as one of so many seeds of an arm."""

    arm: str
    seed: int | str
    num_seeds: int


def listed(seeds: Iterable[Seed]) -> str:
    """Runs as a sentence names them: where all seeds of an arm are meant, the arm.

    >>> listed([Seed("sft", 0, 2), Seed("sft", 1, 2), Seed("grpo", 1, 2), Seed("joint", 0, 1)])
    'sft, grpo (seed 1), joint'
    """
    said = []
    for arm, group in groupby(seeds, lambda each: each.arm):
        meant = list(group)
        said += [arm] if len(meant) == meant[0].num_seeds else [f"{arm} (seed {each.seed})" for each in meant]
    return ", ".join(said)


def cautions(arms: Sequence[Arm]) -> list[str]:
    """A sentence for each reason why figures do not compare, or say less than they seem to."""
    runs = [(Seed(arm.name, seed, len(arm.runs)), run) for arm in arms for seed, run in arm.runs.items()]
    scored = [(seed, run.matrix) for seed, run in runs if run.matrix is not None]
    return [
        *_unfinished(runs),
        *_changed(runs),
        *_uncounted(runs),
        *_extended(scored),
        *_streams(scored),
        *_asked(scored),
        *_measured(runs),
        *_bases(scored),
        *_seeds(arms),
    ]


def _unfinished(runs: Sequence[tuple[Seed, RunFolder]]) -> Iterator[str]:
    for _, run in runs:
        if run.matrix is None:
            yield f"{run.path} is not finished: nothing has been measured yet."
        elif not run.is_finished:
            yield (
                f"{run.path} is not finished: {run.num_stages} of {len(run.matrix.stages)} stages are learned, and its "
                "figures are about these alone."
            )


def _changed(runs: Sequence[tuple[Seed, RunFolder]]) -> Iterator[str]:
    for _, run in runs:
        if steps := run.changed_at:
            yield (
                f"{run.path} went on with other options at step {', '.join(map(str, steps))}; those named here are its "
                "last."
            )


def _uncounted(runs: Sequence[tuple[Seed, RunFolder]]) -> Iterator[str]:
    for _, run in runs:
        logger = ((run.config or {}).get("trainer") or {}).get("logger")
        if logger is not None and not run.logged.values:
            yield (
                f"{run.path} holds no TensorBoard events and no whole metrics.csv, for it logged elsewhere or not at "
                "all: rows, rollouts, tokens and memory that it took are not known here."
            )


def _extended(scored: Sequence[tuple[Seed, AccuracyMatrix]]) -> Iterator[str]:
    for run, matrix in scored:
        if matrix.added:
            yield (
                f"{listed([run])} was extended by {', '.join(matrix.added)} on the way: the base was not asked about "
                "that, and FWT and changes since the base are about the rest. Forgetting and worst dip of it count "
                "from when it came, which is in its favour beside runs that had it all along."
            )


def _streams(scored: Sequence[tuple[Seed, AccuracyMatrix]]) -> Iterator[str]:
    stages = [(run, json.dumps(matrix.stages)) for run, matrix in scored]
    yield from _apart("learn other tasks, or in another order", _groups(stages))
    probes = [(run, frozenset(matrix.probes)) for run, matrix in scored]
    yield from _apart("have other probes", _groups(probes))


def _asked(scored: Sequence[tuple[Seed, AccuracyMatrix]]) -> Iterator[str]:
    """Prompts, references, graders and rows; tasks in which the same runs are apart share a sentence."""
    prints: dict[tuple, list[str]] = {}
    counts: dict[tuple, list[str]] = {}
    for name in dict.fromkeys(name for _, matrix in scored for name in matrix.names):
        having = [(run, matrix) for run, matrix in scored if name in matrix.names]
        marked = [(run, matrix.fingerprints[name]) for run, matrix in having if name in matrix.fingerprints]
        last = [(run, matrix.rows[-1]) for run, matrix in having if matrix.rows]
        counted = [(run, scores[name]["num_samples"]) for run, scores in last if name in scores]
        prints.setdefault(_groups(marked), []).append(name)
        counts.setdefault(_groups(counted), []).append(name)
    for groups, names in prints.items():
        what = f"ask or grade {', '.join(names)} otherwise (fingerprints differ), so these scores do not compare"
        yield from _apart(what, groups)
    for groups, names in counts.items():
        yield from _apart(f"were scored on another number of rows of {', '.join(names)}", groups)
    if unmarked := [run for run, matrix in scored if not matrix.fingerprints]:
        yield f"{listed(unmarked)}: written before fingerprints, so whether prompts and graders agree is not known."


def _measured(runs: Sequence[tuple[Seed, RunFolder]]) -> Iterator[str]:
    """Pixels, sampling and the like, which fingerprints leave out."""
    told = [(seed, dict(leaves(run.config))) for seed, run in runs if run.config is not None]
    for option, meaning in MEASURE.items():
        names = sorted({name for _, options in told for name in options if f"{name}.".startswith(f"{option}.")})
        for name in names:
            values = [(run, options[name]) for run, options in told if name in options]
            shown = ", ".join(dict.fromkeys(value for _, value in values))
            yield from _apart(f"differ in {meaning} ({name}: {shown})", _groups(values))


def _bases(scored: Sequence[tuple[Seed, AccuracyMatrix]]) -> Iterator[str]:
    """On what all were asked alike."""
    based = [(run, matrix, matrix.zero_shot) for run, matrix in scored if matrix.zero_shot is not None]
    names = [name for name in (based[0][1].names if based else []) if all(
        name in scores and matrix.fingerprints.get(name) == based[0][1].fingerprints.get(name)
        for _, matrix, scores in based
    )]  # fmt: skip
    shown = [(run, tuple(round(scores[name]["accuracy"], 4) for name in names)) for run, _, scores in based]
    what = "began from another base, as its scores before training show, so that changes since the base do not compare"
    yield from _apart(what, _groups(shown))


def _seeds(arms: Sequence[Arm]) -> Iterator[str]:
    if single := [arm.name for arm in arms if len(arm.runs) == 1]:
        yield f"One seed: {', '.join(single)}. Intervals hold for other test rows, not for other seeds."


def _groups(values: Sequence[tuple[Seed, Hashable]]) -> tuple[tuple[Seed, ...], ...]:
    """Runs that have the same value, beginning with the first's."""
    groups: dict[Hashable, list[Seed]] = {}
    for name, value in values:
        groups.setdefault(value, []).append(name)
    return tuple(map(tuple, groups.values()))


def _apart(what: str, groups: Sequence[Sequence[Seed]]) -> Iterator[str]:
    """A sentence that names who is apart from the first, if anyone is."""
    if len(groups) > 1:
        first, *others = map(listed, groups)
        yield f"Some {what}: {'; '.join(others)}, against {first}."
