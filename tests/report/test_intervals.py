"""Intervals over test rows: against formulas, paired where runs share their rows, and only where answers were kept."""

import json

import numpy as np
import pytest

from cpt_lightning.records import RunFolder
from cpt_lightning.report import arms_of
from cpt_lightning.report.intervals import Resampled, draws_of, row_scores
from tests.report.made_runs import SCORES, made_run


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    """Tests check the shapes of every call, which takes a multiple of the time."""
    monkeypatch.setattr("cpt_lightning.report.intervals.NUM_DRAWS", 300)


def rows(right: int, of: int = 100) -> list[int]:
    return [1] * right + [0] * (of - right)


def resampled(*runs) -> Resampled:
    return Resampled.of(arms_of(list(map(str, runs))))


def test_scores_are_read_row_by_row(tmp_path):
    scores = row_scores(RunFolder(made_run(tmp_path / "x")))
    assert scores.rows["a"] == ["a/0", "a/1", "a/2", "a/3"]
    assert {name: scores.scores[name, "accuracy"].tolist() for name in SCORES} == SCORES
    assert set(scores.scores) == {(name, "accuracy") for name in SCORES}, "no forced accuracy was measured"


def test_an_average_s_interval_is_that_of_the_formula(tmp_path):
    """Each task 60 of 100: a mean over two has the standard error sqrt(2 * .24 / 100) / 2 = 3.46 points: 60 -+ 6.8."""
    scores = {"a": [rows(0), rows(60), rows(60)], "b": [rows(0), rows(0), rows(60)], "p": [rows(80)] * 3}
    run = made_run(tmp_path / "x", scores)
    low, high = resampled(run).interval("x", "AvgAcc")
    assert (low, high) == pytest.approx((53.2, 66.8), abs=1.0)
    draws = draws_of(RunFolder(run), row_scores(RunFolder(run)))
    assert draws["AvgAcc"].std() == pytest.approx(3.46, rel=0.1)
    # The probe was answered alike at all times: it did not change, whichever rows are drawn.
    assert resampled(run).interval("x", "probes") == (0.0, 0.0)


def test_runs_that_were_asked_the_same_rows_are_compared_row_by_row(tmp_path):
    """y is right wherever x is, and on 5 of 100 rows more in each task: the difference has a standard error of
    sqrt(2 * .05 * .95 / 100) / 2 = 1.5 points; of unpaired runs it would be 4.9.
    """

    def scores(right):
        return {"a": [rows(0), rows(right), rows(right)], "b": [rows(0), rows(0), rows(right)], "p": [rows(80)] * 3}

    one, two = made_run(tmp_path / "x", scores(60)), made_run(tmp_path / "y", scores(65), lr=1)
    low, high = resampled(one, two).difference("y", "x", "AvgAcc")
    assert (low, high) == pytest.approx((2.0, 8.0), abs=1.0)
    other = made_run(tmp_path / "z", scores(65), lr=2)
    text = (other / "samples.jsonl").read_text()
    (other / "samples.jsonl").write_text(text.replace('"row_id": "', '"row_id": "other/'))
    low, high = resampled(one, other).difference("z", "x", "AvgAcc")
    assert high - low == pytest.approx(2 * 1.96 * 4.85, rel=0.12), "other rows of the same number are not paired"


def test_an_arm_s_draws_are_the_means_of_its_seeds(tmp_path):
    up = {**SCORES, "b": [[0] * 4, [0, 0, 0, 1], [1, 0, 0, 0]]}
    one, two = made_run(tmp_path / "x/seed_0"), made_run(tmp_path / "x/seed_1", up, seed=1)
    together = resampled(one, two).arms["x"]["AvgAcc"]
    apart = resampled(f"u={one}", f"v={two}").arms
    assert together == pytest.approx((apart["u"]["AvgAcc"] + apart["v"]["AvgAcc"]) / 2)
    assert np.unique(together).size > 3


def test_no_answers_or_those_of_another_run_give_no_intervals_and_a_reason(tmp_path):
    bare, other, good = made_run(tmp_path / "x"), made_run(tmp_path / "y", lr=1), made_run(tmp_path / "z", lr=2)
    (bare / "samples.jsonl").unlink()
    lines = (other / "samples.jsonl").read_text().splitlines(keepends=True)
    (other / "samples.jsonl").write_text("".join(lines[:-1]))
    found = resampled(bare, other, good)
    assert list(found.arms) == ["z"]
    assert found.unknown[0] == f"x has no intervals: {bare} keeps no samples.jsonl."
    assert "has 3 answers on p with mean accuracy 1.000, but accuracy_matrix.json 4 with 1.000" in found.unknown[1]
    assert found.interval("x", "AvgAcc") is None and found.difference("z", "x", "AvgAcc") is None


def test_forced_answers_are_drawn_too(tmp_path):
    run = made_run(tmp_path / "x")
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line["parts"]["forced_accuracy"] = 1.0
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = json.loads((run / "accuracy_matrix.json").read_text())
    for row in data["rows"]:
        for cell in row["scores"].values():
            cell["forced_accuracy"] = 1.0
    (run / "accuracy_matrix.json").write_text(json.dumps(data))
    assert resampled(run).interval("x", "probes, forced") == (0.0, 0.0)
