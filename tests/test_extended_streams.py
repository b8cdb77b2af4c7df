"""Tasks that come later: a stream that was extended behind its end is learned like the longer one in one go."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cpt_lightning.callbacks import EWC, L2, ContinualLearning, ModelMerging
from cpt_lightning.callbacks.cards import model_card
from cpt_lightning.callbacks.continuation import unmeasured
from cpt_lightning.checkpoint_io import read_checkpoint
from cpt_lightning.cli import main
from cpt_lightning.data import Replay
from cpt_lightning.models import Backbone
from cpt_lightning.pictures.comparison import task_curves
from cpt_lightning.pictures.probes import probe_curves
from cpt_lightning.records import AccuracyMatrix, RunFolder
from cpt_lightning.report.arms import Arm
from cpt_lightning.report.figures import scores_of
from cpt_lightning.report.matrices import matrices_of, table_of
from cpt_lightning.report.summary import summary_table
from cpt_lightning.tasks import Prompt, Task
from tests.fakes import KillAt, Killed, LinearModule, NumberSource, make_trainer, number_stream
from tests.ranks import ROOT, run_ranks
from tests.test_resume import MODELS, OPTIONS, STREAM, scalars


def stream_of(tasks: str, probes: str = "p", num_test: int = 6, **options):
    """The stream of ``number_stream``, with these of its tasks, and probes like them."""

    def made(names: str) -> dict[str, Task]:
        return {name: Task(NumberSource(name, num_test=num_test), prompt=Prompt(suffix=name)) for name in names}

    return number_stream(tasks=made(tasks), probes=made(probes), **options)


def learn(folder: Path, stream, checkpoint: Path | str | None = None, callbacks=(), manual=False, **options):
    """A run, or what follows a checkpoint of it or another, as ``cpt fit`` makes it; returns the module.

    At this rate what is answered changes with every batch.
    """
    module, trainer = LinearModule(manual=manual, lr=3.0), make_trainer(folder, stream, callbacks, **options)
    path = None if checkpoint is None else str(folder / checkpoint)
    trainer.validate(module, stream, ckpt_path=path, verbose=False)
    trainer.fit(module, stream, ckpt_path=path)
    return module


def matrix_of(folder: Path) -> AccuracyMatrix:
    return AccuracyMatrix.load(folder / "accuracy_matrix.json")


def samples_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def assert_learned_alike(extended: Path, whole: Path) -> None:
    """The same weights, cells and answers, but for cells that an extended run does not have."""
    ends = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (extended, whole)]
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())
    cells = [[matrix_of(folder).zero_shot, *matrix_of(folder).rows] for folder in (extended, whole)]
    assert cells[0] == [{name: full[name] for name in row} for row, full in zip(*cells, strict=True)]
    assert [list(row) for row in cells[0]] == [[name for name in full if name in row]
                                               for row, full in zip(*cells, strict=True)]  # fmt: skip
    measured = {(stage, name) for stage, row in enumerate(cells[0]) for name in row}
    said = [{(row["stage"], row["task"], row["row_id"]): row for row in samples_of(each)} for each in (extended, whole)]
    assert said[0] == {key: row for key, row in said[1].items() if key[:2] in measured}
    assert len(samples_of(extended)) == len(said[0]), "no line stands twice"


METHODS = {
    "alone": {},
    "kept optimizer": {"continual": lambda: ContinualLearning(reset_optimizer=False, print_table=False)},
    "EWC": {"callbacks": lambda: [EWC(strength=10.0, num_rows=3)]},
    "L2": {"callbacks": lambda: [L2(strength=1.0, anchor="base")]},
    "merging": {"callbacks": lambda: [ModelMerging(start="base")]},
    "replay": {"stream": {"replay": Replay(0.25, rows_per_task=3)}},
    "manual": {"manual": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_an_extended_run_ends_like_the_longer_stream_in_one_go(tmp_path, method):
    """a and b are learned and evaluated; then c comes, which the base and the model after a were not asked."""
    options = METHODS[method]

    def made():
        found = {name: make() for name, make in options.items() if callable(make)}
        return {**found, "manual": options.get("manual", False)}

    of_stream = options.get("stream", {})
    whole = learn(tmp_path / "whole", stream_of("abc", **of_stream), **made())
    before = len(learn(tmp_path / "run", stream_of("ab", **of_stream), **made()).seen)
    module = learn(tmp_path / "run", stream_of("abc", **of_stream), "last.ckpt", **made())
    assert not (tmp_path / "run" / "validate.jsonl").exists(), "its answers stand with the others"
    assert (module.seen, module.rates) == (whole.seen[before:], whole.rates[before:])
    assert_learned_alike(tmp_path / "run", tmp_path / "whole")
    matrix = matrix_of(tmp_path / "run")
    assert [set(row) for row in (matrix.zero_shot, *matrix.rows)] == [set("abp"), set("abp"), set("abpc"), set("abpc")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The stream a, b, and the stream a, b, c in one go."""
    folders = {tasks: tmp_path_factory.mktemp(tasks) for tasks in ("ab", "abc")}
    for tasks, folder in folders.items():
        learn(folder, stream_of(tasks))
    return folders


# After b the stream was extended by c and the probe q.
EXTENDED = AccuracyMatrix(
    tasks=["a", "b", "c"],
    probes=["p", "q"],
    stages=[["a"], ["b"], ["c"]],
    zero_shot={name: {"accuracy": score, "num_samples": 100} for name, score in {"a": 0.2, "b": 0.3, "p": 0.8}.items()},
    rows=[
        {name: {"accuracy": score, "num_samples": 100} for name, score in scores.items()}
        for scores in (
            {"a": 0.9, "b": 0.5, "p": 0.7},
            {"a": 0.6, "b": 0.8, "c": 0.4, "p": 0.6, "q": 0.9},
            {"a": 0.7, "b": 0.5, "c": 0.6, "p": 0.5, "q": 0.5},
        )
    ],
)


def test_metrics_of_an_extended_stream_by_hand():
    """AvgAcc (.7 + .5 + .6)/3; MAA (.9 + .7 + .6)/3; FM and BWT (-.2 - .3)/2; a dips by .3 after b, and b after c.

    FWT is b's .5 - .3 alone, and the probes' change p's .5 - .8: the base was not asked about c and q.
    """
    assert EXTENDED.metrics() == pytest.approx(
        {
            "average_accuracy": 0.6,
            "learning": 2.3 / 3,
            "mean_average_accuracy": 2.2 / 3,
            "forgetting_measure": -0.25,
            "forgetting/a": -0.2,
            "forgetting/b": -0.3,
            "backward_transfer": -0.25,
            "worst_dip": 0.3,
            "forward_transfer": 0.2,
            "probes_mean_change": -0.3,
            "probe/p": -0.3,
            "probe_minimum/p": -0.3,
        }
    )
    figures = scores_of(EXTENDED)
    assert (figures["FWT"], figures["probes"], figures["probes, lowest"]) == pytest.approx((20, -30, -30))


def test_cells_that_are_missing_are_absent_in_the_file_and_blank_or_dashes_elsewhere(tmp_path):
    EXTENDED.save(tmp_path / "accuracy_matrix.json")
    assert AccuracyMatrix.load(tmp_path / "accuracy_matrix.json") == EXTENDED
    assert "c" not in json.loads((tmp_path / "accuracy_matrix.json").read_text())["rows"][0]["scores"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(EXTENDED.table(confidence=0.95), summary_table(EXTENDED))
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    rows = {(line[0] if line[0] != "probe" else line[1]): line for line in lines if line}
    assert [" ".join(line) for line in lines if line[:1] == ["c"]] == [
        "c - - 40.0 [30.9, 49.8] 60.0 [50.2, 69.1]",
        "c 60.0 60.0 0.0",
    ]
    assert rows["q"][2:] == ["50.0", "40.0"], "of its best, and no score of the base"
    card = model_card("x", "full", Backbone(), "float32", ["a", "b", "c"], matrix=EXTENDED)
    assert "| c | 60.0 |  | 100 |" in card and "| a | 70.0 | 20.0 | 100 |" in card
    assert "| c |" not in model_card("x", "full", Backbone(), "float32", ["a"], matrix=EXTENDED)


def test_arms_with_cells_that_are_missing_are_drawn_and_averaged_by_what_they_have():
    """Lines begin where all that they are about was asked."""
    whole = replace(EXTENDED, zero_shot=EXTENDED.rows[2], rows=[EXTENDED.rows[2]] * 3)
    panels = {axes.get_title(): axes for axes in task_curves({"extended": EXTENDED, "whole": whole}).axes}
    assert list(panels["c"].lines[0].get_xdata()) == [2, 3]
    assert list(panels["probes, mean"].lines[0].get_xdata()) == [2, 3]
    assert list(panels["a"].lines[0].get_xdata()) == [0, 1, 2, 3]
    curve = probe_curves({"extended": [EXTENDED]}).axes[0].lines[0]
    assert list(curve.get_ydata()) == pytest.approx([80, 70, 60, 50]), "of p, which the base was asked"
    entries = table_of([EXTENDED, EXTENDED])[1]["c"]
    assert entries[:2] == [None, None] and [entry.accuracy for entry in entries[2:]] == [40, 60]


def test_no_cell_is_the_mean_of_some_of_the_seeds(tmp_path):
    """One seed was extended and the other learned the longer stream at once: the arm's matrix is that of the first."""
    whole = replace(EXTENDED, zero_shot=EXTENDED.rows[2], rows=[EXTENDED.rows[2]] * 3)
    arm = Arm("arm")
    for seed, matrix in enumerate([EXTENDED, whole]):
        (tmp_path / str(seed)).mkdir()
        matrix.save(tmp_path / str(seed) / "accuracy_matrix.json")
        arm.add(RunFolder(tmp_path / str(seed)))
    assert matrices_of(arm) == [EXTENDED]


def test_what_is_asked_before_the_run_goes_on(tmp_path, runs):
    """What is new, at the end of a stage behind which there is another one."""

    def asked(stream, checkpoint: Path) -> list[str]:
        trainer = make_trainer(tmp_path, stream)
        trainer.datamodule = stream
        return unmeasured(trainer, read_checkpoint(checkpoint, parts=()))

    last, first = runs["ab"] / "last.ckpt", runs["ab"] / "1_a.ckpt"
    assert asked(stream_of("abc", "pq"), last) == ["c", "q"]
    assert asked(stream_of("abc"), first) == ["c"] and asked(stream_of("ab"), first) == []
    assert asked(stream_of("ab", stages=["a", "b", "a"]), last) == []
    assert asked(stream_of("ab", "pq"), last) == [], "nothing is left to learn"
    with pytest.raises(Killed):
        learn(tmp_path, stream_of("ab"), callbacks=[KillAt(1, batch=2)])
    assert asked(stream_of("abc"), tmp_path / "last.ckpt") == []


def test_metrics_are_those_of_the_cells_that_are_there(tmp_path, runs):
    """All but forward transfer are as in one go; that is b's term alone, for the base was not asked about c."""
    learn(tmp_path, stream_of("abc"), runs["ab"] / "last.ckpt")
    matrix, whole = matrix_of(tmp_path), matrix_of(runs["abc"])
    forward = matrix.rows[0]["b"]["accuracy"] - matrix.zero_shot["b"]["accuracy"]
    assert matrix.added == ["c"]
    assert matrix.metrics() == pytest.approx({**whole.metrics(), "forward_transfer": forward})


@pytest.mark.parametrize("kill", [("on_train_batch_start", 0), ("on_train_batch_start", 2), ("on_train_epoch_end", 0)])
def test_an_extended_run_may_be_killed_anywhere(tmp_path, runs, kill):
    learn(tmp_path, stream_of("ab"))
    with pytest.raises(Killed):
        learn(tmp_path, stream_of("abc"), "last.ckpt", callbacks=[KillAt(2, *kill)])
    learn(tmp_path, stream_of("abc"), "last.ckpt")
    assert_learned_alike(tmp_path, runs["abc"])


def test_a_stream_is_extended_again_and_again(tmp_path):
    """By c, then by d and a once more; each is asked for the first time when it comes."""
    learn(tmp_path / "whole", stream_of("abcd", stages=[*"abcda"]))
    learn(tmp_path / "run", stream_of("ab"))
    for stages in ("abc", "abcda"):
        learn(tmp_path / "run", stream_of("".join(sorted(set(stages))), stages=[*stages]), "last.ckpt")
    assert_learned_alike(tmp_path / "run", tmp_path / "whole")
    matrix = matrix_of(tmp_path / "run")
    assert matrix.added == ["c", "d"] and [len(row) for row in matrix.rows] == [3, 4, 5, 5, 5]


def test_the_row_of_the_checkpoint_is_in_the_file_before_anything_is_learned(tmp_path, runs):
    with pytest.raises(Killed):
        learn(tmp_path, stream_of("abc"), runs["ab"] / "last.ckpt", callbacks=[KillAt(2)])
    matrix = matrix_of(tmp_path)
    assert matrix.rows[-1] == matrix_of(runs["abc"]).rows[1] and len(matrix.rows) == 2


def test_a_stream_that_is_under_way_is_extended_at_the_end_of_a_task(tmp_path, runs):
    """After a, b is still to come, and c behind it: the model after a is asked about c."""
    learn(tmp_path, stream_of("abc"), runs["ab"] / "1_a.ckpt")
    assert_learned_alike(tmp_path, runs["abc"])
    assert [("c" in row) for row in matrix_of(tmp_path).rows] == [True, True, True]


def test_within_a_task_the_evaluation_at_its_end_is_the_first_to_ask_what_is_new(tmp_path, runs):
    """Whatever a model half-way was asked joins no row, for no row stands for it."""
    with pytest.raises(Killed):
        learn(tmp_path, stream_of("ab"), callbacks=[KillAt(1, batch=1)])
    learn(tmp_path, stream_of("abc"), "last.ckpt")
    assert_learned_alike(tmp_path, runs["abc"])
    assert [("c" in row) for row in matrix_of(tmp_path).rows] == [False, True, True]


def test_probes_may_be_added_and_a_probe_may_be_learned(tmp_path, runs):
    """q is new; p is a task from now on, which every model was asked, so that nothing of it is missing."""
    learn(tmp_path, stream_of("abp", "q"), runs["ab"] / "last.ckpt")
    matrix = matrix_of(tmp_path)
    assert (matrix.tasks, matrix.probes, matrix.added) == (["a", "b", "p"], ["q"], ["q"])
    assert [set(row) for row in matrix.rows] == [set("abp"), set("abpq"), set("abpq")]
    assert not [name for name in matrix.metrics() if "probe" in name], "q cannot be held against the base"
    base, before = matrix.zero_shot, matrix.rows
    terms = [before[0]["b"]["accuracy"] - base["b"]["accuracy"], before[1]["p"]["accuracy"] - base["p"]["accuracy"]]
    assert matrix.metrics()["forward_transfer"] == pytest.approx(sum(terms) / 2)


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (stream_of("a"), r"its stages are \[\['a'\], \['b'\]\], now they are \[\['a'\]\]"),
        (stream_of("bac"), "its stages are .*now they are"),
        (stream_of("acb"), "its stages are .*now they are"),
        (stream_of("abc", stages=["a", ["b", "c"]]), "its stages are .*now they are"),
        (stream_of("abc", ""), "another stream: p was evaluated, and is missing now"),
        (stream_of("abc", num_test=5), "'a' is evaluated otherwise than in the checkpoint"),
    ],
    ids=["one less", "another order", "one between", "one mixed", "without the probe", "other rows"],
)
def test_a_stream_that_does_not_begin_as_it_did_is_refused(tmp_path, runs, stream, said):
    with pytest.raises(ValueError, match=said):
        learn(tmp_path, stream, runs["ab"] / "last.ckpt")
    assert not (tmp_path / "accuracy_matrix.json").exists()


def test_what_was_validated_of_another_checkpoint_joins_no_row(tmp_path, runs):
    """Then forward transfer has no score of c before it was learned, which is said."""
    module, stream = LinearModule(), stream_of("abc")
    trainer = make_trainer(tmp_path, stream)
    trainer.validate(module, stream, ckpt_path=str(runs["ab"] / "1_a.ckpt"), verbose=False)
    with pytest.warns(
        UserWarning, match="c came to the stream later, and the checkpoint was not asked.*trainer.validate"
    ):
        trainer.fit(module, stream, ckpt_path=str(runs["ab"] / "last.ckpt"))
    assert [("c" in row) for row in matrix_of(tmp_path).rows] == [False, False, True]
    assert {row["stage"] for row in samples_of(tmp_path) if row["task"] == "c"} == {3}
    assert "average_accuracy" in matrix_of(tmp_path).metrics()


# -- the real modules, by the command that a person types ------------------------------------------------------------

SHORT = STREAM.replace("num_test: 4", "num_test: 4, num_train: 12")
BARS = "{source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: bars2}}, num_test: 4, num_train: 12}"
LONGER = SHORT.replace("probes:", f"  bars2: {BARS}\nprobes:")
FILTERED = [
    "--filter.mode=random", "--filter.completions_per_row=2", "--filter.sampling.max_new_tokens=12",
    "--filter.lowest=0", "--filter.cap=6",
]  # fmt: skip
MEASURED = [
    "--trainer.callbacks+=cpt_lightning.callbacks.Drift", "--trainer.callbacks.num_rows=2",
    "--trainer.callbacks.max_new_tokens=8", "--trainer.callbacks+=cpt_lightning.callbacks.GradientRisk",
    "--trainer.callbacks.num_rows=1", "--trainer.callbacks.max_new_tokens=8",
    "--trainer.callbacks+=cpt_lightning.callbacks.WeightChange", "--trainer.callbacks.matrices=null",
    "--trainer.callbacks+=cpt_lightning.callbacks.WeightDistance", "--trainer.callbacks.num_rows=1",
    "--trainer.callbacks.max_new_tokens=8",
    "--trainer.callbacks+=cpt_lightning.callbacks.Influence", "--trainer.callbacks.num_rows=2",
    "--trainer.callbacks.max_new_tokens=8", "--trainer.callbacks.every_n_steps=2",
]  # fmt: skip
ARMS = {
    **{name: MODELS[name] for name in ("sft", "lwf", "renewed adapters", "grpo")},
    "adapters per task": [*MODELS["renewed adapters"], "--model.backbone.lora.along_stream=per_task"],
    "sampled answers": [*MODELS["sft"], "--model.evaluation.temperature=1"],
    "filtered": [*MODELS["sft"], *FILTERED],
    "measured": [*MODELS["sft"], *MEASURED],
}


@pytest.fixture
def streams(tmp_path) -> dict[str, str]:
    """Files of the stream of two tasks and of that of three, as options."""
    for name, text in {"short": SHORT, "longer": LONGER}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return {name: f"--data={tmp_path / name}.yaml" for name in ("short", "longer")}


def test_what_is_not_asked_and_which_method_is_gone_is_said(tmp_path, streams, caplog):
    """A probe alone is not asked where no stage is left; a penalty may be left out for what comes later."""
    options = [*MODELS["sft"], *OPTIONS, f"--run_dir={tmp_path / 'run'}"]
    ewc = ["-c", str(ROOT / "configs" / "methods" / "ewc.yaml")]
    ewc += ["--trainer.callbacks.num_rows=2", "--trainer.callbacks.max_new_tokens=8"]
    probe = "{source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: colour}}, num_test: 2}"
    main(["fit", streams["short"], *options, *ewc])
    caplog.set_level("INFO")
    main(["fit", streams["short"], *options, *ewc, "--ckpt_path=last", f"--data.probes.colour={probe}"])
    assert "nothing is left to learn; not asked: probe colour (`cpt test --ckpt_path` asks everything)" in caplog.text
    assert "trainer.callbacks" not in caplog.text
    main(["fit", streams["longer"], *options, "--ckpt_path=last"])
    assert "trainer.callbacks EWC -> none" in caplog.text


@pytest.mark.parametrize("arm", ARMS)
def test_cpt_fit_learns_a_task_that_comes_later_as_in_one_go(tmp_path, streams, arm, capsys, caplog):
    """On the embedded base: weights, cells, answers, verdicts and measurements of the new task, bit for bit."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*ARMS[arm], *OPTIONS]
    main(["fit", streams["longer"], *options, f"--run_dir={whole}"])
    main(["fit", streams["short"], *options, f"--run_dir={run}"])
    capsys.readouterr()
    caplog.set_level("INFO")
    main(["fit", streams["longer"], *options, f"--run_dir={run}", "--ckpt_path=last"])
    assert_learned_alike(run, whole)
    assert "was not asked about it: bars2" in caplog.text
    assert "the stream was extended since the checkpoint, by stage bars2" in caplog.text
    assert "data.tasks.bars2 is new." in caplog.text and RunFolder(run).changed_at == [6]
    shown = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    dashes = [line[1:].count("-") for line in shown if line[:1] == ["bars2"]]
    assert dashes == [0, 2, 2, 0], "what the checkpoint said, the matrix before and after the task, and the summary"
    for name in ("drift", "gradient_risk", "weight_change", "weight_distance", "influence"):
        assert _measured(run, name) == _measured(whole, name), name
    assert _verdicts(run) == _verdicts(whole)
    assert len(_verdicts(run)) == (39 if arm == "filtered" else 0), "a header and twelve rows of each task"


def _measured(run: Path, name: str) -> list[dict]:
    """What was measured in the stage that came later."""
    path = run / f"{name}.json"
    return [row for row in json.loads(path.read_text())["measurements"] if row["stage"] == 3] if path.exists() else []


def _verdicts(run: Path) -> list[dict]:
    files = sorted((run / "filter").glob("*.jsonl"))
    return [{**json.loads(line), "time_s": 0} for file in files for line in file.read_text().splitlines()]


def test_tensorboard_shows_what_came_later_where_it_was_asked(tmp_path, streams):
    """In one go bars2 is asked at 0 and after 3, 6 and 9 batches, beside the last one; here before batch 6 for the
    first time. Forward transfer is another one."""
    options = [*MODELS["sft"], *(option for option in OPTIONS if "logger" not in option)]
    whole, run = tmp_path / "whole", tmp_path / "run"
    main(["fit", streams["longer"], *options, f"--run_dir={whole}"])
    main(["fit", streams["short"], *options, f"--run_dir={run}"])
    main(["fit", streams["longer"], *options, f"--run_dir={run}", "--ckpt_path=last"])
    shown, expected = scalars(run), scalars(whole)
    assert shown.keys() == expected.keys()
    later = {"val/bars2/accuracy", "val/bars2/total", "val/bars2/num_samples"}
    assert {tag for tag in shown if shown[tag] != expected[tag]} <= {*later, "continual/forward_transfer"}
    for tag in later:
        steps, values = zip(*expected[tag], strict=True)
        assert steps == (0, 2, 5, 8) and shown[tag] == [(6, values[2]), (8, values[3])]


def test_runs_with_cells_that_are_missing_are_reported_and_compared(tmp_path, streams):
    """The page, its tables and pictures: a dash where nothing was measured, and a word of caution."""
    options = [*MODELS["sft"], *OPTIONS]
    whole, run = tmp_path / "whole", tmp_path / "run"
    main(["fit", streams["longer"], *options, f"--run_dir={whole}"])
    main(["fit", streams["short"], *options, f"--run_dir={run}"])
    main(["fit", streams["longer"], *options, f"--run_dir={run}", "--ckpt_path=last"])
    main(["report", str(run), str(whole), "-o", str(tmp_path / "page.html")])
    text = (tmp_path / "page.md").read_text()
    assert "run was extended by bars2 on the way: the base was not asked about that" in text.replace("\\", "")
    assert "| bars2 | - | - |" in text and "has no intervals" not in text
    with (tmp_path / "page.csv").open() as file:
        figures = {row.pop("arm"): row for row in csv.DictReader(file)}
    differing = {name for name in figures["run"] if figures["run"][name] != figures["whole"][name]}
    assert differing <= {"FWT", "minutes", "host memory"} and "AvgAcc" in figures["run"]
    with (tmp_path / "page_files/matrices.csv").open() as file:
        cells = [(row["arm"], row["stage"]) for row in csv.DictReader(file) if row["name"] == "bars2"]
    assert cells == [("run", "2"), ("run", "3"), *(("whole", str(stage)) for stage in range(4))]
    assert (tmp_path / "page_files/curves_1.png").exists() and (tmp_path / "page_files/matrix_1.png").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_learn_a_task_that_comes_later_as_one_does_in_one_go(tmp_path, streams, strategy):
    """Two processes each time, against one: the same cells and answers, weights but for rounding."""
    options = [*MODELS["sft"], *OPTIONS, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01",
               "--data.prompts_per_step=2", "--model.lr_scheduler=null"]  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    main(["fit", streams["longer"], *options, f"--run_dir={whole}"])
    for stream in ("short", "longer"):
        command = ["fit", streams[stream], *options, f"--run_dir={run}", "--ckpt_path=last"]
        run_ranks(main, [*command, f"--trainer.strategy={strategy}", "--trainer.devices=2"])
    ends = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, whole)]
    for name, weight in ends[1].items():
        torch.testing.assert_close(ends[0][name], weight, atol=1e-5, rtol=1e-4)
    assert matrix_of(run).rows[1:] == matrix_of(whole).rows[1:] and "bars2" not in matrix_of(run).rows[0]
    asked = [(row["stage"], row["task"], row["completion"]) for row in samples_of(whole)]
    expected = [row for row in asked if row[0] > 1 or row[1] != "bars2"]
    assert sorted((row["stage"], row["task"], row["completion"]) for row in samples_of(run)) == sorted(expected)


def test_a_schedule_that_tasks_keep_cannot_be_made_longer(tmp_path, streams, capsys):
    """The rate falls to 0 over the six steps of two tasks; for nine it would have to be another schedule."""
    kept = ["--continual.reset_optimizer=false", *MODELS["sft"], *OPTIONS]
    kept += ["--model.lr_scheduler=torch.optim.lr_scheduler.PolynomialLR", "--model.lr_scheduler.total_iters=6"]
    run = tmp_path / "run"
    main(["fit", streams["short"], *kept, f"--run_dir={run}"])
    longer = ["fit", streams["longer"], *kept, f"--run_dir={run}", "--ckpt_path=last"]
    with pytest.raises(SystemExit):
        main([*longer, "--model.lr_scheduler.total_iters=9"])
    said = capsys.readouterr().err
    assert "model.init_args.lr_scheduler.init_args.total_iters differs" in said and "has no effect" in said
    assert len(matrix_of(run).rows) == 2 and RunFolder(run).changed_at == []
    main([*longer, "--model.lr_scheduler.total_iters=9", "--continual.reset_optimizer=true"])
    assert len(matrix_of(run).rows) == 3
