"""Tables of the analysis study, from runs whose figures are made up."""

from __future__ import annotations

import analysis
import claims
import pytest
from analysis_pictures import frontier, predictors
from claims import Point, best_lr, paired_difference, prediction

from cpt_lightning.cli.study.arms import Study
from tests.test_configs import ROOT


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(claims, "NUM_RESAMPLES", 50)


def point(method: str, lr: str, seed: int, **figures: float) -> Point:
    return Point(method, lr, seed, figures)


def test_a_difference_is_paired_by_seed_and_needs_two():
    """Seeds differ by far more than methods do: 10.5, 21, 30.5 against 10, 20, 30."""
    mean, low, high = paired_difference({0: 10.5, 1: 21.0, 2: 30.5}, {2: 30.0, 1: 20.0, 0: 10.0, 3: 7.0})
    # Differences .5, 1, .5: standard deviation .2887, standard error 1/6, t(.975, 2) = 4.3027.
    assert (mean, low, high) == pytest.approx((2 / 3, 2 / 3 - 4.30265 / 6, 2 / 3 + 4.30265 / 6), abs=1e-5)
    with pytest.raises(ValueError, match="two seeds in common; there are 1"):
        paired_difference({0: 1.0, 1: 2.0}, {1: 0.0})


def test_the_best_rate_is_that_of_the_highest_mean():
    points = [point("a", lr, seed, learning=value) for lr, values in {"1e-4": (5, 5), "3e-4": (9, 2)}.items()
              for seed, value in enumerate(values)]  # fmt: skip
    assert best_lr(points, "a", by="learning") == "3e-4"
    assert best_lr(points[:3], "a", by="learning") == "3e-4"
    assert best_lr([*points[:2], point("a", "3e-4", 0, learning=4)], "a", by="learning") == "1e-4"


def test_a_parabola_is_foretold_and_noise_is_not():
    runs = [(method, seed, 2.0 * method + seed / 4) for method in range(6) for seed in range(2)]
    points = [point(f"m{m}", "1", s, x=x, square=(x - 3) ** 2, other=(-1.0) ** s) for m, s, x in runs]
    found = prediction(points, "x", "square")
    assert found.num_runs == 12 and found.r_squared == pytest.approx((1, 1, 1))
    assert -1 < found.rank_correlation[1] < found.rank_correlation[0] < found.rank_correlation[2] <= 1
    assert prediction(points, "x", "other").r_squared[0] < 0.1
    assert prediction(points, "square", "square").rank_correlation == pytest.approx((1, 1, 1))


@pytest.fixture(scope="module")
def points() -> list[Point]:
    """The shipped study's runs, every figure another; GRPO keeps two points more than SFT on bare answers."""
    shipped = Study.load(ROOT / analysis.STUDY)
    names = {*analysis.SHOWN, *analysis.PREDICTORS, "lost"}
    found = []
    for number, run in enumerate(shipped.runs()):
        method, _, lr = run.arm.partition("_lr_")
        figures = {name: 1.0 + (7 * number + 3 * place) % 11 for place, name in enumerate(sorted(names))}
        if method in ("grpo", "sft_bare"):
            figures |= {
                "learning": 10 * float(lr) if method == "grpo" else 1 - float(lr),
                "probes": run.seed + (2.0 if method == "grpo" else 0.0),
            }
        found.append(Point(method, lr, run.seed, figures))
    return found


def test_every_claim_is_of_methods_that_the_study_runs(points):
    text = analysis.claims_table(points)
    assert len(text.splitlines()) == 2 + len(analysis.CLAIMS)
    assert "| grpo_kl 3e-4 - grpo 3e-4 |" in text, "the claim names its rate"
    first = text.splitlines()[2]
    assert "| grpo 3e-4 - sft_bare 3e-5 |" in first and "| +2.0 (+2.0 to +2.0) |" in first


def test_every_method_has_a_row_for_each_rate(points):
    rows = analysis.methods_table(points).splitlines()[2:]
    assert len(rows) == 10 * 3 and rows[0].startswith("| grpo | 3e-5 | 0.0 ± 0.0 |")


def test_pictures_have_a_line_per_method(points):
    assert [len(axes.lines) for axes in frontier(points).axes] == [11, 11]  # and one that marks the base
    assert {len(axes.lines) for axes in predictors(points, analysis.PREDICTORS).axes} == {10}
    assert len(analysis.predictors_table(points).splitlines()) == 2 + len(analysis.PREDICTORS)
