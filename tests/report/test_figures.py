"""The figures of a run against hand calculations, and what a comparison makes of them."""

import json

import pytest
from torch.utils.tensorboard import SummaryWriter

from cpt_lightning.records import AccuracyMatrix, RunFolder
from cpt_lightning.records.run import MATRIX
from cpt_lightning.report import FIGURES, Comparison, figures_of
from cpt_lightning.report.updates import UPDATES
from tests.report.made_runs import log, made_run, write_updates


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
            writer.add_scalar("perf/tokens_per_s", 20, step)
            writer.add_scalar("time/step_s", 2, step)
            writer.add_scalar("perf/host_rss_gb", 0.25 * (1 + step), step)
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
        {"stage": stage, "step": step, "name": name, "forward_kl_per_answer": value, "reverse_kl_per_answer": 5.0}
        for stage, step, name, value in measured
    ]
    (run / "drift.json").write_text(json.dumps({"version": 1, "measurements": rows}))


def test_figures_are_those_of_the_hand(run):
    write_drift(run)
    (run / "study.json").write_text(json.dumps({"commands": [], "seconds": 90.0}))
    found = figures_of(RunFolder(run))
    assert list(found) == list(FIGURES)
    expected = {
        "learning": 80.0, "AvgAcc": 75.0, "MAA": 72.5, "forgetting": 10.0, "forgetting / T": 5.0, "worst dip": 10.0,
        "BWT": -10.0, "FWT": 0.0, "probes": -10.0, "probes, lowest": -40.0, "probes, forced": -10.0, "KL": 3.0,
        "rows": 0.048, "rollouts": 0.384, "tokens": 0.12, "minutes": 1.5, "host memory": 0.75,
    }  # fmt: skip
    assert found.pop("GPU memory") is None
    assert {found.pop(name) for name in UPDATES} == {None}
    assert found == pytest.approx(expected)


def test_what_updates_did_is_a_mean_over_those_that_were_measured(run):
    """-(4 + 2) / 2 and 3 thousandths of a nat; the third root of 2 * 8 * 4 is 4; (3 + 2) / 2."""
    write_updates(run)
    found = figures_of(RunFolder(run))
    assert {name: found[name] for name in UPDATES} == pytest.approx({
        "log p, probes": -3.0, "log p, tasks": 3.0, "base perplexity": 4.0, "risk, probes": 2.5, "risk, tasks": 6.0,
        "weight change": 3.0, "weights changed": 15.0,
    })  # fmt: skip


@pytest.mark.parametrize("name", ["influence", "gradient_risk", "weight_change"])
def test_an_entry_without_its_figures_is_named(run, name):
    (run / f"{name}.json").write_text('{"version": 1, "measurements": [{"stage": 1}]}')
    with pytest.raises(ValueError, match=rf"{name}.json .*measurements\[0\] has no "):
        figures_of(RunFolder(run))


def test_completions_of_a_filter_and_of_a_collection_are_counted(run):
    (run / "filter").mkdir()
    verdicts = [{"refused": refused, "pass_count": 0} for refused in (None, "too small", None)]
    lines = [json.dumps(line) for line in ({"completions_per_row": 8}, *verdicts)]
    (run / "filter" / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert figures_of(RunFolder(run))["rollouts"] == pytest.approx(0.384 + 0.016)
    (run / "collected").mkdir()
    (run / "collected" / "rollouts_summary.json").write_text(json.dumps({"num_completions": 24}))
    assert figures_of(RunFolder(run))["rollouts"] == pytest.approx(0.384 + 0.016 + 0.024)


def test_completions_that_were_logged_elsewhere_are_not_counted_as_none(run):
    """No event files: those of the filter alone would pass for all."""
    for file in run.glob("events.out.tfevents.*"):
        file.unlink()
    (run / "filter").mkdir()
    lines = [json.dumps(line) for line in ({"completions_per_row": 8}, {"refused": None, "pass_count": 0})]
    (run / "filter" / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert figures_of(RunFolder(run))["rollouts"] is None


def test_a_run_without_probes_or_base_has_no_such_figure(run):
    matrix = AccuracyMatrix.load(run / MATRIX)
    matrix.zero_shot = None
    matrix.save(run / MATRIX)
    found = figures_of(RunFolder(run))
    assert found["probes"] is found["probes, forced"] is found["KL"] is found["FWT"] is None
    assert found["AvgAcc"] == 75


def test_an_unfinished_run_has_the_figures_of_what_it_learned(run):
    """After a alone: .7 learned, nothing earlier to forget, probes from .7 to .3."""
    data = json.loads((run / MATRIX).read_text())
    (run / MATRIX).write_text(json.dumps({**data, "rows": data["rows"][:2]}))
    found = figures_of(RunFolder(run))
    assert (found["learning"], found["AvgAcc"], found["probes"]) == pytest.approx((70.0, 70.0, -40.0))
    assert found["forgetting"] is found["forgetting / T"] is found["worst dip"] is found["BWT"] is found["FWT"] is None
    (run / MATRIX).write_text(json.dumps({**data, "rows": data["rows"][:1]}))
    assert figures_of(RunFolder(run))["learning"] is None


def test_minutes_are_taken_from_the_logs_where_nobody_timed_the_command(tmp_path):
    log(made_run(tmp_path / "run"), perf_rows=[16, 16, 16])
    assert figures_of(RunFolder(tmp_path / "run"))["minutes"] == 2


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
    assert {path.name for path in tmp_path.iterdir()} == {f"comparison.{kind}" for kind in ("md", "csv", "tex", "png")}


def test_a_cell_has_its_interval_and_latex_its_escapes():
    comparison = Comparison({"a_1 & b": {0: {"learning": 1.25, "rows": 2.0}}}, {"a_1 & b": {"learning": (-0.04, 2.0)}})
    assert comparison.cell("a_1 & b", "learning") == ("1.2", "[0.0, 2.0]")
    assert "| a_1 & b | 1 | 1.2 [0.0, 2.0] |" in comparison.markdown_table(["learning"])
    scores, costs = comparison.latex().split(r"\end{tabular}", 1)
    assert r"a\_1 \& b & 1 & 1.2 {\scriptsize [0.0, 2.0]} \\" in scores and r"rows \\" not in scores
    assert r"arm & seeds & rows \\" in costs and r"\toprule" in costs
    assert "interval" in comparison.legend and "interval" not in Comparison({"x": {0: {}}}).legend


def test_names_of_arms_are_shown_as_they_are_and_no_minus_before_a_zero():
    comparison = Comparison({"<b>|_x_": {0: {"forgetting": -0.0}}})
    assert r"| \<b\>\|\_x\_ | 1 | 0.0 |" in comparison.markdown_table()
    assert comparison.csv().endswith(",0,0.0000\n")


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
