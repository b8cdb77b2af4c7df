"""The command line, called as a person calls it."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from cpt_lightning import __version__, models
from cpt_lightning.cli import main
from cpt_lightning.cli.errors import complaint
from cpt_lightning.cli.lightning_cli import CPTCLI
from cpt_lightning.cli.run_directory import LOCK, Claim, run_directory
from cpt_lightning.models import Backbone
from cpt_lightning.records.environment import read_starts
from cpt_lightning.records.logged import Logged
from cpt_lightning.tasks.splits import check_fractions
from tests.callbacks.display.test_loggers import FakeMLFlow
from tests.fakes import KillAt, Killed

STREAM = """
tasks:
  word2: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: word2}}, num_test: 3}
  digit2: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: digit2}}, num_test: 3}
probes:
  facts: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: facts}}, num_test: 2}
prompts_per_step: 3
steps: 2
"""
CONFIG = """
# cpt fit -c config.yaml
run_dir: {folder}/run
model: {{class_path: cpt_lightning.modules.SFT, init_args: {{evaluation: {{max_new_tokens: 8, temperature: 0.0}}}}}}
data: parts/stream.yaml
trainer: {{accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}}
"""


@pytest.fixture
def config(tmp_path) -> str:
    """A config that names its stream by a path relative to itself."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "stream.yaml").write_text(STREAM)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return str(tmp_path / "config.yaml")


def printed_config(args, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    output = capsys.readouterr()
    assert stop.value.code in (0, None), output.err
    return output.out


def refusal(args, capsys, code: int = 2) -> str:
    """What is said to arguments that cannot be parsed, or, with code 1, to what a run then finds."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == code
    return capsys.readouterr().err


def read_json(path: Path):
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_classes_of_the_working_directory_are_found_by_the_script_too(tmp_path, config, capsys, monkeypatch):
    """`cpt` begins in the folder of scripts, where Python looks for modules in the place of the working directory."""
    (tmp_path / "my_rewards_here.py").write_text("def brevity(completion, gold):\n    return 1.0\n")
    part = ["--data.tasks.word2.reward.extra", "{brevity: {function: my_rewards_here.brevity, weight: 0.1}}"]
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert "my_rewards_here.brevity" in printed_config(["fit", "-c", config, *part], capsys)
    assert sys.path == before


def test_fit_leaves_everything_in_its_folder_and_test_and_predict_add_to_it(tmp_path, config, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path.parent)  # nothing depends on where one stands
    folder = tmp_path / "run"
    main(["fit", "-c", config])
    checkpoints = {"1_word2.ckpt", "2_digit2.ckpt", "last.ckpt"}
    files = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    records = {"config.yaml", "hparams.yaml", "environment.json", "accuracy_matrix.json", "samples.jsonl"}
    assert files == records | checkpoints
    matrix = read_json(folder / "accuracy_matrix.json")
    assert [row["after"] for row in matrix["rows"]] == [None, "word2", "digit2"]
    assert len(lines(folder / "samples.jsonl")) == 3 * 8
    assert "digit2" in capsys.readouterr().out  # the table

    scalars = {tag for path in folder.glob("*tfevents*") for tag in scalars_of(path)}
    assert {"train/loss", "val/word2/accuracy", "val/facts/accuracy", "continual/average_accuracy"} <= scalars
    assert {"continual/forgetting_measure", "continual/probe/facts", "train/grad_norm"} <= scalars
    shown = EventAccumulator(str(folder)).Reload()
    panels = {f"completions/{name}": [0, 1, 3] for name in ("word2", "digit2", "facts")}
    pictures = {"stream/accuracy_matrix": [1, 3], "stream/curves": [1, 3], **panels}  # two steps a task
    assert {tag: [image.step for image in shown.Images(tag)] for tag in shown.Tags()["images"]} == pictures
    (config_text,) = shown.Tensors("config/text_summary")
    assert (folder / "config.yaml").read_text().encode() in config_text.tensor_proto.string_val[0]

    saved = (folder / "config.yaml").read_text()
    main(["test", "-c", str(folder / "config.yaml"), "--ckpt_path", str(folder / "last.ckpt")])
    main(["predict", "-c", str(folder / "config.yaml"), "--ckpt_path", str(folder / "last.ckpt")])
    for name in ("test.jsonl", "predictions.jsonl"):
        answers = [(line["row_id"], line["completion"]) for line in lines(folder / name)]
        assert answers == [(s["row_id"], s["completion"]) for s in lines(folder / "samples.jsonl") if s["stage"] == 2]
    assert (folder / "config.yaml").read_text() == saved
    assert not (tmp_path / "run_2").exists()


def scalars_of(path: Path) -> list[str]:
    events = EventAccumulator(str(path))
    events.Reload()
    return events.Tags()["scalars"]


def test_a_second_run_takes_a_folder_of_its_own_and_a_resumed_one_does_not(tmp_path, config):
    short = ["fit", "-c", config, "--data.steps=1", "--trainer.logger=false"]
    main([*short, "--trainer.max_epochs=1"])
    first = (tmp_path / "run" / "accuracy_matrix.json").read_text()
    main([*short, "--seed_everything=1"])
    assert (tmp_path / "run" / "accuracy_matrix.json").read_text() == first
    assert len(read_json(tmp_path / "run_2" / "accuracy_matrix.json")["rows"]) == 3
    assert yaml.safe_load((tmp_path / "run_2" / "config.yaml").read_text())["run_dir"] == str(tmp_path / "run_2")
    main([*short, "--ckpt_path", str(tmp_path / "run" / "last.ckpt")])
    assert len(read_json(tmp_path / "run" / "accuracy_matrix.json")["rows"]) == 3
    assert len(lines(tmp_path / "run" / "samples.jsonl")) == 3 * 8
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["parts", "run", "run_2"]


def test_the_last_checkpoint_by_name_starts_or_goes_on(tmp_path, config):
    command = ["fit", "-c", config, "--data.steps=1", "--ckpt_path=last"]
    main([*command, "--trainer.max_epochs=1"])
    main(command)
    assert len(read_json(tmp_path / "run" / "accuracy_matrix.json")["rows"]) == 3
    assert not (tmp_path / "run_2").exists()

    starts = read_starts(tmp_path / "run" / "environment.json")
    assert [start["resumed_from"] for start in starts] == [None, str(tmp_path / "run" / "last.ckpt")]
    assert starts[0]["command"] == f"cpt fit -c {config} --data.steps=1 --ckpt_path=last --trainer.max_epochs=1"
    assert (starts[1]["seed"], starts[1]["device"]["kind"], starts[1]["world_size"]) == (0, "cpu", 1)
    shown = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    pictures = {tag: [image.step for image in shown.Images(tag)] for tag in shown.Tags()["images"]}
    assert pictures["stream/curves"] == [0, 1] and pictures["completions/facts"] == [0, 0, 1]  # base, first, second
    # What each start ran with stands at the step at which it began.
    assert [text.step for text in shown.Tensors("environment/text_summary")] == [0, 1]
    hparams = shown.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert parse_session_start_info_plugin_data(hparams).hparams["objective"].string_value == "SFT"


def test_a_run_that_was_killed_before_its_first_checkpoint_leaves_nothing_in_tensorboard(tmp_path, config):
    command = ["fit", "-c", config, "--data.steps=1", "--trainer.max_epochs=1", "--ckpt_path=last"]
    main(command)
    for checkpoint in (tmp_path / "run").glob("*.ckpt"):
        checkpoint.unlink()
    main(command)
    shown = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [0]
    assert [image.step for image in shown.Images("stream/curves")] == [0]
    assert len(read_starts(tmp_path / "run" / "environment.json")) == 1


def test_a_checkpoint_of_another_program_is_refused_before_anything_is_loaded(tmp_path, config, capsys):
    import torch

    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": {}}, tmp_path / "other.ckpt")
    message = refusal(["test", "-c", config, "--ckpt_path", str(tmp_path / "other.ckpt")], capsys)
    assert "other.ckpt was not written by cpt_lightning" in message
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory) -> Path:
    """The checkpoint of a run that was killed after two of three batches of its first task."""
    folder = tmp_path_factory.mktemp("broken_off")
    (folder / "parts").mkdir()
    (folder / "parts" / "stream.yaml").write_text(STREAM.replace("steps: 2", "steps: 3"))
    every_row = "filter: {mode: solvable, lowest: 0, completions_per_row: 2}\n"
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder) + every_row)

    evaluate = CPTCLI.before_fit

    def and_then(cli):
        evaluate(cli)
        cli.trainer.callbacks.append(KillAt(0, batch=2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPTCLI, "before_fit", and_then)
        with pytest.raises(Killed):
            main(["fit", "-c", str(folder / "config.yaml"), "--trainer.logger=false"])
    return folder / "run" / "last.ckpt"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model.backbone.tuning=lora"], "belongs to backbone.tuning=full, now it is lora; restore it, or begin a n"),
        (["--model.kl_coef=0.1"], "was written with kl_coef=0, now it is 0.1: it does not hold the reference"),
        (["--trainer.callbacks=EWC"], "EWC: .*last.ckpt was written without this callback"),
        (["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1"], "the middle of a task by another optimizer"),
        (["--model.evaluation.max_new_tokens=9"], "evaluation.max_new_tokens is 9, in the checkpoint it is"),
        (["--filter.lowest=1"], "stands within stage 'word2', .* filter.lowest=0, now it is 1; restore it"),
        (["--seed_everything=3"], "in the middle of a stage with seed_everything=0, now it is 3; restore it"),
        (["--data.steps=2"], "after 2 of the 3 batches of a stage, which now has no more than 2"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_weights_are_loaded(
    broken_off, options, message, monkeypatch, capsys
):
    monkeypatch.setattr(Backbone, "load_model", None)
    config = str(broken_off.parents[1] / "config.yaml")
    said = refusal(["fit", "-c", config, "--trainer.logger=false", f"--ckpt_path={broken_off}", *options], capsys, 1)
    assert re.search(message, said)
    assert "go on with" not in said


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (SIGTERMException, 143)])
def test_what_a_signal_ended_does_not_end_like_a_success(config, monkeypatch, raised, code, capsys):
    def end(*_, **__):
        raise raised

    monkeypatch.setattr(CPTCLI, "before_validate", end, raising=False)
    assert "Traceback" not in refusal(["validate", "-c", config, "--trainer.logger=false"], capsys, code)


def test_a_rank_that_lost_another_says_so_in_place_of_a_traceback(config, monkeypatch, capsys):
    def end(*_):
        raise RuntimeError("[.../gloo/transport/tcp/pair.cc:537] Read error [::1]:75: Connection reset by peer.")

    monkeypatch.setattr(CPTCLI, "before_validate", end, raising=False)
    said = refusal(["validate", "-c", config, "--trainer.logger=false"], capsys, 1)
    assert "cpt validate: rank 0 ends, for another rank is gone" in said and "Traceback" not in said


def test_validate_evaluates_the_base_alone(tmp_path, config, capsys):
    main(["validate", "-c", config])
    tasks = [line["task"] for line in lines(tmp_path / "run" / "validate.jsonl")]
    assert tasks == ["word2"] * 3 + ["digit2"] * 3 + ["facts"] * 2
    assert not (tmp_path / "run" / "accuracy_matrix.json").exists()
    assert "base" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_print_config_round_trips(config, tmp_path, capsys, verb):
    changed = ["--data.tasks.word2.num_test=2", "--model.reduction=token_mean", "--seed_everything=7"]
    first = printed_config([verb, "-c", config, *changed], capsys)
    resolved = yaml.safe_load(first)
    assert resolved["data"]["tasks"]["word2"]["num_test"] == 2
    assert resolved["data"]["tasks"]["word2"]["source"]["init_args"]["family"] == "word2"
    assert resolved["model"]["init_args"]["reduction"] == "token_mean"
    (tmp_path / "again.yaml").write_text(first)
    assert printed_config([verb, "-c", str(tmp_path / "again.yaml")], capsys) == first


def test_the_saved_config_is_the_resolved_one_and_repeats_the_run(tmp_path, config):
    main(["fit", "-c", config, "--trainer.logger=false", "--data.steps=1", "--seed_everything=5"])
    main(["fit", "-c", str(tmp_path / "run" / "config.yaml"), f"--run_dir={tmp_path / 'again'}"])
    for name in ("accuracy_matrix.json", "samples.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "again" / name).read_text()
    saved = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("run", "again")]
    assert [config.pop("run_dir") for config in saved] == [str(tmp_path / "run"), str(tmp_path / "again")]
    assert saved[0] == saved[1] and saved[0]["seed_everything"] == 5


def test_one_seed_is_the_seed_of_data_and_model(config, monkeypatch):
    runs = []
    monkeypatch.setattr(CPTCLI, "_run_subcommand", lambda cli, verb: runs.append(cli))
    main(["fit", "-c", config, "--seed_everything=11"])
    assert (runs[0].model.seed, runs[0].datamodule.seed) == (11, 11)


def test_fast_dev_run_tries_a_step_and_leaves_nothing(tmp_path, config):
    main(["fit", "-c", config, "--trainer.fast_dev_run=true"])
    assert not (tmp_path / "run").exists()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "misspelt, named",
    [
        ("data: {prompts_per_stp: 8}", "prompts_per_stp"),
        ("data: {tasks: {word2: {num_tst: 8}}}", "num_tst"),
        ("model: {init_args: {reducton: token_mean}}", "reducton"),
        ("model: {class_path: SFTT}", "SFTT"),
        ("trainer: {max_epoch: 8}", "max_epoch"),
        ("continual: {reset_optimiser: true}", "reset_optimiser"),
        ("dat: {num_workers: 1}", "dat"),
        ("data: {evaluate_on: tset}", "tset"),
        ("trainer: null", "trainer is empty; leave it out"),
        ("run_dir: null", "run_dir is empty; leave it out"),
        ("run_dir: ''", "run_dir is empty; leave it out"),
        ("seed_everything: null", "seed_everything=None must be a whole number"),
        ("seed_everything: true", "seed_everything=True must be a whole number"),
        ("# data: {prompts_per_step: 8}", "a file given with -c has no options in it"),
        ("", "a file given with -c has no options in it, it is empty"),
    ],
)
def test_a_misspelt_option_is_named(config, tmp_path, capsys, misspelt, named):
    (tmp_path / "overlay.yaml").write_text(misspelt)
    message = refusal(["fit", "-c", config, "-c", str(tmp_path / "overlay.yaml")], capsys).split("error:")[-1]
    assert named in message


@pytest.mark.parametrize(
    "options, meant",
    [
        (["--steps=3"], "data.steps"),
        (["--group_size=3"], "model.group_size"),
        (["--model.num_generations=3"], "model.group_size"),
        (["--learning_rate=1e-5"], "model.optimizer.lr"),
        (["--model.backbone.pth=tiny"], "backbone.path"),
        (["--model.optimizer.wieght_decay=0"], "weight_decay"),
        (["--data.tasks.word2.source.famly=word2"], "family"),
        (["--continual.reset_optimiser=true"], "continual.reset_optimizer"),
        (["--trainer.callbacks+=Drifft"], "Drift"),
        (["--model=RFTT"], "RFT"),
        (["--frobnicate=3"], None),
    ],
)
def test_what_may_have_been_meant_is_asked(config, capsys, options, meant):
    """Of options of the verb, of a class and of a class within one, and of classes by their names."""
    said = refusal(["fit", "-c", config, *options], capsys).strip()
    assert said.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in said
    assert "typing" not in said and "Namespace" not in said


@pytest.mark.parametrize("option", ["stepz: 3", "stepz: null"])
def test_of_several_files_of_options_the_one_with_an_unknown_option_is_named(config, tmp_path, capsys, option):
    """jsonargparse finds it when all files are one."""
    for name, content in (("first", "steps: 3"), ("second", option), ("third", "steps: 4")):
        (tmp_path / f"{name}.yaml").write_text(f"data: {{{content}}}")
    files = [word for name in ("first", "second", "third") for word in ("-c", str(tmp_path / f"{name}.yaml"))]
    said = refusal(["fit", "-c", config, *files], capsys)
    assert f"error: {tmp_path}/second.yaml: " in said and said.strip().endswith("; did you mean data.steps?")


DOUBLED = "stages: [two]\nsteps: 1\ntasks:\n  one: {}\n  two: {}\n  one: {}\n"


@pytest.mark.parametrize("within", [False, True])
def test_a_task_that_is_there_twice_in_a_file_is_not_dropped_in_silence(config, tmp_path, capsys, within):
    """YAML itself takes the last one; in a file given with -c, and in one that such a file names."""
    stream, overlay = tmp_path / "stream.yaml", tmp_path / "overlay.yaml"
    stream.write_text(DOUBLED)
    overlay.write_text("data: stream.yaml" if within else "data:\n" + textwrap.indent(DOUBLED, "  "))
    said = refusal(["fit", "-c", config, "-c", str(overlay)], capsys)
    lines = "4 and 6" if within else "5 and 7"
    assert f"'one' is there twice, in lines {lines}" in said and "overlay.yaml" in said
    assert ("stream.yaml" in said) == within


@pytest.mark.parametrize("malformed", ["", "- a", "data:\n\tsteps: 3", "data: {steps: 3", "data: {steps: many}"])
def test_of_several_files_of_options_the_malformed_one_is_named(config, tmp_path, capsys, malformed):
    for name, content in (("first", "data: {steps: 3}"), ("second", malformed), ("third", "data: {steps: 4}")):
        (tmp_path / f"{name}.yaml").write_text(content)
    files = [word for name in ("first", "second", "third") for word in ("-c", str(tmp_path / f"{name}.yaml"))]
    assert f"error: {tmp_path}/second.yaml: " in refusal(["fit", "-c", config, *files], capsys)
    assert "first.yaml" not in refusal(["fit", "-c", config, *files[:2], "--data.steps=many"], capsys)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--trainer.max_epochs=3"], "trainer.max_epochs=3: the stream has 2 stages"),
        (["--data.max_prompt_tokens=5"], "max_prompt_tokens=5: task 'word2', toy/word2/train/"),
        (["--data.max_prompt_tokens=5", "--data.num_workers=1"], "max_prompt_tokens=5: task 'word2', toy/word2/train/"),
        (["--data.tasks.word2.num_train=5000"], "task 'word2': num_train=5000, but the train split has"),
    ],
)
def test_a_mistake_is_named_in_a_line_with_its_mend(config, capsys, options, message):
    """Found by this process or by one that loads; where, is told who asks."""
    said = refusal(["fit", "-c", config, "--trainer.logger=false", *options], capsys, code=1).splitlines()
    assert message in said[-2] and said[-2].startswith("cpt fit: error: ")
    assert "JSONARGPARSE_DEBUG=true" in said[-1]
    assert "Traceback" not in "\n".join(said)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_is_missing_is_named_in_a_line_whoever_loads_it(config, tmp_path, capsys, num_workers):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"images": ["nowhere.png"], "problem": "How many?", "answer": "7"}\n')
    source = f"{{class_path: cpt_lightning.tasks.FileRows, init_args: {{train: {rows}, test: {rows}}}}}"
    task = ["--data.tasks.word2.source", source, "--data.tasks.word2.num_test=1", f"--data.num_workers={num_workers}"]
    said = refusal(["fit", "-c", config, "--trainer.logger=false", *task], capsys, code=1).splitlines()
    assert said[-2].startswith(f"cpt fit: error: task 'word2', {rows}:1: image '{tmp_path}/nowhere.png' does not exist")
    assert "Traceback" not in "\n".join(said)


def test_what_a_library_raises_keeps_its_traceback(config):
    with pytest.raises(RuntimeError, match="val/digit2/accuracy was not logged"):
        main(["validate", "-c", config, "--trainer.logger=false", "--trainer.limit_val_batches=0.4"])
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        main(["fit", "-c", config, "--trainer.logger=false", "--model.optimizer.lr=-1"])


def test_what_nobody_meant_to_refuse_is_no_complaint():
    """Both come out of a line of the package; one of them says what it refuses."""
    with pytest.raises(ValueError, match="leave nothing of train") as meant:
        check_fractions(0.5, 0.5)
    assert complaint(meant.value) == str(meant.value)
    with pytest.raises(ValueError, match="empty") as mistake:
        Logged({"train/loss": []}).highest("train/loss")
    assert complaint(mistake.value) is None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data.stages=[word2, digt2]"], "data.stages names 'digt2', .*; did you mean 'digit2'\\?"),
        (["--data.passes={wrd2: 2}"], "data.passes names 'wrd2', .*; did you mean 'word2'\\?"),
        (["--data.tasks.word2.num_test=0"], "num_test=0 must be at least 1; null takes every row"),
        (["--checkpoint.every_n_steps=0"], "checkpoint.every_n_steps=0.*"),
        (["--model=RFT", "--model.group_size=1"], "group_size=1: a completion is compared with its siblings, .*"),
    ],
)
def test_what_a_constructor_refuses_is_said_in_one_line(config, options, message, capsys):
    """No traceback, and no dump of the configuration."""
    said = refusal(["fit", "-c", config, *options], capsys).strip().splitlines()[-1]
    assert re.fullmatch(f"cpt fit: error: {message}", said)
    assert "Namespace" not in said


@pytest.mark.parametrize(
    "name, message",
    [
        ("1", "1 cannot be the name of a task or probe: it is an int and not text; quote it"),
        ("null", "None cannot be the name of a task or probe: it is nothing and not text; quote it"),
        ("b.c", "'b.c' cannot be the name of a task or probe: '.' has a meaning .*"),
    ],
)
def test_a_name_that_no_task_can_have_is_refused_before_the_model_is_made(config, tmp_path, name, message, capsys):
    source = "{class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: word2}}"
    (tmp_path / "overlay.yaml").write_text(f"data: {{tasks: {{{name}: {{source: {source}}}}}}}")
    said = refusal(["fit", "-c", config, "-c", str(tmp_path / "overlay.yaml")], capsys).strip().splitlines()[-1]
    assert re.fullmatch(f"cpt fit: error: {message}", said)


def test_where_it_was_refused_can_be_asked_for(config, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="digt2"):
        main(["fit", "-c", config, "--data.stages=[word2, digt2]"])


def test_a_checkpoint_that_is_not_there_is_named(config, capsys):
    message = refusal(["fit", "-c", config, "--ckpt_path=nowhere.ckpt"], capsys)
    assert message.startswith("cpt fit: error: --ckpt_path nowhere.ckpt: there is no such checkpoint")


def test_the_folder_of_a_run_or_of_a_model_in_place_of_a_checkpoint_is_told_from_one(broken_off, config, capsys):
    message = refusal(["fit", "-c", config, f"--ckpt_path={broken_off.parent}"], capsys)
    assert "in it there are last.ckpt" in message
    base = Path(models.__file__).parent / "tiny" / "base"
    assert "is given as model.backbone.path" in refusal(["fit", "-c", config, f"--ckpt_path={base}"], capsys)


def test_what_is_missing_is_said_with_the_usage_of_the_verb(capsys):
    assert refusal(["fit"], capsys).startswith("usage: cpt fit -c CONFIG.yaml")


def test_help_and_version_need_neither_torch_nor_lightning(capsys):
    code = "import sys; from cpt_lightning.cli import main\ntry: main(['-h'])\nexcept SystemExit: print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, modules = result.stdout.rsplit("\n\n", 1)
    assert all(verb in shown for verb in ("fit", "validate", "test", "predict", "inspect"))
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & set(modules.split())
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_no_verb_and_an_unknown_verb_get_the_usage(capsys):
    for args in ([], ["train"]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
    assert "unknown verb 'train'; there are fit, validate, test, predict, inspect" in capsys.readouterr().err


def test_help_of_a_verb_and_of_a_class(capsys):
    for args, shown in (
        (["fit", "--help"], "--data.prompts_per_step"),
        (["fit", "--model.help=RFT"], "--model.group_size"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code in (0, None)
        assert shown in capsys.readouterr().out


# -- the folder --------------------------------------------------------------------------------------------------------


def test_run_directory_of_checkpoints(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        (folder / "config.yaml").touch()
    (tmp_path / "loose").mkdir()
    assert run_directory(str(run), None, named=False) == tmp_path / "run_2"
    assert run_directory(str(run), str(run / "last.ckpt"), named=True) == run
    assert run_directory(str(run), str(other / "last.ckpt"), named=False) == other  # a run goes on in its folder
    assert run_directory(str(run), str(other / "last.ckpt"), named=True) == tmp_path / "run_2"  # a branch
    assert run_directory(str(tmp_path / "new"), str(tmp_path / "loose" / "x.ckpt"), named=False) == tmp_path / "new"
    (tmp_path / "run_2").mkdir()
    assert run_directory(str(run), None, named=False) == tmp_path / "run_2"  # an empty folder is free
    for number in (2, 3):
        (tmp_path / f"run_{number}" / "filter").mkdir(parents=True)
    assert run_directory(str(run), None, named=True) == tmp_path / "run_4"


def test_verdicts_that_are_missing_are_named_before_the_base_is_evaluated(config, tmp_path, capsys):
    said = refusal(
        ["fit", "-c", config, "--filter.mode", "solvable", "--filter_from", str(tmp_path / "other")], capsys, code=1
    )
    assert "other/filter/word2.jsonl is missing" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model=RFT", "--trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2 is for SFT"),
        (["--trainer.precision=16-true"], "trainer.precision=16-true: float16 weights and moments overflow"),
        (["--trainer.limit_val_batches=0.5"], "trainer.limit_val_batches=0.5: the validation after a task"),
        (["--trainer.overfit_batches=1"], "trainer.overfit_batches=1 would learn and evaluate other rows"),
        (["--trainer.check_val_every_n_epoch=2"], "trainer.check_val_every_n_epoch=2: the validation after a task"),
        (["--trainer.callbacks+=cpt_lightning.callbacks.EWC", "--model.backbone.tuning=lora",
          "--model.backbone.lora.along_stream=renewed"], "EWC: with backbone.lora.along_stream=renewed"),
        (["--export.when=end", "--export.merge=true"], "export.merge: with full tuning there is no adapter to merge"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)  # fmt: skip
def test_what_would_stop_a_fit_or_spoil_it_is_said_before_the_base_is_evaluated(
    config, tmp_path, options, said, capsys
):
    """And before its weights are loaded; nothing is left behind."""
    model = ["--model=RFT", "--model.sampling.max_new_tokens=4"] if "--model=RFT" in options else []
    written = refusal(["fit", "-c", config, *model, *(each for each in options if each != "--model=RFT")], capsys, 1)
    assert f"error: {said}" in written and "are trained" not in written
    assert not (tmp_path / "run").exists()


def test_a_test_of_some_rows_is_refused(config, tmp_path, capsys):
    said = refusal(["test", "-c", config, "--trainer.limit_test_batches=0.5"], capsys, code=1)
    assert "trainer.limit_test_batches=0.5 would leave tasks out of test_scores.json" in said
    assert not (tmp_path / "run" / "test_scores.json").exists()


# -- the folder, again: who writes into it -----------------------------------------------------------------------------


def test_a_run_is_in_its_folder_whatever_the_loggers_are(config, tmp_path, capsys):
    """A logger that writes elsewhere, as W&B's does; what was left is found again, and shown."""
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'logs'}"]
    main(["fit", "-c", config, *logger])
    said = capsys.readouterr().out
    assert "all that the run left" in said and "tensorboard" not in said, "there are no events"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "environment.json", "accuracy_matrix.json", "samples.jsonl", "last.ckpt",
                     "1_word2.ckpt", "2_digit2.ckpt"}  # fmt: skip
    assert [path.name for path in (tmp_path / "logs").rglob("metrics.csv")] == ["metrics.csv"]
    main(["fit", "-c", config, *logger, "--ckpt_path=last", "--data.steps=2"])
    assert not (tmp_path / "run_2").exists()
    assert len(read_starts(tmp_path / "run" / "environment.json")) == 2


class Unconnected(FakeMLFlow):
    """MLflow's logger, ended by the Trainer after each of its methods, and begun anew by none."""

    _log_model = False

    def log_metrics(self, metrics, step=None):
        assert self.recorder.status == "RUNNING" or "train/loss" not in metrics

    def finalize(self, status):
        self.recorder.status = "FINISHED"


def test_a_tensorboard_logger_of_ones_own_takes_back_what_is_logged_again(config, tmp_path):
    """Two tasks of two steps, and the second one again; beside MLflow's, for which a run that learns is running."""
    board = {"save_dir": str(tmp_path / "run"), "name": "", "version": ""}
    loggers = [{"class_path": "TensorBoardLogger", "init_args": board}, {"class_path": f"{__name__}.Unconnected"}]
    (tmp_path / "loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    command = ["fit", "-c", config, "-c", str(tmp_path / "loggers.yaml")]
    main(command)
    main([*command, f"--ckpt_path={tmp_path / 'run' / '1_word2.ckpt'}"])
    assert len(Logged.load(tmp_path / "run").values["train/loss"]) == 4


def test_names_that_a_logger_cannot_tell_apart_are_refused_before_weights_are_loaded(config, tmp_path, capsys):
    """Lightning makes one of them for MLflow, and of their curves one curve."""
    task = "{source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: word2}}, num_test: 3}"
    options = [f"--trainer.logger={__name__}.Unconnected", f"--data.tasks={{größe: {task}, grüße: {task}}}"]
    assert "of 'grüße' that is 'gre', as of 'größe'" in refusal(["fit", "-c", config, *options], capsys)
    assert not (tmp_path / "run").exists()


def test_whoever_listens_to_sys_exit_hears_that_a_command_failed(config, capsys, monkeypatch):
    """As W&B (0.31) does, which took a run for finished that an exception had ended."""
    codes, leave = [], sys.exit
    monkeypatch.setattr(sys, "exit", lambda code=0: (codes.append(code), leave(code)))
    refusal(["test", "-c", config, "--ckpt_path=last"], capsys)
    assert codes == [2]


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_only_a_fit_begins_where_there_is_no_checkpoint_yet(config, tmp_path, verb, capsys):
    said = refusal([verb, "-c", config, "--ckpt_path=last"], capsys)
    assert f"--ckpt_path last: there is no last.ckpt in run_dir={tmp_path / 'run'}" in said
    assert not (tmp_path / "run").exists()


HOLDING = """
import sys
from pathlib import Path
from cpt_lightning.cli.run_directory import Claim

claim = Claim()
print(claim(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_writes_is_left_to_it(config, tmp_path, capsys):
    """A run that begins takes the next one, and one that would go on is refused; a killed process holds nothing."""
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "True\n"
        assert run_directory(str(folder), None, named=True) == folder, "an evaluation may write there"
        said = refusal(["fit", "-c", config, "--ckpt_path=last"], capsys)
        assert f"another process is writing the run in {folder}; wait for its end, or stop it" in said
        main(["fit", "-c", config])
        assert (tmp_path / "run_2" / "last.ckpt").exists() and not (tmp_path / "run_2" / LOCK).exists()
        other.kill()
    main(["fit", "-c", config])
    assert (folder / "last.ckpt").exists()


def test_a_folder_is_claimed_again_when_it_was_released_meanwhile(tmp_path, monkeypatch):
    """The file that was opened was taken away before it was locked: another one, of the same name, is."""
    first, second = Claim(), Claim()
    assert first(tmp_path / "run")
    opened, released = os.open, []

    def opened_and_released(*args):
        file = opened(*args)
        if not released:
            released.append(first.release())
        return file

    monkeypatch.setattr(os, "open", opened_and_released)
    assert second(tmp_path / "run") and (tmp_path / "run" / LOCK).exists()
    second.release()
    assert not (tmp_path / "run").exists(), "nothing was written there"


def test_an_option_that_is_wrong_is_said_in_a_few_lines(config, capsys):
    """Not below the names of all options, nor with the types that were tried."""
    said = refusal(["fit", "-c", config, "--model.group_size=4"], capsys)
    assert "class_path 'cpt_lightning.modules.SFT':\nOption 'group_size' is not accepted" in said
    assert len(said.splitlines()) < 6 and "NestedArg" not in said
    assert "usage: cpt fit -c CONFIG.yaml" in said


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--trainer.accelerator=gpu"], 2, "No supported gpu backend found!"),
        (["--trainer.devices=0"], 2, "is not a valid input using cpu accelerator"),
        (
            ["--data.steps=6", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e38",
             "--model.max_grad_norm=null"],
            1,
            "5 steps in a row had a gradient that is not finite",
        ),
    ],
    ids=["no GPU", "no devices", "divergence"],
)  # fmt: skip
def test_what_lightning_refuses_and_what_went_astray_is_said_in_a_line(config, options, code, said, capsys):
    assert said in refusal(["fit", "-c", config, *options], capsys, code).splitlines()[-1 - (code == 1)]
