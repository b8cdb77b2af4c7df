"""The figures of a run against hand calculations, and what a comparison makes of them."""

import json

import pytest
from torch.utils.tensorboard import SummaryWriter

from cpt_lightning.records.matrix import AccuracyMatrix
from cpt_lightning.report import FIGURES, Comparison, figures_of, scores_of
from cpt_lightning.report.figures import MATRIX


def cell(accuracy: float, forced: float | None = None) -> dict:
    return {"accuracy": accuracy, "num_samples": 10} | ({} if forced is None else {"forced_accuracy": forced})


@pytest.fixture
def run(tmp_path):
    """Two tasks and two probes; b is learned second, and a forgotten by a tenth."""
    matrix = AccuracyMatrix(["a", "b"], ["p", "q"], [["a"], ["b"]])
    matrix.zero_shot = {"a": cell(0.2), "b": cell(0.3), "p": cell(0.8, 0.8), "q": cell(0.6, 0.6)}
    matrix.rows = [
        {"a": cell(0.7), "b": cell(0.3), "p": cell(0.2, 0.8), "q": cell(0.4, 0.6)},
        {"a": cell(0.6), "b": cell(0.9), "p": cell(0.6, 0.8), "q": cell(0.6, 0.4)},
    ]
    matrix.save(tmp_path / MATRIX)
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            writer.add_scalar("perf/rows", 16, step)
            writer.add_scalar("perf/rollouts", 128, step)
    return tmp_path


def write_drift(run) -> None:
    """After the last task 2 nats on a and 4 on b, mean 3; before that, and on probes, other figures."""
    measured = [
        (1, 3, "a", 9.0),
        (1, 3, "p", 9.0),
        (2, 2, "a", 8.0),
        (2, 3, "a", 2.0),
        (2, 3, "b", 4.0),
        (2, 3, "p", 7.0),
    ]
    rows = [
        {"stage": stage, "step": step, "name": name, "forward_kl_per_answer": value}
        for stage, step, name, value in measured
    ]
    (run / "drift.json").write_text(json.dumps({"version": 1, "measurements": rows}))


def test_figures_are_those_of_the_hand(run):
    write_drift(run)
    found = figures_of(run, seconds=90.0)
    assert list(found) == list(FIGURES)
    expected = {
        "learning": 80.0, "AvgAcc": 75.0, "forgetting": 10.0, "worst dip": 10.0, "BWT": -10.0, "probes": -10.0,
        "probes, lowest": -40.0, "probes, forced": -10.0, "KL": 3.0, "rows": 0.048, "rollouts": 0.384, "minutes": 1.5,
    }  # fmt: skip
    assert found == pytest.approx(expected)
    scores = scores_of(AccuracyMatrix.load(run / MATRIX))
    assert scores == {name: found[name] for name in scores}
    assert list(scores) == list(FIGURES)[:8]


def test_completions_of_a_filter_and_of_a_collection_are_counted(run):
    (run / "filter").mkdir()
    verdicts = [{"refused": None}, {"refused": "too small"}, {"refused": None}]
    lines = [json.dumps(line) for line in ({"completions_per_row": 8}, *verdicts)]
    (run / "filter" / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert figures_of(run)["rollouts"] == pytest.approx(0.384 + 0.016)
    (run / "collected").mkdir()
    (run / "collected" / "rollouts_summary.json").write_text(json.dumps({"num_completions": 24}))
    assert figures_of(run)["rollouts"] == pytest.approx(0.384 + 0.016 + 0.024)


def test_a_run_without_probes_or_base_has_no_such_figure(run):
    matrix = AccuracyMatrix.load(run / MATRIX)
    matrix.zero_shot = None
    matrix.save(run / MATRIX)
    found = figures_of(run)
    assert found["probes"] is found["probes, forced"] is found["minutes"] is found["KL"] is None
    assert found["AvgAcc"] == 75


def test_what_is_no_finished_run_is_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        figures_of(tmp_path / "other")
    data = json.loads((run / MATRIX).read_text())
    (run / MATRIX).write_text(json.dumps({**data, "rows": data["rows"][:2]}))
    with pytest.raises(ValueError, match="1 of 2 stages are learned"):
        figures_of(run)


def test_a_comparison_averages_seeds_and_leaves_out_what_no_run_has(tmp_path):
    arms = {"x": {0: {"learning": 1.0, "forgetting": 0.0, "probes": None}, 1: {"learning": 3.0, "forgetting": 2.0}},
            "y": {0: {"learning": 5.0, "forgetting": -1.0}}}  # fmt: skip
    comparison = Comparison(arms)
    assert comparison.columns == ["learning", "forgetting"]
    assert "| x | 2 | 2.0 ± 1.4 | 1.0 ± 1.4 |\n| y | 1 | 5.0 | -1.0 |" in comparison.markdown("title")
    assert (
        comparison.csv() == "arm,seed,learning,forgetting\nx,0,1.0000,0.0000\nx,1,3.0000,2.0000\ny,0,5.0000,-1.0000\n"
    )
    comparison.save(tmp_path, "title")
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.md", "comparison.csv", "comparison.png"}


def test_a_comparison_is_read_back_from_its_table(tmp_path):
    """Two seeds of one arm, and an arm without probes; a figure that one has and the other lacks stays ``None``."""
    arms = {
        "sft": {0: {"learning": 50.0, "probes": -1.25}, 7: {"learning": 52.0}},
        "joint, all": {0: {"learning": 49.0}},
    }
    Comparison(arms).save(tmp_path, "")
    found = Comparison.load(tmp_path / "comparison.csv")
    assert found.arms == {
        "sft": {0: {"learning": 50.0, "probes": -1.25}, 7: {"learning": 52.0, "probes": None}},
        "joint, all": {0: {"learning": 49.0, "probes": None}},
    }
    assert found.csv() == Comparison(arms).csv()
    (axes,) = found.figure("title").axes
    assert axes.get_legend_handles_labels()[1] == ["sft"]


def test_another_table_is_no_comparison(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv has no columns arm and seed"):
        Comparison.load(tmp_path / "other.csv")
