"""What is set against the distance from the base: which measurements, and how many."""

import json

import pytest

from cpt_lightning.report import Report, arms_of
from cpt_lightning.report.law import laws_of
from tests.report.made_runs import made_run


def measured(run, *rows) -> None:
    entries = [
        {"stage": stage, "step": step, "name": name, "forward_kl_per_answer": kl, "reverse_kl_per_answer": 2 * kl}
        for stage, step, name, kl in rows
    ]
    (run / "drift.json").write_text(json.dumps({"version": 1, "measurements": entries}))


@pytest.fixture
def run(tmp_path):
    """After a: 3 on it, measured last at step 4. After b: 4 on a and 6 on b, mean 5. The probe loses 50 and then 25
    points, and a falls from .75 to .5.
    """
    run = made_run(tmp_path / "x")
    measured(run, (1, 2, "a", 9), (1, 4, "a", 3), (1, 4, "p", 9), (2, 4, "a", 4), (2, 4, "b", 6), (2, 4, "p", 9))
    return run


def test_losses_after_each_stage_against_the_distance_then(run):
    found = {(law.distance.removesuffix("_kl"), law.loss): law.points["x"] for law in laws_of(arms_of([str(run)]))}
    assert found == {
        ("forward", "probes"): [(3, 50), (5, 25)],
        ("forward", "forgetting"): [(5, 25)],
        ("reverse", "probes"): [(6, 50), (10, 25)],
        ("reverse", "forgetting"): [(10, 25)],
    }


def test_distances_of_the_weights_are_of_the_same_stages(run):
    rows = [{"stage": 1, "distance": 0.5, "fisher_distance": 2.0}, {"stage": 2, "distance": 0.75}]
    (run / "weight_distance.json").write_text(json.dumps({"version": 1, "measurements": rows}))
    found = {(law.distance, law.loss): law.points["x"] for law in laws_of(arms_of([str(run)]))}
    assert len(found) == 7, "of stage 1 nothing can be forgotten, and of stage 2 there is no distance by F"
    assert found["weights", "probes"] == [(0.5, 50), (0.75, 25)]
    assert found["weights", "forgetting"] == [(0.75, 25)]
    assert found["fisher", "probes"] == [(2.0, 50)]


def test_the_report_has_a_row_for_each_fit(run, tmp_path, monkeypatch):
    """Losses 50, 25 of two equal runs: a parabola needs three distances; a third run gives them."""
    other = made_run(tmp_path / "y", lr=0.2)
    measured(other, (1, 4, "a", 1), (2, 4, "b", 7))
    monkeypatch.setattr("cpt_lightning.report.law.FEWEST_POINTS", 4)
    report = Report(arms_of([str(run), str(other)]))
    # Through (1, 50), (3, 50), (5, 25), (7, 25): the best parabola is a line, as x - 4 and the losses are odd about
    # their means, of slope -5 / 1: residuals 2.5 * (-1, 3, -3, 1), so R^2 = 1 - 125 / 625.
    assert report.fits[0] == ("lost on probes, points", "KL(base || model), nats per answer", 4, "0.80")
    assert report.fits[1][3] == "too few for a fit"


def test_a_fit_goes_through_the_points_of_all_arms(run, tmp_path, monkeypatch):
    other = made_run(tmp_path / "y", lr=0.2)
    measured(other, (1, 4, "a", 1), (2, 4, "b", 7))
    bare = made_run(tmp_path / "z", lr=0.3)
    arms = arms_of([str(run), str(other), str(bare)])
    assert laws_of(arms)[0].fit is None, "four points tell little"
    monkeypatch.setattr("cpt_lightning.report.law.FEWEST_POINTS", 4)
    law = laws_of(arms)[0]
    assert law.num_points == 4 and list(law.points) == ["x", "y"]
    assert 0 < law.fit.r_squared <= 1


def test_runs_without_drift_have_no_law(tmp_path):
    assert laws_of(arms_of([str(made_run(tmp_path / "x"))])) == []


def test_the_report_shows_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr("cpt_lightning.report.intervals.NUM_DRAWS", 20)
    Report(arms_of([str(run)])).save(tmp_path / "page.html")
    assert "Distance and loss" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "page_files/law_reverse_kl_forgetting.png").exists()
    assert "2 runs and stages, too few for a fit" in (tmp_path / "page.md").read_text()
