"""A run's folder, read: what is there, what an older run lacks, and what is broken."""

import json
import os

import pytest
from torch.utils.tensorboard import SummaryWriter

from cpt_lightning.records import RunFolder
from tests.report.made_runs import log, made_run

MATRIX = json.dumps({
    "version": 1, "tasks": ["a"], "probes": [], "stages": [["a"]],
    "rows": [{"after": "a", "scores": {"a": {"accuracy": 0.5, "num_samples": 4}}}],
})  # fmt: skip


def test_an_old_run_with_a_matrix_alone_has_the_rest_not(tmp_path):
    made_run(tmp_path / "run")
    for name in ("config.yaml", "samples.jsonl"):
        (tmp_path / "run" / name).unlink()
    run = RunFolder(tmp_path / "run")
    assert run.is_finished and run.num_stages == 2
    assert run.config is run.seed is run.last_start is run.seconds is run.drift is None
    assert (run.verdicts, list(run.samples()), run.logged.seconds, run.logged.total("perf/rows")) == (
        {},
        [],
        None,
        None,
    )


def test_the_folder_may_be_named_by_text(tmp_path):
    made_run(tmp_path / "run")
    assert RunFolder(str(tmp_path / "run")) == RunFolder(tmp_path / "run")


def test_a_run_that_was_begun_and_measured_nothing_is_one_too(tmp_path):
    made_run(tmp_path / "run")
    (tmp_path / "run/accuracy_matrix.json").unlink()
    run = RunFolder(tmp_path / "run")
    assert (run.matrix, run.is_finished, run.num_stages, run.seed) == (None, False, 0, 0)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none is no folder; name the folder of a run"):
        RunFolder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"neither config.yaml nor accuracy_matrix.json"):
        RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "read", "message"),
    [
        ("accuracy_matrix.json", '{"version": 1, "tasks"', "matrix", "accuracy_matrix.json cannot be read"),
        ("accuracy_matrix.json", '{"version": 1}', "matrix", "'rows' is missing"),
        ("accuracy_matrix.json", '{"version": 9}', "matrix", "version 9"),
        ("config.yaml", "model: [", "config", "config.yaml cannot be read"),
        ("config.yaml", "", "config", "it holds no options"),
        ("study.json", "{}", "seconds", "study.json cannot be read: 'seconds' is missing"),
        (
            "accuracy_matrix.json",
            MATRIX.replace("0.5", '"half"'),
            "matrix",
            "to float: 'half'",
        ),
        ("accuracy_matrix.json", MATRIX.replace('"a": {', '"x": {'), "matrix", r"accuracy\[0\]\[0\] is missing"),
        ("drift.json", "[", "drift", "drift.json cannot be read"),
        ("drift.json", '{"measurements": [{"stage": 1}]}', "drift", r"measurements\[0\] has no .*name, .*step"),
        ("weight_distance.json", '{"measurements": [{}]}', "weight_distance", r"\[0\] has no distance, stage"),
        ("environment.json", "{", "last_start", "environment.json cannot be read"),
        ("filter/a.jsonl", "{}\n", "verdicts", "a.jsonl cannot be read: line 1 has no completions_per_row"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text, read, message):
    made_run(tmp_path / "run")
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        getattr(RunFolder(tmp_path / "run"), read)


def test_samples_a_line_cut_off_by_a_kill_is_left_out_and_any_other_broken_one_named(tmp_path):
    path = made_run(tmp_path / "run") / "samples.jsonl"
    run, whole = RunFolder(tmp_path / "run"), path.read_text()
    path.write_text(whole + '{"row_id": "a/0", "ta')
    assert len(list(run.samples())) == 36
    path.write_text(whole.replace('"stage": 1', '"stage": ', 1))
    with pytest.raises(ValueError, match=r"samples.jsonl cannot be read: line 13: "):
        list(run.samples())
    path.write_text('{"row_id": "a/0"}\n')
    with pytest.raises(ValueError, match=r"line 1 has no accuracy, completion, stage, task"):
        list(run.samples())
    path.write_text("")
    with pytest.raises(ValueError, match=r"samples.jsonl cannot be read: it is empty, but accuracy_matrix.json has"):
        list(run.samples())


@pytest.mark.parametrize("name", ["samples.jsonl", "config.yaml"])
def test_a_file_that_is_no_text_is_named(tmp_path, name):
    path = made_run(tmp_path / "run") / name
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        _ = RunFolder(tmp_path / "run").config, list(RunFolder(tmp_path / "run").samples())


def test_without_a_start_there_is_no_last_one(tmp_path):
    (made_run(tmp_path / "run") / "environment.json").write_text('{"version": 1, "starts": []}')
    assert RunFolder(tmp_path / "run").last_start is None


def write_csv(path, steps, cut_off: str = "") -> None:
    """As `CSVLogger` does: the base's scores at step 0, and 8 rows at each step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["perf/rows,step,val/a/accuracy", ",0,0.5", *(f"8.0,{step}," for step in steps)]
    path.write_text("".join(f"{line}\r\n" for line in lines) + cut_off, newline="")


def test_where_there_are_no_events_costs_are_those_of_csv_files(tmp_path):
    """The second version goes on at step 2, where the first one logged steps 0 to 3: 5 steps of 8 rows."""
    made_run(tmp_path / "run")
    write_csv(tmp_path / "run/metrics.csv", range(3), cut_off="8.0,")
    assert RunFolder(tmp_path / "run").logged.values == {"val/a/accuracy": [0.5], "perf/rows": [8.0] * 3}
    assert RunFolder(tmp_path / "run").logged.seconds is None
    (tmp_path / "run/metrics.csv").unlink()
    write_csv(tmp_path / "run/lightning_logs/version_9/metrics.csv", range(4))
    later = tmp_path / "run/lightning_logs/version_10/metrics.csv"
    write_csv(later, range(2, 5))
    later.write_text(later.read_text().replace(",0,0.5\n", ""))
    assert RunFolder(tmp_path / "run").logged.total("perf/rows") == 40


def test_csv_files_from_which_steps_are_gone_are_not_counted(tmp_path):
    """A run that goes on with a version of its own takes the beginning away."""
    made_run(tmp_path / "run")
    write_csv(tmp_path / "run/metrics.csv", range(2, 5))
    assert RunFolder(tmp_path / "run").logged.total("perf/rows") is None


def test_what_was_logged_by_all_beginnings_of_a_run(tmp_path):
    """Two files of 2 and 3 entries, a minute apart: 1 and 2 minutes. Tokens: 10 * 2 + 20 * 3 + 30 * 1 = 110."""
    made_run(tmp_path / "run")
    log(tmp_path / "run", perf_rows=[16, 16])
    log(tmp_path / "run", perf_tokens_per_s=[10, 20, 30], time_step_s=[2, 3, 1], perf_host_rss_gb=[1.0, 2.5, 2.0])
    logged = RunFolder(tmp_path / "run").logged
    assert (logged.total("perf/rows"), logged.seconds, logged.tokens) == (32, 180.0, pytest.approx(110))
    assert logged.highest("perf/host_rss_gb") == 2.5 and logged.highest("perf/peak_memory_gb") is None


def test_what_a_resumed_run_logs_again_counts_once(tmp_path):
    """Killed after 4 steps and resumed at the third: 5 steps of 16 rows."""
    made_run(tmp_path / "run")
    for purge_step, steps in ((0, range(4)), (2, range(2, 5))):
        with SummaryWriter(str(tmp_path / "run"), purge_step=purge_step, filename_suffix=f".{purge_step}") as writer:
            for step in steps:
                writer.add_scalar("perf/rows", 16, step)
    assert RunFolder(tmp_path / "run").logged.total("perf/rows") == 80


def test_verdicts_of_a_stage_that_is_being_judged_are_not_finished(tmp_path):
    folder = made_run(tmp_path / "run") / "filter"
    folder.mkdir()
    rows = [{"refused": None, "pass_count": 1}, {"refused": "too long", "pass_count": 0}]
    for name, more in (("a.jsonl", {}), ("b.judging.jsonl", {}), ("c.jsonl", {"filter_from": "other"})):
        lines = [{"completions_per_row": 8, **more}, *rows]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = RunFolder(tmp_path / "run").verdicts
    assert {name: (each.is_finished, each.num_completions) for name, each in found.items()} == {
        "a": (True, 8),
        "b": (False, 8),
        "c": (True, 0),
    }


def test_stages_that_were_judged_are_in_their_order_in_a_copy_too(tmp_path):
    """Whose files have other times; a line that a kill cut off is none yet."""
    folder = made_run(tmp_path / "run") / "filter"
    folder.mkdir()
    for stage, name in enumerate("ba"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"completions_per_row": 8, "stage": stage}) + "\n")
    (folder / "c.judging.jsonl").write_text('{"completions_per')
    os.utime(folder / "a.jsonl", (0, 0))
    assert list(RunFolder(tmp_path / "run").verdicts) == ["b", "a"]
