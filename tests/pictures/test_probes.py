"""The probes of several arms, drawn."""

from __future__ import annotations

import pytest

from cpt_lightning.pictures import probe_curves
from cpt_lightning.records import AccuracyMatrix


def matrix(*probes: tuple[float, float], forced: float | None = None) -> AccuracyMatrix:
    """Probes ``p`` and ``q`` of the base, and after the tasks ``a`` and ``b``."""
    rows = []
    for p, q in probes:
        scores = {
            name: {"accuracy": value, "num_samples": 10} for name, value in {"a": 0.5, "b": 0.5, "p": p, "q": q}.items()
        }
        if forced is not None:
            scores = {name: cell | {"forced_accuracy": forced} for name, cell in scores.items()}
        rows.append(scores)
    return AccuracyMatrix(["a", "b"], ["p", "q"], [["a"], ["b"]], rows[0], rows[1:])


def lines_of(figure) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}


def test_a_line_is_the_mean_over_seeds_of_the_mean_over_probes():
    """Seed 0: means .8, .6, .4; seed 1: .8, .8, .2; both together 80, 70, 30 %; the band from 20 to 40 at the end."""
    figure = probe_curves({"sft": [matrix((0.9, 0.7), (0.6, 0.6), (0.8, 0)), matrix((0.9, 0.7), (0.9, 0.7), (0.4, 0))]})
    assert lines_of(figure) == {"sft": pytest.approx([80, 70, 30])}
    (band,) = figure.axes[0].collections
    assert {round(y) for x, y in band.get_paths()[0].vertices if x == 2} == {20, 40}
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["base", "a", "b"]


def test_what_a_forced_prefix_brings_back_is_a_line_of_its_own_where_it_was_measured():
    rows = (1, 1), (0, 0), (0, 0)
    lines = lines_of(probe_curves({"sft": [matrix(*rows, forced=0.9)], "rft": [matrix(*rows)]}))
    assert lines == {"sft": [100, 0, 0], "sft, forced prefix": pytest.approx([90, 90, 90]), "rft": [100, 0, 0]}


def test_an_unfinished_run_is_drawn_as_far_as_it_came():
    assert lines_of(probe_curves({"sft": [matrix((1, 1), (0, 1))]})) == {"sft": [100, 50]}


@pytest.mark.parametrize(
    "arms, message",
    [
        ({}, "an arm without a run"),
        ({"sft": [matrix((1, 1))], "rft": []}, "an arm without a run"),
        ({"sft": [AccuracyMatrix(["a"], [], [["a"]], {}, [])]}, "sft: a run without probes"),
        ({"sft": [AccuracyMatrix(["a"], ["p"], [["a"]])]}, "sft: a run without probes, or without scores of the base"),
        ({"sft": [matrix((1, 1), (1, 1))], "rft": [matrix((1, 1))]}, "rft: a run with 0 of the stages"),
    ],
)
def test_runs_that_do_not_go_together_are_refused(arms, message):
    with pytest.raises(ValueError, match=message):
        probe_curves(arms)
