"""Two processes learn, evaluate and record what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpt_lightning.cli import main
from cpt_lightning.records import RunFolder
from cpt_lightning.report import figures_of
from tests.fakes import LinearModule, make_trainer, number_stream
from tests.ranks import ROOT, run_ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    """The same run on one rank and on two, by number of ranks."""
    folders = {devices: tmp_path_factory.mktemp(f"ranks{devices}") for devices in (1, 2)}
    learn(folders[1])
    run_ranks(learn, folders[2], None, "ddp", 2)
    return folders


def learn(folder: Path, checkpoint: Path | None = None, strategy: str = "auto", devices: int = 1) -> None:
    """A run, or the rest of one."""
    module, stream = LinearModule(), number_stream()
    trainer = make_trainer(folder, stream, strategy=strategy, devices=devices)
    if checkpoint is None:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=checkpoint)


def weights(folder: Path, name: str = "last.ckpt") -> dict:
    return torch.load(folder / name, weights_only=True)["state_dict"]


def test_matrix_and_samples_are_those_of_one_process(runs):
    """6 and 5 rows in batches of 4 over two ranks: padded, counted once, and written in the same order."""
    one, two = runs[1], runs[2]
    assert (two / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()
    matrices = [json.loads((folder / "accuracy_matrix.json").read_text()) for folder in (one, two)]
    assert matrices[0]["rows"] == matrices[1]["rows"]
    assert [cell["num_samples"] for cell in matrices[1]["rows"][0]["scores"].values()] == [6, 6, 6, 5]
    assert matrices[1]["metrics"] == pytest.approx(matrices[0]["metrics"])


def test_two_halves_of_every_batch_teach_what_the_batch_does(runs):
    """Mean of the ranks' mean gradients = mean over the batch, because every rank has an equal share."""
    for name, weight in weights(runs[1]).items():
        torch.testing.assert_close(weights(runs[2])[name], weight, atol=1e-6, rtol=1e-5)


def test_a_run_of_two_ranks_goes_on_with_one(runs, tmp_path):
    learn(tmp_path / "branch", runs[2] / "1_a.ckpt")
    assert (tmp_path / "branch" / "samples.jsonl").read_text() == (runs[1] / "samples.jsonl").read_text()


CONFIG = """
model:
  class_path: cpt_lightning.modules.MultiTask
  init_args:
    objective: rft
    objectives: {facts: sft}
    group_size: 2
    sampling: {max_new_tokens: 12}
    evaluation: {max_new_tokens: 4, temperature: 0}
data:
  tasks:
    bars2: &toy
      source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: bars2}}
      reward: {format: think_answer}
      num_train: 7
      num_test: 3
    facts: {<<: *toy, source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: facts}}}
  probes: {colour: {<<: *toy, source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: colour}}}}
  stages: [facts, [bars2, facts]]
  prompts_per_step: 2
  steps: 4
  eval_prompts_per_step: 4
filter: {mode: random, completions_per_row: 2, sampling: {max_new_tokens: 12}}
trainer: {accelerator: cpu, devices: 2, enable_progress_bar: false}
"""


MEASURED = [
    "--trainer.callbacks+=cpt_lightning.callbacks.Drift", "--trainer.callbacks.num_rows=3",
    "--trainer.callbacks.max_new_tokens=12", "--trainer.callbacks.every_n_steps=2",
    "--trainer.callbacks+=cpt_lightning.callbacks.GradientRisk", "--trainer.callbacks.num_rows=2",
    "--trainer.callbacks.max_new_tokens=12", "--trainer.callbacks+=cpt_lightning.callbacks.WeightChange",
    "--trainer.callbacks+=cpt_lightning.callbacks.WeightDistance", "--trainer.callbacks.num_rows=2",
    "--trainer.callbacks.max_new_tokens=12",
    "--trainer.callbacks+=cpt_lightning.callbacks.Influence", "--trainer.callbacks.num_rows=3",
    "--trainer.callbacks.max_new_tokens=12", "--trainer.callbacks.every_n_steps=2",
    "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1",
    # Of text alone the vision tower learns nothing, and does not decay.
    "--model.optimizer.weight_decay=0.01",
]  # fmt: skip


def measurements(run: Path, name: str) -> list[dict]:
    return json.loads((run / f"{name}.json").read_text())["measurements"]


def verdicts(run: Path) -> dict[str, list[dict]]:
    """Header and verdicts of every stage, without what they took."""
    files = sorted((run / "filter").glob("*.jsonl"))
    rows = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return {name: [{**row, "time_s": None} for row in stage] for name, stage in rows.items()}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("filtered")
    (folder / "config.yaml").write_text(CONFIG)
    command = ["fit", "-c", str(folder / "config.yaml"), "--run_dir", str(folder / "run"), "--trainer.devices=1"]
    main([*command, *MEASURED, "--trainer.callbacks.exact=true"])
    return folder / "run"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_with_and_without_images_and_rollouts_wait_for_each_other_and_stay_alike(tmp_path, filtered, strategy):
    """One row a rank: text alone first, then ranks that sample beside ranks that do not, with images or without.

    Before that they judge 4 + 3 rows of the first stage, and of the second those of another task too, as one process
    does; the models that judge the second one may differ in their last digits, and so do their fingerprints.
    Of drift and influence, two rows on one rank and one on the other give what three rows on one give. The risk of the
    first stage's gradients, what they did to the weights and how far these are from the base are those of one process.
    """
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = ["fit", "-c", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "run")]
    command += ["--trainer.strategy", strategy, *MEASURED]
    if strategy == "ddp":
        by_lightning([*command, "--trainer.callbacks.exact=true"])
    else:  # refuses it
        run_ranks(main, command)
    rows = json.loads((tmp_path / "run" / "accuracy_matrix.json").read_text())["rows"]
    assert [row["after"] for row in rows] == [None, "facts", "bars2+facts"]
    assert {cell["num_samples"] for row in rows for cell in row["scores"].values()} == {3}
    one, two = verdicts(filtered), verdicts(tmp_path / "run")
    assert two["facts"] == one["facts"]
    assert [figures_of(RunFolder(run))["rows"] for run in (filtered, tmp_path / "run")] == [0.016] * 2, (
        "8 steps of 2 rows"
    )
    assert [row["row_id"] for row in two["bars2+facts"][1:]] == [row["row_id"] for row in one["bars2+facts"][1:]]
    assert {row["pass_count"] for row in one["facts"][1:]} == {1, 2}, "otherwise little was compared"
    compare_drift(*(measurements(run, "drift") for run in (filtered, tmp_path / "run")))
    compare_influence(*(measurements(run, "influence") for run in (filtered, tmp_path / "run")))
    compare_risk(*(measurements(run, "gradient_risk") for run in (filtered, tmp_path / "run")))
    compare_change(*(measurements(run, "weight_change")[0] for run in (filtered, tmp_path / "run")))
    compare_distance(*(measurements(run, "weight_distance")[0] for run in (filtered, tmp_path / "run")))


def by_lightning(command: list[str]) -> None:
    """The command as a person types it: Lightning starts the second rank."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cpt_lightning", *command]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def compare_drift(one: list[dict], two: list[dict]) -> None:
    of_first = [(1, step, name) for step in (2, 4) for name in ("facts", "colour")]
    assert [(row["stage"], row["step"], row["name"]) for row in two[:4]] == of_first
    for alone, together in zip(one[:4:2], two[:4:2], strict=True):  # the probe has hardly moved yet
        assert {**together, "name": 0} == pytest.approx({**alone, "name": 0}, rel=1e-4)
    assert one[2]["forward_kl"] > 1e-5
    assert [(row["step"], row["name"], row["num_rows"]) for row in two[4:]] == [
        (step, name, 3) for step in (2, 4) for name in ("facts", "bars2", "colour")
    ]


def compare_influence(one: list[dict], two: list[dict]) -> None:
    assert [(row["stage"], row["step"], *row["on"]) for row in two] == [
        (stage, step, "colour") for stage in (1, 2) for step in (2, 4)
    ]
    for alone, together in zip(one[:2], two[:2], strict=True):
        for kind in ("gradient_squared", "lr", "base_perplexity"):
            assert together[kind] == pytest.approx(alone[kind], rel=1e-4)
        for kind, value in together["on"]["colour"].items():
            # Differences of changes of 1e-4: the last digits of log-probabilities show.
            tolerance = 1e-2 if kind == "asymmetry" else 1e-3
            assert value == pytest.approx(alone["on"]["colour"][kind], rel=tolerance, abs=1e-6), kind
        assert alone["on"]["colour"].keys() >= {"lbk", "cosine"}


def compare_risk(one: list[dict], two: list[dict]) -> None:
    assert [(row["stage"], row["step"]) for row in two] == [(stage, step) for stage in (1, 2) for step in (1, 2, 3, 4)]
    assert [row["probes"] > 0 for row in one[:4]] == [True] * 4
    for alone, together in zip(one[:4], two[:4], strict=True):
        assert together == pytest.approx(alone, rel=1e-3)


def compare_change(one: dict, two: dict) -> None:
    assert two["effective_ranks"].keys() == one["effective_ranks"].keys()
    for name in ("norm", "relative_norm", "changed_fraction", "effective_rank"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)


def compare_distance(one: dict, two: dict) -> None:
    assert one["distance"] > 0 < one["fisher_distance"]
    assert {**two, "name": 0} == pytest.approx({**one, "name": 0}, rel=1e-3)
