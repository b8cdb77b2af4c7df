"""What crosses tasks, with a real Trainer, a module of one linear layer, and a stream of three tasks and a probe."""

import io
import json
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from cpt_lightning.callbacks import ContinualLearning, SampleLog
from cpt_lightning.functional.accuracy_matrix import forgetting_measure, forward_transfer
from cpt_lightning.records import AccuracyMatrix
from cpt_lightning.records.files import keep_lines
from cpt_lightning.records.matrix import FURTHER, Cell
from cpt_lightning.rewards.yes_no import YES_NO_RATIOS
from cpt_lightning.rollouts import Sampling
from cpt_lightning.tasks import Prompt
from tests.fakes import LinearModule, make_trainer, number_stream


def run(folder, *, validate=True, module=None, stream=None, continual=None, **options):
    """A run as ``cpt fit`` makes it."""
    module, stream = module or LinearModule(), stream or number_stream()
    trainer = make_trainer(folder, stream, continual=continual, **options)
    if validate:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    return module, trainer


def read_matrix(folder) -> dict:
    return json.loads((folder / "accuracy_matrix.json").read_text())


def read_samples(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_matrix_has_a_row_for_the_base_and_one_after_each_task(tmp_path):
    _, trainer = run(tmp_path)
    matrix = read_matrix(tmp_path)
    assert matrix["version"] == 1
    assert matrix["tasks"] == ["a", "b", "c"] and matrix["probes"] == ["p"]
    assert [row["after"] for row in matrix["rows"]] == [None, "a", "b", "c"]
    counts = [{name: cell["num_samples"] for name, cell in row["scores"].items()} for row in matrix["rows"]]
    assert counts == [{"a": 6, "b": 6, "c": 6, "p": 5}] * 4
    base, *rows = [[row["scores"][name]["accuracy"] for name in "abc"] for row in matrix["rows"]]
    assert base == [0.5, 0.5, 0.5]  # a fresh layer says "0" to everything, and every other row is odd
    assert matrix["metrics"]["forgetting_measure"] == pytest.approx(forgetting_measure(rows))
    assert matrix["metrics"]["forward_transfer"] == pytest.approx(forward_transfer(rows, base))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("continual/")}
    assert logged == pytest.approx({f"continual/{name}": value for name, value in matrix["metrics"].items()}, abs=1e-6)
    assert {"continual/average_accuracy", "continual/learning", "continual/probe/p"} <= set(logged)


def test_accuracies_are_those_of_the_samples(tmp_path):
    """Counted again from what the model said: every cell of the matrix is the mean over its lines."""
    run(tmp_path)
    matrix, samples = read_matrix(tmp_path), read_samples(tmp_path)
    assert [sample["after"] for sample in samples] == [after for after in (None, "a", "b", "c") for _ in range(23)]
    for stage, row in enumerate(matrix["rows"]):
        for name, cell in row["scores"].items():
            lines = [s for s in samples if s["stage"] == stage and s["task"] == name]
            assert len(lines) == cell["num_samples"]
            right = [float(s["completion"] == s["gold"]) for s in lines]
            assert [s["accuracy"] for s in lines] == right
            assert cell["accuracy"] == round(sum(right) / len(right), 6)
    assert samples[1] == {
        "row_id": "a/test/1", "task": "a", "stage": 0, "after": None, "prompt": "question 1a", "gold": "1",
        "completion": "0", "accuracy": 0.0, "parts": {"total": 0.0, "accuracy": 0.0},
    }  # fmt: skip
    assert not (tmp_path / "validate.jsonl").exists()  # taken over as the base's lines


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("reset", [True, False])
def test_every_task_begins_with_a_fresh_optimizer_and_schedule_unless_told_otherwise(tmp_path, manual, reset):
    """Rates of three steps per task under lr 0.1 * 0.9^step; Adam's step counter shows the optimizer's age."""
    module = LinearModule(manual=manual)
    _, trainer = run(tmp_path, module=module, continual=ContinualLearning(reset_optimizer=reset, print_table=False))
    expected = [0.1 * 0.9 ** (step % 3 if reset else step) for step in range(9)]
    assert module.rates == pytest.approx(expected)
    ages = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert ages == {3 if reset else 9}


def test_an_interrupted_validation_and_several_per_task_leave_one_set_of_samples(tmp_path):
    run(tmp_path, val_check_interval=1)  # after every batch
    samples = read_samples(tmp_path)
    assert len(samples) == 4 * 23
    assert [row["after"] for row in read_matrix(tmp_path)["rows"]] == [None, "a", "b", "c"]


def test_without_a_validation_before_fit_there_is_no_base_row_and_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="untrained base was not evaluated.*trainer.validate"):
        run(tmp_path, validate=False)
    matrix = read_matrix(tmp_path)
    assert [row["after"] for row in matrix["rows"]] == ["a", "b", "c"]
    assert "forward_transfer" not in matrix["metrics"] and "probe/p" not in matrix["metrics"]
    assert "average_accuracy" in matrix["metrics"]
    assert {sample["stage"] for sample in read_samples(tmp_path)} == {1, 2, 3}


def test_joint_training_is_one_row_without_forgetting(tmp_path):
    run(tmp_path, stream=number_stream(stages=[["a", "b", "c"]]))
    matrix = read_matrix(tmp_path)
    assert [row["after"] for row in matrix["rows"]] == [None, "a+b+c"]
    assert "forgetting_measure" not in matrix["metrics"]
    assert matrix["metrics"]["average_accuracy"] == pytest.approx(matrix["metrics"]["learning"])


def test_a_task_that_is_never_learned_counts_as_a_probe(tmp_path):
    run(tmp_path, stream=number_stream(stages=["c", "a"]))
    matrix = read_matrix(tmp_path)
    assert matrix["tasks"] == ["c", "a"] and matrix["probes"] == ["b", "p"]
    assert [row["after"] for row in matrix["rows"]] == [None, "c", "a"]


def test_a_task_learned_twice_has_two_rows(tmp_path):
    run(tmp_path, stream=number_stream(stages=["a", "b", "a"]))
    matrix = read_matrix(tmp_path)
    assert [row["after"] for row in matrix["rows"]] == [None, "a", "b", "a"]
    assert matrix["tasks"] == ["a", "b"]


def test_settings_that_would_leave_holes_are_refused(tmp_path):
    for name, value in {"check_val_every_n_epoch": 2, "limit_val_batches": 0.5}.items():
        with pytest.raises(ValueError, match=rf"trainer\.{name}={value}: the validation after a task.*num_test"):
            run(tmp_path, validate=False, **{name: value})
    with pytest.raises(ValueError, match=r"trainer\.limit_val_batches=1: .*leave it at 1\.0"):
        run(tmp_path, validate=False, limit_val_batches=1)
    with pytest.raises(RuntimeError, match="val/b/accuracy was not logged.*num_test"):
        run(tmp_path, limit_val_batches=2)
    for interval, said in {2: "=2: a has 3 batches", 0.7: "=0.7: a has 3 batches", "00:00:01:00": " is a time"}.items():
        with pytest.raises(ValueError, match=rf"trainer\.val_check_interval{said}.*leave it at 1\.0"):
            run(tmp_path, validate=False, val_check_interval=interval)  # after the second of three batches, or any time
    with pytest.raises(ValueError, match="confidence=95 "):
        ContinualLearning(confidence=95)


def test_a_validated_checkpoint_is_not_taken_for_the_base(tmp_path, capsys):
    module, trainer = run(tmp_path)
    continual = ContinualLearning()
    other = make_trainer(tmp_path / "other", number_stream(), continual=continual)
    other.validate(module, number_stream(), ckpt_path=str(tmp_path / "1_a.ckpt"), verbose=False)
    assert capsys.readouterr().out == ""
    assert continual.zero_shot == trainer.callbacks[0].zero_shot  # of the checkpoint's record


def test_a_validation_after_the_run_is_not_taken_for_the_base(tmp_path, capsys):
    continual = ContinualLearning()
    module, trainer = run(tmp_path, continual=continual)
    base, _ = continual.zero_shot, capsys.readouterr()
    trainer.validate(module, number_stream(), verbose=False)
    assert continual.zero_shot == base != continual.rows[-1]
    assert capsys.readouterr().out == ""


def test_callbacks_of_another_run_are_refused_and_the_same_trainer_may_fit_again(tmp_path):
    """Else a run would begin with the rows, checkpoints' folder and anchors of the one before."""
    continual = ContinualLearning(print_table=False)
    module, trainer = run(tmp_path / "one", continual=continual)
    trainer.fit(module, number_stream())  # all is learned
    with pytest.raises(ValueError, match="holds the record of another run; give every Trainer callbacks of its own"):
        run(tmp_path / "two", continual=continual)
    assert not list((tmp_path / "two").glob("*.ckpt"))
    options = {"stream": number_stream(stages=["a", "b", "c", "a"]), "continual": continual}
    again = make_trainer(tmp_path / "three", **options)
    again.fit(module, options["stream"], ckpt_path=str(tmp_path / "one" / "last.ckpt"))  # has a record of its own
    assert len(continual.rows) == 4


def test_without_a_stream_the_mend_is_named(tmp_path):
    stream = number_stream()
    with pytest.raises(ValueError, match="needs a stream of tasks: call trainer.fit"):
        make_trainer(tmp_path, stream).fit(LinearModule(), train_dataloaders=[0], val_dataloaders=[0])


def test_fast_dev_run_writes_nothing(tmp_path):
    run(tmp_path, validate=False, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_test_and_predict_write_their_own_files(tmp_path):
    module, trainer = run(tmp_path)
    before = (tmp_path / "samples.jsonl").read_text()
    trainer.test(module, number_stream(), verbose=False)
    predictions = trainer.predict(module, number_stream())
    assert len(predictions) == 8  # 6 rows are two batches of four, 5 as well
    for filename in ("test.jsonl", "predictions.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / filename).read_text().splitlines()]
        assert [row["row_id"] for row in rows[:2]] == ["a/test/0", "a/test/1"]
        assert len(rows) == 23 and "stage" not in rows[0]
    assert (tmp_path / "samples.jsonl").read_text() == before


def test_checkpoints_are_named_after_tasks_and_load_with_weights_only(tmp_path):
    run(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert names == ["1_a.ckpt", "2_b.ckpt", "3_c.ckpt", "last.ckpt"]
    state = torch.load(tmp_path / "2_b.ckpt", weights_only=True)
    record = state["callbacks"]["ContinualLearning"]
    assert len(record["rows"]) == 2 and record["tasks"] == ["a", "b", "c"]


# -- what else a cell holds, and what it was measured with -------------------------------------------------------------


def test_precision_and_the_like_stand_in_the_cell_but_not_in_the_table(tmp_path):
    """The module logs them of task b alone; the other cells stay as they are."""

    class Module(LinearModule):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            self.log_dict({f"val/b/{name}": 0.25 for name in YES_NO_RATIOS})

    _, trainer = run(tmp_path, module=Module())
    for row in read_matrix(tmp_path)["rows"]:
        assert set(row["scores"]["a"]) == {"accuracy", "num_samples"}
        further = {name: row["scores"]["b"][name] for name in YES_NO_RATIOS}
        assert further == {"precision": 0.25, "recall": 0.25, "f1": 0.25, "yes_ratio": 0.25}
    matrix = AccuracyMatrix.load(tmp_path / "accuracy_matrix.json")
    assert matrix.rows == trainer.callbacks[0].rows
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(matrix.table())
    assert "25.0" not in console.export_text()


def test_fingerprints_of_the_evaluated_split_stand_in_the_record_and_its_checkpoints(tmp_path):
    stream = number_stream(evaluate_on="val")
    run(tmp_path, stream=stream)
    expected = {name: stream.fingerprint(name, "val") for name in "abcp"}
    assert read_matrix(tmp_path)["fingerprints"] == expected
    assert all(re.fullmatch("[0-9a-f]{12}", fingerprint) for fingerprint in expected.values())
    assert AccuracyMatrix.load(tmp_path / "accuracy_matrix.json").fingerprints == expected
    state = torch.load(tmp_path / "1_a.ckpt", weights_only=True)
    assert state["callbacks"]["ContinualLearning"]["fingerprints"] == expected


def asked_otherwise(name: str):
    """The stream of the other tests, but for the prompt of one task or probe."""
    stream = number_stream()
    stream.everything[name] = replace(stream.everything[name], prompt=Prompt(suffix="Answer 0 or 1."))
    return stream


@pytest.mark.parametrize("name", ["a", "p"])
def test_a_run_does_not_go_on_where_a_task_or_probe_is_measured_otherwise(tmp_path, name):
    run(tmp_path)
    before, now = number_stream().fingerprint(name, "test"), asked_otherwise(name).fingerprint(name, "test")
    trainer = make_trainer(tmp_path / "other", asked_otherwise(name))
    with pytest.raises(ValueError, match=f"'{name}' is evaluated otherwise.*{before}, now {now}.*restore its prompt"):
        trainer.fit(LinearModule(), asked_otherwise(name), ckpt_path=str(tmp_path / "1_a.ckpt"))
    assert not (tmp_path / "other" / "accuracy_matrix.json").exists()


def answering(forced_prefix: str | None = None, **options) -> LinearModule:
    """A module that says how it answers."""
    module = LinearModule()
    module.evaluation, module.forced_prefix = Sampling(4, **options), forced_prefix
    return module


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefix": "<answer>"}, "evaluation.prefix is '<answer>', in the checkpoint it is ''"),
        ({"forced_prefix": "so"}, "forced_prefix is 'so', in the checkpoint it is None"),
    ],
)
def test_a_run_does_not_go_on_where_answers_are_drawn_otherwise(tmp_path, options, said):
    run(tmp_path, module=answering())
    for module, expected in ((answering(), None), (answering(**options), said)):
        trainer = make_trainer(tmp_path / "other", number_stream())
        with pytest.raises(ValueError, match=expected) if expected else nullcontext():
            trainer.fit(module, number_stream(), ckpt_path=str(tmp_path / "1_a.ckpt"))


def test_a_checkpoint_from_before_there_were_fingerprints_is_gone_on_with(tmp_path):
    run(tmp_path)
    state = torch.load(tmp_path / "1_a.ckpt", weights_only=True)
    del state["callbacks"]["ContinualLearning"]["fingerprints"]
    torch.save(state, tmp_path / "earlier.ckpt")
    trainer = make_trainer(tmp_path / "other", number_stream())
    trainer.fit(LinearModule(), number_stream(), ckpt_path=str(tmp_path / "earlier.ckpt"))
    resumed, whole = read_matrix(tmp_path / "other"), read_matrix(tmp_path)
    assert resumed == whole and len(resumed["fingerprints"]) == 4


# -- the record itself -------------------------------------------------------------------------------------------------

MATRIX = AccuracyMatrix(
    tasks=["a", "b"],
    probes=["p"],
    stages=[["a"], ["b"]],
    zero_shot={name: {"accuracy": 0.25, "num_samples": 100} for name in "abp"},
    rows=[
        {name: {"accuracy": score, "num_samples": 100} for name, score in zip("abp", scores, strict=True)}
        for scores in [(0.9, 0.3, 0.1), (0.7, 0.8, 0.2)]
    ],
    fingerprints={name: 6 * f"{name}0" for name in "abp"},
)


def test_metrics_by_hand():
    """AvgAcc (.7 + .8)/2; FM = BWT = .7 - .9, all of it task a's; FWT = .3 - .25; probe .2 - .25, at worst .1 - .25."""
    assert MATRIX.metrics() == pytest.approx(
        {
            "average_accuracy": 0.75,
            "forgetting_measure": -0.2,
            "backward_transfer": -0.2,
            "learning": 0.85,
            "mean_average_accuracy": 0.825,
            "worst_dip": 0.2,
            "forward_transfer": 0.05,
            "forgetting/a": -0.2,
            "probes_mean_change": -0.05,
            "probe/p": -0.05,
            "probe_minimum/p": -0.15,
        }
    )


def test_json_is_read_back_and_other_versions_are_refused(tmp_path):
    MATRIX.save(tmp_path / "accuracy_matrix.json")
    assert AccuracyMatrix.load(tmp_path / "accuracy_matrix.json") == MATRIX
    with pytest.raises(ValueError, match="version 2.*reads version 1"):
        AccuracyMatrix.from_json({**MATRIX.to_json(), "version": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy_matrix.json"]


def test_a_file_from_before_there_were_fingerprints_is_read():
    earlier = MATRIX.to_json()
    del earlier["fingerprints"]
    matrix = AccuracyMatrix.from_json(earlier)
    assert matrix == replace(MATRIX, fingerprints={})
    assert matrix.rows == MATRIX.rows


def test_a_cell_has_room_for_all_that_is_reported_of_yes_no_questions():
    assert set(YES_NO_RATIOS) < set(FURTHER) < set(Cell.__annotations__)


def test_the_table_shows_every_cell_and_intervals_when_asked():
    """Wilson at .95 of 70 of 100: (.604, .781), which is not symmetric."""
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(MATRIX.table(), MATRIX.table(confidence=0.95))
    text = console.export_text()
    for shown in ("accuracy in %", "base", "90.0", "70.0", "probe p", "70.0 [60.4, 78.1]"):
        assert shown in text


def test_a_broken_last_line_is_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"stage": 0}\n{"stage": 1}\n{"stage": 2}\n{"sta')
    keep_lines(path, lambda row: row["stage"] <= 1)
    assert path.read_text() == '{"stage": 0}\n{"stage": 1}\n'


def test_samples_of_several_ranks_come_in_the_order_of_one():
    """Two ranks hold neighbouring halves of each batch; the merged lines are those of a single process."""

    class Strategy:
        def broadcast(self, rows, src):
            keys = [(batch, src, position) for batch in (1, 0) for position in (0, 1)]
            return [(key, {"row": key}) for key in keys]

    class TwoRanks:
        world_size, strategy = 2, Strategy()

    merged = [row["row"] for row in SampleLog().take(TwoRanks())]
    assert merged == [(batch, rank, position) for batch in (0, 1) for rank in (0, 1) for position in (0, 1)]


def test_no_warning_in_a_run(tmp_path):
    """What a person sees at the console is about their run, not about libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(?s).*(set_vital|LeafSpec|logging interval|does not have many workers)")
        run(tmp_path)
