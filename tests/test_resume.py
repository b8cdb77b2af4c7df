"""A run that was killed anywhere and resumed ends like one that was not: same data, weights, matrix and samples."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cpt_lightning.callbacks import TaskCheckpoint
from cpt_lightning.cli import main
from cpt_lightning.records import RunFolder
from tests.fakes import KillAt, Killed, LinearModule, make_trainer, number_stream

ROOT = Path(__file__).parents[1]


def run(folder, *, resume=False, kill=(), manual=False, num_workers=0, checkpoint="last.ckpt", **options):
    """A run, or the rest of one, in ``folder``; returns the module."""
    module, stream = LinearModule(manual=manual), number_stream(num_workers=num_workers)
    trainer = make_trainer(folder, stream, callbacks=kill, **options)
    if not resume:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=str(folder / checkpoint) if resume else None)
    return module


def results(folder) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in ("accuracy_matrix.json", "samples.jsonl")}


def assert_same_end(folder, module, other_folder, other):
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert results(folder) == results(other_folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs without interruption, by the kind of optimisation: folder and module."""
    folders = {manual: tmp_path_factory.mktemp("whole") for manual in (False, True)}
    return {manual: (folder, run(folder, manual=manual)) for manual, folder in folders.items()}


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    "kill",
    [
        KillAt(0, batch=1),
        KillAt(1, batch=0),
        KillAt(1, batch=2),
        KillAt(2, batch=0),
        KillAt(1, "on_validation_batch_start", batch=3),
        KillAt(1, "on_train_epoch_end"),
        KillAt(2, "on_train_epoch_end"),
    ],
    ids=lambda kill: f"stage {kill.stage} {kill.hook} {kill.batch}",
)
def test_a_killed_run_resumed_from_its_last_checkpoint_ends_like_a_whole_one(tmp_path, uninterrupted, kill, manual):
    """``last.ckpt`` is renewed after every batch here; after a kill in a validation a last batch is learned again."""
    with pytest.raises(Killed):
        run(tmp_path, kill=[kill], manual=manual)
    module = run(tmp_path, resume=True, manual=manual)
    whole_folder, whole = uninterrupted[manual]
    assert_same_end(tmp_path, module, whole_folder, whole)
    if kill.hook == "on_train_batch_start":  # then no batch is learned twice
        seen = 3 * kill.stage + kill.batch
        assert module.seen == whole.seen[seen:]
        assert module.rates == whole.rates[seen:]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_no_checkpoint_holds_half_of_an_accumulated_update(tmp_path, batch):
    """Five batches a stage, updates after two, four and the last: saved between updates, resumed to the same end."""
    options = {"accumulate_grad_batches": 2, "max_epochs": 2}

    def run_five(folder, kill=(), checkpoint=None):
        module, stream = LinearModule(), number_stream(steps=5)
        trainer = make_trainer(folder, stream, callbacks=kill, **options)
        if checkpoint is None:
            trainer.validate(module, stream, verbose=False)
        trainer.fit(module, stream, ckpt_path=checkpoint)
        return module

    whole = run_five(tmp_path / "whole")
    with pytest.raises(Killed):
        run_five(tmp_path / "killed", [KillAt(1, batch=batch)])
    module = run_five(tmp_path / "killed", checkpoint=str(tmp_path / "killed" / "last.ckpt"))
    assert module.seen == whole.seen[5 + batch // 2 * 2 :]
    assert_same_end(tmp_path / "killed", module, tmp_path / "whole", whole)


@pytest.mark.parametrize("num_workers, num_workers_later", [(2, 2), (2, 0), (0, 2)])
def test_a_run_goes_on_with_any_number_of_workers(tmp_path, uninterrupted, num_workers, num_workers_later):
    with pytest.raises(Killed):
        run(tmp_path, kill=[KillAt(1, batch=2)], num_workers=num_workers)
    module = run(tmp_path, resume=True, num_workers=num_workers_later)
    assert module.seen == uninterrupted[False][1].seen[5:]
    assert_same_end(tmp_path, module, *uninterrupted[False])


@pytest.mark.parametrize("stage, name", [(1, "1_a.ckpt"), (2, "2_b.ckpt"), (3, "3_c.ckpt")])
def test_a_finished_run_goes_back_to_the_end_of_any_task(tmp_path, uninterrupted, stage, name):
    """Later tasks are learned again to the same end; resuming a run that has ended changes nothing."""
    run(tmp_path)
    module = run(tmp_path, resume=True, checkpoint=name)
    assert module.seen == uninterrupted[False][1].seen[3 * stage :]
    assert_same_end(tmp_path, module, *uninterrupted[False])


def test_a_run_may_stop_after_some_stages_and_go_on_later(tmp_path, uninterrupted):
    run(tmp_path, max_epochs=2)
    assert len(json.loads((tmp_path / "accuracy_matrix.json").read_text())["rows"]) == 3
    module = run(tmp_path, resume=True)
    assert_same_end(tmp_path, module, *uninterrupted[False])


def test_a_branch_in_another_folder_has_the_whole_record(tmp_path, uninterrupted):
    whole_folder, whole = uninterrupted[False]
    module, stream = LinearModule(), number_stream()
    make_trainer(tmp_path, stream).fit(module, stream, ckpt_path=str(whole_folder / "1_a.ckpt"))
    assert_same_end(tmp_path, module, whole_folder, whole)


def test_another_stream_does_not_go_on_with_this_record(tmp_path, uninterrupted):
    folder, _ = uninterrupted[False]
    stream = number_stream(stages=["a", "c", "b"])
    with pytest.raises(ValueError, match="its stages are .*'a'.*'b'.*'c'.*now they are .*'a'.*'c'.*'b'"):
        make_trainer(tmp_path, stream).fit(LinearModule(), stream, ckpt_path=str(folder / "1_a.ckpt"))


def test_other_batches_do_not_go_on_in_the_middle_of_a_task(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill=[KillAt(1, batch=2)])
    stream = number_stream(prompts_per_step=5)
    with pytest.raises(ValueError, match="middle of a stage with prompts_per_step=4, now it is 5"):
        make_trainer(tmp_path, stream).fit(LinearModule(), stream, ckpt_path=str(tmp_path / "last.ckpt"))


def test_other_batches_may_go_on_after_a_task(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill=[KillAt(1)])
    module, stream = LinearModule(), number_stream(prompts_per_step=5)
    make_trainer(tmp_path, stream).fit(module, stream, ckpt_path=str(tmp_path / "last.ckpt"))
    assert [len(batch) for batch in module.seen] == [5] * 4  # 10 rows of b, 10 of c


def test_a_checkpoint_between_last_batch_and_evaluation_goes_on_complete_or_not_at_all(tmp_path, uninterrupted):
    """Such a file comes from a user's own ModelCheckpoint; ours skip that moment."""

    class AfterLastBatch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == 1 and trainer.is_last_batch:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    run(tmp_path, kill=[AfterLastBatch()])
    with pytest.raises((ValueError, RuntimeError), match="row is missing|without validation"):
        run(tmp_path, resume=True, checkpoint="early.ckpt")


def test_without_task_checkpoints_the_last_one_still_resumes(tmp_path, uninterrupted):
    module, stream = LinearModule(), number_stream()
    trainer = make_trainer(tmp_path, stream, callbacks=[KillAt(2)], checkpoint=TaskCheckpoint(keep_tasks=False))
    trainer.validate(module, stream, verbose=False)
    with pytest.raises(Killed):
        trainer.fit(module, stream)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    assert_same_end(tmp_path, run(tmp_path, resume=True), *uninterrupted[False])


# -- the real modules, by the command that a person types ------------------------------------------------------------

STREAM = """
tasks:
  word2: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: word2}}, num_test: 4}
  digit2: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: digit2}}, num_test: 4}
probes:
  facts: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: facts}}, num_test: 4}
prompts_per_step: 3
steps: 3
"""

OPTIONS = [
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false",
    "--model.lr_scheduler=cpt_lightning.modules.TaskSchedule", "--model.lr_scheduler.init_args.warmup=2",
    "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.evaluation.max_new_tokens=12",
    "--checkpoint.every_n_steps=1", "--trainer.accelerator=cpu",
]  # fmt: skip
MODELS = {
    "sft": ["--model=SFT"],
    "lora with dropout": ["--model=SFT", "--model.backbone.tuning=lora", "--model.backbone.lora.dropout=0.3"],
    "lwf": ["--model=SFT", "--model.kl_coef=0.5"],
    "renewed adapters": ["--model=SFT", "--model.backbone.tuning=lora", "--model.backbone.lora.along_stream=renewed"],
    "grpo": [
        "--model=RFT", "--model.group_size=4", "--model.kl_coef=0.05", "--model.updates_per_rollout=2",
        "--model.sampling.max_new_tokens=12",
    ],
    "on-policy sft": ["--model=OnPolicySFT", "--model.group_size=4", "--model.sampling.max_new_tokens=16"],
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def command_and_whole(request, tmp_path_factory) -> tuple[list[str], Path]:
    """The command of an objective, and the folder of its run without interruption."""
    folder = tmp_path_factory.mktemp("objective")
    (folder / "stream.yaml").write_text(STREAM)
    command = ["fit", f"--data={folder / 'stream.yaml'}", *MODELS[request.param], *OPTIONS]
    main([*command, f"--run_dir={folder / 'whole'}"])
    return command, folder / "whole"


@pytest.mark.parametrize("stage, batch", [(1, 0), (1, 2)], ids=["after a task", "within a task"])
def test_cpt_fit_resumes_bit_for_bit(tmp_path, command_and_whole, stage, batch):
    """Uninterrupted, and killed and resumed: the same weights, matrix and samples, on the embedded base."""
    (command, whole), killed = command_and_whole, tmp_path / "killed"
    kill = ["--trainer.callbacks+=tests.fakes.KillAt", f"--trainer.callbacks.stage={stage}"]
    with pytest.raises(Killed):
        main([*command, f"--run_dir={killed}", *kill, f"--trainer.callbacks.batch={batch}"])
    main([*command, f"--ckpt_path={killed / 'last.ckpt'}"])
    assert results(killed) == results(whole)
    ends = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, killed)]
    start = torch.load(whole / "1_word2.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(ends[0][name], start[name]) for name in start)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: all but times and rates, by tag, as steps with values."""
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("time/", "perf/"))]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    """The steps between the last checkpoint and the kill are logged twice, and shown once."""
    (tmp_path / "stream.yaml").write_text(STREAM)
    options = [option for option in OPTIONS if "logger" not in option]
    command = ["fit", f"--data={tmp_path / 'stream.yaml'}", *MODELS["sft"], *options, "--trainer.log_every_n_steps=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main([*command, f"--run_dir={whole}"])
    kill = ["--trainer.callbacks+=tests.fakes.KillAt", "--trainer.callbacks.stage=1"]
    with pytest.raises(Killed):
        main([*command, f"--run_dir={killed}", *kill, "--trainer.callbacks.hook=on_validation_batch_start"])
    main([*command, f"--ckpt_path={killed / 'last.ckpt'}"])
    assert len(list(killed.glob("*tfevents*"))) == len(list(whole.glob("*tfevents*"))) + 1
    assert scalars(killed) == scalars(whole)


def test_a_run_that_goes_on_with_other_options_says_so_and_keeps_those_it_had(tmp_path, caplog):
    """Not if they are the same, and not where nothing is left to learn."""
    (tmp_path / "stream.yaml").write_text(STREAM)
    command = ["fit", f"--data={tmp_path / 'stream.yaml'}", *MODELS["sft"], *OPTIONS]
    run, other = tmp_path / "run", "--model.optimizer.lr=2e-3"
    caplog.set_level("INFO")
    main([*command, f"--run_dir={run}", "--trainer.max_epochs=1"])
    main([*command, f"--ckpt_path={run / 'last.ckpt'}", other, "--trainer.max_epochs=2"])
    assert "model.init_args.optimizer.init_args.lr 0.001 -> 0.002." in caplog.text
    folder = RunFolder(run)
    assert folder.changed_at == [3]
    assert folder.config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.002
    before = yaml.safe_load((run / "config_until_step_3.yaml").read_text())
    assert before["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.001
    main([*command, f"--ckpt_path={run / 'last.ckpt'}", "--trainer.max_epochs=2"])
    assert RunFolder(run).changed_at == [3]
    assert RunFolder(run).config == folder.config


def test_a_run_killed_before_its_first_checkpoint_begins_again_in_its_folder(tmp_path):
    """`--ckpt_path last` in the script of a job: the same command whether there is a checkpoint yet or not."""
    (tmp_path / "stream.yaml").write_text(STREAM)
    command = ["fit", f"--data={tmp_path / 'stream.yaml'}", *MODELS["sft"], *OPTIONS, "--ckpt_path=last"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with pytest.raises(Killed):
        main(
            [*command, f"--run_dir={killed}", "--trainer.callbacks+=tests.fakes.KillAt", "--trainer.callbacks.stage=0"]
        )
    assert not (killed / "last.ckpt").exists()
    main([*command, f"--run_dir={killed}"])
    main([*command, f"--run_dir={whole}"])
    assert results(killed) == results(whole)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["killed", "whole"]


def test_a_checkpoint_of_another_stream_is_refused_even_if_nothing_is_left_to_learn(tmp_path, uninterrupted):
    folder, _ = uninterrupted[False]
    module, stream = LinearModule(), number_stream(stages=["a"])
    with pytest.raises(ValueError, match="the checkpoint belongs to another stream: its stages are"):
        make_trainer(tmp_path, stream).fit(module, stream, ckpt_path=str(folder / "last.ckpt"))
