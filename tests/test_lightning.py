"""What a Lightning user expects of a module, a data module and callbacks holds, or is refused at the start."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from cpt_lightning.callbacks import ContinualLearning, TaskCheckpoint
from cpt_lightning.checkpoint_io import read_checkpoint
from cpt_lightning.cli import main
from cpt_lightning.data import TaskStream
from cpt_lightning.models import Backbone, Lora
from cpt_lightning.modules import RFT, SFT, MultiTask, OnPolicySFT, TaskSchedule
from cpt_lightning.modules.compatibility import KEY
from cpt_lightning.rollouts import Sampling, completion_logprobs
from cpt_lightning.sharded_checkpoints import save_shards
from cpt_lightning.tasks import Task, ToyWorld
from cpt_lightning.types import Batch
from tests.fakes import LinearModule, make_trainer, number_stream
from tests.training import with_examples


def toy_stream(**options) -> TaskStream:
    """Two tasks of two steps each, and a probe."""
    tasks = {name: Task(ToyWorld(name), num_test=2) for name in ("bars2", "digit2")}
    probes = {"count": Task(ToyWorld("count"), num_test=2)}
    return TaskStream(**{"tasks": tasks, "probes": probes, "prompts_per_step": 2, "steps": 2} | options)


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def module_of(kind: type, backbone: Backbone, **options) -> L.LightningModule:
    """One that says little, and learns fast."""
    sampled = {} if kind is SFT else {"group_size": 2, "sampling": Sampling(4)}
    return kind(
        **{"backbone": backbone, "optimizer": adamw, "evaluation": Sampling(4, temperature=0)} | sampled | options
    )


def trainer_of(folder: Path, stream: TaskStream, more=(), **options) -> L.Trainer:
    """A Trainer as a Lightning user makes it, with the callbacks of this project that keep a run."""
    own = [ContinualLearning(print_table=False), TaskCheckpoint()]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    defaults = {**stream.trainer_options, "default_root_dir": str(folder), **quiet, "callbacks": [*own, *more]}
    return L.Trainer(**defaults | options)


def run(folder: Path, module: L.LightningModule, stream: TaskStream | None = None, more=(), **options) -> L.Trainer:
    """The Trainer of a whole run: the base is evaluated, then all stages are learned."""
    stream = stream or toy_stream()
    trainer = trainer_of(folder, stream, more, **options)
    torch.manual_seed(0)
    trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    return trainer


def matrix_of(trainer: L.Trainer) -> dict:
    return json.loads((Path(trainer.log_dir) / "accuracy_matrix.json").read_text())


def logps(module: L.LightningModule, batch: Batch) -> Tensor:
    """What a module gives each token of each target."""
    with torch.no_grad():
        return completion_logprobs(module.model.eval(), batch.prompts, batch.targets)


def answers(folder: Path, module: L.LightningModule) -> list[list[str]]:
    """What is said to each batch of each task and probe."""
    stream = toy_stream()
    return [evaluation.texts for evaluation in trainer_of(folder, stream).predict(module, stream)]


@pytest.fixture(scope="module")
def base(processor, tmp_path_factory) -> str:
    """The small model's folder, once for all runs here."""
    from tests.conftest import small_model

    folder = tmp_path_factory.mktemp("base")
    small_model.__wrapped__(processor).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def batch(processor, mixed_prompts) -> Batch:
    return with_examples(mixed_prompts, processor)


# -- load_from_checkpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "backbone", "options"),
    [
        (SFT, {}, {}),
        (SFT, {"tuning": "lora", "lora": Lora(rank=2, dropout=0.2)}, {"kl_coef": 0.1}),
        (SFT, {"tuning": "lora", "lora": Lora(rank=2, along_stream="per_task")}, {}),
        (RFT, {"freeze": ["vision_tower"]}, {"kl_coef": 0.1}),
        (SFT, {"tuning": "qlora", "lora": Lora(rank=2)}, {}),
        (MultiTask, {}, {}),
        (OnPolicySFT, {"tuning": "lora", "lora": Lora(rank=2, along_stream="renewed")}, {}),
    ],
    ids=["full", "lora", "per_task", "frozen part", "qlora", "multi-task", "renewed"],
)
def test_a_module_is_loaded_from_a_checkpoint_alone_and_answers_as_the_trained_one(
    tmp_path, base, batch, kind, backbone, options
):
    trained = module_of(kind, Backbone(base, **backbone), **options)
    if kind is OnPolicySFT:  # it finds nothing right to learn
        trained.judge = lambda rollout: ["kept"] * len(rollout.texts)
    run(tmp_path, trained)
    loaded = kind.load_from_checkpoint(tmp_path / "last.ckpt", evaluation=Sampling(4, temperature=0))
    assert loaded.backbone == trained.backbone
    assert torch.equal(logps(loaded, batch), logps(trained, batch))
    fresh = module_of(kind, trained.backbone)
    fresh.configure_model()
    assert not torch.equal(logps(fresh, batch), logps(trained, batch))
    assert answers(tmp_path, loaded) == answers(tmp_path, trained)


def test_a_folder_of_shards_is_loaded_too_and_options_are_given_by_keyword(tmp_path, base, batch):
    run(tmp_path, module_of(SFT, Backbone(base)))
    save_shards(read_checkpoint(tmp_path / "last.ckpt"), tmp_path / "shards.ckpt")
    one = SFT.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu", weights_only=True)
    other = RFT.load_from_checkpoint(str(tmp_path / "shards.ckpt"), group_size=3, kl_coef=0.1, reference="base")
    assert (other.group_size, other.kl_coef) == (3, 0.1)
    assert torch.equal(logps(one, batch), logps(other, batch))


@pytest.mark.parametrize("along_stream", ["per_task", "renewed"])
def test_a_module_that_was_loaded_learns_another_stream(tmp_path, base, along_stream):
    """Its adapters go on as in one stream: new ones for the next task, and those of earlier ones stay."""
    run(tmp_path, module_of(SFT, Backbone(base, tuning="lora", lora=Lora(rank=2, along_stream=along_stream))))
    loaded = SFT.load_from_checkpoint(tmp_path / "last.ckpt", optimizer=adamw, evaluation=Sampling(4, temperature=0))
    before = answers(tmp_path, loaded)
    tasks = {"polygon2": Task(ToyWorld("polygon2"), num_test=2)}
    run(tmp_path / "next", loaded, toy_stream(tasks=tasks))
    assert loaded.stages_begun == [["bars2"], ["digit2"], ["polygon2"]] and len(loaded.earlier) == 2
    if along_stream == "per_task":
        assert answers(tmp_path, loaded)[:2] == before[:2], "with their own adapters"
    again = SFT.load_from_checkpoint(tmp_path / "next" / "last.ckpt", evaluation=Sampling(4, temperature=0))
    assert answers(tmp_path, again) == answers(tmp_path, loaded)


class Poison:
    """Unpickled, it raises."""

    def __reduce__(self):
        return exec, ("raise AssertionError('code of the file was run')",)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    """The checkpoint of a short run with adapters."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder, module_of(SFT, Backbone(base, tuning="lora", lora=Lora(rank=2))), toy_stream(steps=1))
    return folder / "last.ckpt"


def test_a_checkpoint_names_no_class_and_runs_no_code(tmp_path, saved):
    checkpoint = read_checkpoint(saved)
    checkpoint["hyper_parameters"] = {"_instantiator": "os.system", "_class_path": "no.such.Module", "seed": 7}
    torch.save(checkpoint, tmp_path / "hyper.ckpt")
    assert SFT.load_from_checkpoint(tmp_path / "hyper.ckpt").seed == 0
    options = {**checkpoint[KEY]["backbone"], "lora": {"class_path": "no.such.Lora", "init_args": {}}}
    torch.save({**checkpoint, KEY: {**checkpoint[KEY], "backbone": options}}, tmp_path / "class.ckpt")
    with pytest.raises(ValueError, match="another version wrote its options .*class_path.*give backbone itself"):
        SFT.load_from_checkpoint(tmp_path / "class.ckpt")
    torch.save({**checkpoint, "more": Poison()}, tmp_path / "poison.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        SFT.load_from_checkpoint(tmp_path / "poison.ckpt", weights_only=False)


def test_a_trainer_without_a_callback_of_ours_reads_checkpoints_as_data_too(tmp_path, saved, base):
    torch.save({**read_checkpoint(saved), "more": Poison()}, tmp_path / "poison.ckpt")
    module = module_of(SFT, Backbone(base, tuning="lora", lora=Lora(rank=2)))
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", inference_mode=False)
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        trainer.predict(module, toy_stream(), ckpt_path=tmp_path / "poison.ckpt", weights_only=False)


@pytest.mark.parametrize(
    ("spoil", "options", "error", "said"),
    [
        (lambda c: c["state_dict"].popitem(), {}, ValueError, "the checkpoint lacks model.*; give the options"),
        (lambda c: c.pop(KEY), {}, ValueError, "was not written by cpt_lightning"),
        (lambda c: None, {"backbone": Backbone("tiny")}, ValueError, "the checkpoint belongs to backbone.tuning=lora"),
        (lambda c: None, {"strict": False}, TypeError, "strict"),
        (lambda c: None, {"hparams_file": "hparams.yaml"}, TypeError, "hparams_file"),
    ],
    ids=["weights are missing", "foreign", "another backbone", "strict", "hparams_file"],
)
def test_what_does_not_fit_is_not_loaded(tmp_path, saved, spoil, options, error, said):
    checkpoint = read_checkpoint(saved)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "spoilt.ckpt")
    with pytest.raises(error, match=said):
        SFT.load_from_checkpoint(tmp_path / "spoilt.ckpt", **options)


def test_an_option_in_the_place_of_a_device_is_refused():
    with pytest.raises(TypeError, match="map_location=0.5 is no device; options of SFT are given by keyword"):
        SFT.load_from_checkpoint("there/is/no/such.ckpt", 0.5)


def test_a_module_that_is_there_already_is_not_loaded_into(saved):
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        SFT().load_from_checkpoint(saved)


# -- what works as usual -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory) -> dict:
    """Runs with nothing of Lightning's beside them: weights and matrix."""
    ends = {}
    for kind in (SFT, RFT):
        module = module_of(kind, Backbone(base))
        matrix = matrix_of(run(tmp_path_factory.mktemp("plain"), module))
        ends[kind] = module.state_dict(), matrix
    return ends


class Keep(of_lightning.Checkpoint):
    """A checkpoint callback of a user's own."""

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(Path(trainer.log_dir) / "own" / f"{trainer.current_epoch}.ckpt")


WATCHERS = {
    "own checkpoint": Keep,
    "best checkpoint": lambda: of_lightning.ModelCheckpoint(monitor="val/bars2/accuracy", mode="max"),
    "learning rate": lambda: of_lightning.LearningRateMonitor("step"),
    "summary": lambda: of_lightning.ModelSummary(2),
    "rich summary": lambda: of_lightning.RichModelSummary(2),
    "device": lambda: of_lightning.DeviceStatsMonitor(),
    "throughput": lambda: of_lightning.ThroughputMonitor(batch_size_fn=len, window_size=2),
    "timer": lambda: of_lightning.Timer(),
    "lambda": lambda: of_lightning.LambdaCallback(on_train_batch_end=lambda *_: None),
    "spikes": lambda: of_lightning.SpikeDetection(),
}


@pytest.mark.parametrize("kind", [SFT, RFT])
@pytest.mark.parametrize("name", WATCHERS)
def test_a_callback_that_watches_leaves_the_run_what_it_is(tmp_path, base, plain, kind, name):
    module = module_of(kind, Backbone(base))
    trainer = run(tmp_path, module, more=[WATCHERS[name]()], logger=CSVLogger(tmp_path, name="", version=""))
    assert_same_end(plain[kind], module, trainer)


@pytest.mark.parametrize("kind", [SFT, RFT])
@pytest.mark.parametrize(
    "options",
    [
        {"num_sanity_val_steps": 2},
        {"val_check_interval": 0.5, "limit_train_batches": 2},
        {"min_steps": 100, "min_epochs": 1, "log_every_n_steps": 50, "limit_val_batches": 1.0},
        {"inference_mode": True, "benchmark": True, "sync_batchnorm": True, "use_distributed_sampler": True},
        {"deterministic": True, "detect_anomaly": True, "profiler": "simple"},
        {"profiler": "advanced"},
    ],
    ids=lambda options: " ".join(options),
)
def test_an_option_that_changes_no_step_leaves_the_run_what_it_is(tmp_path, base, plain, kind, options):
    module = module_of(kind, Backbone(base))
    assert_same_end(plain[kind], module, run(tmp_path, module, **options))


def assert_same_end(end, module, trainer) -> None:
    state, matrix = end
    assert all(torch.equal(weight, state[name]) for name, weight in module.state_dict().items())
    assert matrix_of(trainer) == matrix


@pytest.mark.parametrize("bar", [of_lightning.RichProgressBar, of_lightning.TQDMProgressBar])
def test_lightnings_progress_bars_show_the_loss(tmp_path, base, bar, capsys):
    run(tmp_path, module_of(SFT, Backbone(base)), more=[bar()], enable_progress_bar=True)
    shown = capsys.readouterr()
    assert "train/loss" in shown.out + shown.err


def test_monitors_log_what_is_true_of_the_run(tmp_path, base):
    """Linear decay over two steps of .01, anew in the second task; operations as the module itself counts them."""
    module = module_of(RFT, Backbone(base), lr_scheduler=lambda optimizer: TaskSchedule(optimizer, decay="linear"))
    loggers = [CSVLogger(tmp_path, name="", version=""), TensorBoardLogger(tmp_path, name="", version="")]
    monitors = [of_lightning.LearningRateMonitor("step"), of_lightning.ThroughputMonitor(len, window_size=2)]
    counted = []
    keep = of_lightning.LambdaCallback(on_train_batch_end=lambda _, module, *__: counted.append(module.flops_per_batch))
    run(tmp_path, module, more=[*monitors, keep], logger=loggers)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in shown.Scalars("lr-AdamW")] == pytest.approx([0.01, 0.005] * 2)
    assert len(counted) == 4 and min(counted) > 0
    assert all(event.value > 0 for event in shown.Scalars("train/device/flops_per_sec"))
    assert "train/device/samples_per_sec" in (tmp_path / "metrics.csv").read_text()


@pytest.mark.parametrize("monitor", ["val/a/accuracy", "continual/average_accuracy"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_checkpoint_of_lightnings_keeps_the_best_stage_by_any_score_beside_ours(tmp_path, monitor, mode):
    best = of_lightning.ModelCheckpoint(monitor=monitor, mode=mode)
    module, stream = LinearModule(), number_stream()
    trainer = make_trainer(tmp_path, stream, callbacks=[best])
    trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    rows = [row["scores"] for row in matrix_of(trainer)["rows"][1:]]
    seen = [["a", "b", "c"][: stage + 1] if monitor.startswith("continual") else ["a"] for stage in range(3)]
    scores = [sum(row[name]["accuracy"] for name in names) / len(names) for row, names in zip(rows, seen, strict=True)]
    score = max(scores) if mode == "max" else min(scores)
    assert best.best_model_score.item() == pytest.approx(score)
    assert f"epoch={scores.index(pytest.approx(score))}-" in best.best_model_path
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["1_a.ckpt", "2_b.ckpt", "3_c.ckpt", "last.ckpt"]


@pytest.mark.filterwarnings(
    "ignore:Using ModelCheckpoint with manual optimization and every_n_train_steps",
    "ignore:Be aware that when using `ckpt_path`",  # it is left out below
)
@pytest.mark.parametrize("kind", [SFT, RFT])
def test_a_checkpoint_of_lightnings_within_a_task_is_gone_on_from(tmp_path, base, plain, kind):
    """After the third of four steps; after the fourth, before the evaluation, it would leave that out."""
    keep = of_lightning.ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, save_last=True)
    run(tmp_path, module_of(kind, Backbone(base)), more=[keep])
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {*(f"epoch={step // 2}-step={step + 1}.ckpt" for step in range(4)), "last.ckpt"}
    module, stream = module_of(kind, Backbone(base)), toy_stream()
    trainer = trainer_of(tmp_path, stream)
    trainer.fit(module, stream, ckpt_path=tmp_path / "checkpoints" / "epoch=1-step=3.ckpt")
    assert_same_end(plain[kind], module, trainer)
    with pytest.raises(ValueError, match="written between the last batch of stage 1 and its evaluation"):
        trainer_of(tmp_path, stream).fit(module, stream, ckpt_path=tmp_path / "checkpoints" / "epoch=0-step=2.ckpt")


def test_accumulation_may_change_from_task_to_task_under_sft(tmp_path, base):
    trainer = run(tmp_path, module_of(SFT, Backbone(base)), more=[of_lightning.GradientAccumulationScheduler({1: 2})])
    assert trainer.global_step == 2 + 1


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_predictions_are_written_by_lightnings_callback(tmp_path, base):
    class Writer(of_lightning.BasePredictionWriter):
        def __init__(self):
            super().__init__("batch_and_epoch")
            self.batches, self.whole = [], []

        def write_on_batch_end(self, trainer, module, prediction, *_):
            self.batches.append(prediction)

        def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
            self.whole = predictions

    writer, stream = Writer(), toy_stream()
    predictions = trainer_of(tmp_path, stream, [writer]).predict(module_of(SFT, Backbone(base)), stream)
    assert writer.batches == writer.whole == predictions and len(predictions) == 3


@pytest.mark.parametrize("kind", [SFT, RFT])
def test_with_lightnings_own_checkpoint_a_run_goes_on(tmp_path, base, plain, kind):
    """No TaskCheckpoint: the Trainer's default one, of the first task."""
    first = run(
        tmp_path, module_of(kind, Backbone(base)), callbacks=[ContinualLearning(print_table=False)], max_epochs=1
    )
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert first.checkpoint_callback.best_model_path == str(path)
    module, stream = module_of(kind, Backbone(base)), toy_stream()
    trainer = trainer_of(tmp_path, stream, callbacks=[ContinualLearning(print_table=False)])
    trainer.fit(module, stream, ckpt_path=path)
    assert_same_end(plain[kind], module, trainer)


def test_the_last_checkpoint_is_found_by_its_word(tmp_path):
    """In a new process, whose callback has not been set up."""
    ends = []
    for folder, parts in ((tmp_path / "whole", [3]), (tmp_path / "parts", [2, 3])):
        for number, max_epochs in enumerate(parts):
            module, stream = LinearModule(), number_stream()
            trainer = make_trainer(folder, stream, max_epochs=max_epochs)
            if number == 0:
                trainer.validate(module, stream, verbose=False)
            trainer.fit(module, stream, ckpt_path="last" if number else None)
        ends.append((module.state_dict(), matrix_of(trainer)))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])


def test_a_joint_stage_may_be_stopped_early_and_has_its_row(tmp_path):
    stop = of_lightning.EarlyStopping("val/a/accuracy", stopping_threshold=-1.0, mode="max")
    module, stream = LinearModule(), number_stream(stages=[["a", "b", "c"]], steps=8)
    trainer = make_trainer(tmp_path, stream, callbacks=[stop], val_check_interval=0.25)
    trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    assert trainer.global_step == 2
    assert [row["after"] for row in matrix_of(trainer)["rows"]] == [None, "a+b+c"]


def test_a_stream_that_a_callback_stopped_says_what_is_left(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    module, stream = LinearModule(), number_stream()
    trainer = make_trainer(tmp_path, stream, callbacks=[Stop()])
    trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    assert "a callback stopped the run, 2 stage(s) before its end; go on with --ckpt_path" in caplog.text


def test_a_try_says_what_it_does_not_try(tmp_path, base, caplog):
    caplog.set_level(logging.INFO)
    stream = toy_stream()
    trainer_of(tmp_path, stream, fast_dev_run=True).fit(module_of(SFT, Backbone(base)), stream)
    assert "fast_dev_run tries the first stage, bars2; 1 more are not tried" in caplog.text


# -- what is refused ---------------------------------------------------------------------------------------------------


class Failing(L.Callback):
    """Fails in the middle of the second task's first batch, and saves."""

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(Path(trainer.log_dir) / "failed.ckpt")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.current_epoch == 1:
            raise RuntimeError("failed")


@pytest.mark.parametrize("kind", [SFT, RFT])
def test_what_is_saved_in_the_middle_of_a_batch_is_evaluated_but_not_gone_on_from(tmp_path, base, kind):
    with pytest.raises(RuntimeError, match="failed"):
        run(tmp_path, module_of(kind, Backbone(base)), more=[Failing()])
    module, stream = module_of(kind, Backbone(base)), toy_stream()
    with pytest.raises(ValueError, match="failed.ckpt was saved in the middle of a batch.*beside it there are last"):
        trainer_of(tmp_path, stream).fit(module, stream, ckpt_path=tmp_path / "failed.ckpt")
    trainer_of(tmp_path, stream).test(module, stream, ckpt_path=tmp_path / "failed.ckpt", verbose=False)


def test_two_writers_of_one_last_checkpoint_are_refused(tmp_path, base):
    rival = of_lightning.ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(ValueError, match="ModelCheckpoint: save_last writes the last.ckpt of TaskCheckpoint too"):
        run(tmp_path, module_of(SFT, Backbone("there/is/no/such")), more=[rival])


REFUSED = [
    (lambda: of_lightning.EarlyStopping("val/bars2/accuracy"), "EarlyStopping would end the stream, .*data.steps"),
    (lambda: of_lightning.StochasticWeightAveraging(1e-3), "StochasticWeightAveraging averages over.*ModelMerging"),
    (lambda: of_lightning.EMAWeightAveraging(), "EMAWeightAveraging has other weights evaluated.*ModelMerging"),
    (lambda: of_lightning.BatchSizeFinder(batch_arg_name="prompts_per_step"), "BatchSizeFinder would.*cpt rehearse"),
    (lambda: of_lightning.LearningRateFinder(update_attr=False), "LearningRateFinder would run.*cpt study"),
    (lambda: of_lightning.Timer("00:01:00:00"), "max_time would end the run in the middle of a task.*data.steps"),
    (
        lambda: of_lightning.OnExceptionCheckpoint("nowhere"),
        "OnExceptionCheckpoint saves in the middle.*TaskCheckpoint",
    ),
    (lambda: of_lightning.ModelPruning("l1_unstructured", amount=0.5), "ModelPruning changes which.*backbone.tuning"),
    (
        lambda: of_lightning.ModelCheckpoint(monitor="val/bar2/accuracy"),
        r"ModelCheckpoint\(monitor='val/bar2/accuracy'\) names 'bar2', .* did you mean 'bars2'",
    ),
    (lambda: of_lightning.BackboneFinetuning(), "BackboneFinetuning changes which.*backbone.freeze"),
]


@pytest.mark.filterwarnings("ignore:.*no last checkpoint available", "ignore:`.fit.ckpt_path=None.` was called without")
@pytest.mark.parametrize(("callback", "said"), REFUSED, ids=[said.split()[0] for _, said in REFUSED])
def test_a_callback_that_would_spoil_a_stream_is_refused_before_weights_are_loaded(
    tmp_path, monkeypatch, callback, said
):
    monkeypatch.chdir(tmp_path)
    module, stream = module_of(SFT, Backbone("there/is/no/such")), toy_stream()
    with pytest.raises(ValueError, match=said):
        trainer_of(tmp_path, stream, [callback()]).fit(module, stream)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": 3}, "trainer.max_steps or max_time would end"),
        ({"max_time": "00:01:00:00"}, "trainer.max_steps or max_time would end"),
        ({"max_epochs": 3}, "trainer.max_epochs=3: the stream has 2 stages"),
        ({"max_epochs": -1}, "trainer.max_epochs=-1: the stream has 2 stages"),
        ({"reload_dataloaders_every_n_epochs": 0}, "trainer.reload_dataloaders_every_n_epochs must be 1"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches=0 learns nothing"),
        ({"overfit_batches": 1}, "trainer.overfit_batches=1 would learn and evaluate other rows.*num_train"),
        ({"limit_train_batches": 1, "val_check_interval": 2}, "val_check_interval=2: bars2 has 1 batches"),
        ({"gradient_clip_algorithm": "value"}, "trainer.gradient_clip_algorithm: .*max_grad_norm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", [SFT, RFT])
def test_an_option_that_would_spoil_a_stream_is_refused_before_weights_are_loaded(tmp_path, kind, options, said):
    module, stream = module_of(kind, Backbone("there/is/no/such")), toy_stream()
    with pytest.raises(ValueError, match=said):
        trainer_of(tmp_path, stream, **options).fit(module, stream)


def test_a_trainer_that_logs_nothing_cannot_keep_a_record(tmp_path, base):
    stream = toy_stream()
    trainer = L.Trainer(accelerator="cpu", barebones=True, callbacks=[ContinualLearning()], max_epochs=2,
                        reload_dataloaders_every_n_epochs=1, default_root_dir=tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="trainer.barebones=True: the validation after a task"):
        trainer.fit(module_of(SFT, Backbone("there/is/no/such")), stream)


def test_accumulation_over_batches_is_no_matter_of_rollouts(tmp_path):
    module, stream = module_of(RFT, Backbone("there/is/no/such")), toy_stream()
    with pytest.raises(ValueError, match="GradientAccumulationScheduler is for SFT: .*micro_batch_prompts"):
        trainer_of(tmp_path, stream, [of_lightning.GradientAccumulationScheduler({1: 2})]).fit(module, stream)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lr_find", {"update_attr": False}, "LearningRateFinder would run through the first stages"),
        ("scale_batch_size", {"batch_arg_name": "prompts_per_step"}, "BatchSizeFinder would run through"),
    ],
)
def test_the_tuner_is_refused(tmp_path, method, options, said):
    module, stream = module_of(SFT, Backbone("there/is/no/such")), toy_stream()
    with pytest.raises(ValueError, match=said):
        getattr(Tuner(trainer_of(tmp_path, stream)), method)(module, datamodule=stream, **options)


# -- from the command line ---------------------------------------------------------------------------------------------

CONFIG = """
run_dir: {folder}/run
model:
  class_path: SFT
  init_args: {{backbone: {{path: {base}}}, evaluation: {{max_new_tokens: 4, temperature: 0.0}}}}
data:
  tasks:
    bars2: {{source: {{class_path: cpt_lightning.tasks.ToyWorld, init_args: {{family: bars2}}}}, num_test: 2}}
    digit2: {{source: {{class_path: cpt_lightning.tasks.ToyWorld, init_args: {{family: digit2}}}}, num_test: 2}}
  prompts_per_step: 2
  steps: 1
trainer: {{accelerator: cpu, enable_progress_bar: false}}
"""


@pytest.fixture
def config(tmp_path, base) -> str:
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path, base=base))
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/bars2/accuracy"], 1, "EarlyStopping"),
        (["--trainer.callbacks+=EMAWeightAveraging"], 1, "EMAWeightAveraging has other weights evaluated"),
        (["--trainer.callbacks+=BackboneFinetuning"], 1, "BackboneFinetuning changes which weights"),
        (["--trainer.max_time=00:00:01:00"], 1, "trainer.max_steps or max_time would end"),
        (["--trainer.val_check_interval=2"], 1, "trainer.val_check_interval=2: bars2 has 1 batches"),
        (["--trainer.enable_checkpointing=false"], 2, "`enable_checkpointing=False` but found `ModelCheckpoint`"),
        (["--trainer.barebones=true"], 2, "barebones=True"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_line_says_it_in_a_line_before_the_base_is_evaluated(config, tmp_path, options, code, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", config, *options])
    written = capsys.readouterr().err
    assert stop.value.code == code and said in written.split("cpt fit: error: ")[1].splitlines()[0]
    assert "million parameters" not in written and not (tmp_path / "run").exists()


def test_callbacks_of_lightning_are_named_on_the_command_line(config, tmp_path):
    best = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=continual/average_accuracy"]
    others = [f"--trainer.callbacks+={name}" for name in ("LearningRateMonitor", "RichModelSummary")]
    main(["fit", "-c", config, *best, *others])
    assert len(list((tmp_path / "run" / "checkpoints").glob("epoch=0-*.ckpt"))) == 1
    loaded = SFT.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
    assert "model" in loaded._modules
