"""``cpt rehearse``: what is run, what is said of it, and that nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
from mmap import PAGESIZE, mmap
from pathlib import Path

import pytest
import torch

from cpt_lightning.callbacks import EWC, L2, Drift
from cpt_lightning.callbacks.filter.judge import Judge
from cpt_lightning.cli import main
from cpt_lightning.cli.rehearse import watch
from cpt_lightning.cli.rehearse.command import RehearseCLI
from cpt_lightning.cli.rehearse.duration import duration_of
from cpt_lightning.cli.rehearse.memory import DeviceMemory
from cpt_lightning.cli.rehearse.watch import Part
from cpt_lightning.modules import RFT, SFT, OnPolicySFT, PostTraining
from cpt_lightning.modules.updates import ManualUpdates

ROOT = Path(__file__).parents[1]
SMALL = [
    "--rehearse.prompt_tokens=75", "--rehearse.target_tokens=5", "--data.prompts_per_step=4",
    "--data.eval_prompts_per_step=3", "--model.evaluation.max_new_tokens=4",
]  # fmt: skip
ROLLOUTS = ["--model.group_size=3", "--model.sampling.max_new_tokens=6"]
HELD = 200_000_000
"""Bytes that a part holds."""


def held() -> mmap:
    """So much memory: pages of its own, for what malloc gives may be what earlier tests have left."""
    pages = mmap(-1, HELD)
    pages[::PAGESIZE] = bytes(len(range(0, HELD, PAGESIZE)))
    return pages


def rehearse(config: str, *options: str) -> RehearseCLI:
    """Makes and runs it."""
    cli = RehearseCLI(["-c", str(ROOT / "configs" / config), *SMALL, *options])
    cli.rehearse()
    return cli


@pytest.fixture
def scored(monkeypatch) -> list[tuple[int, ...]]:
    """Of everything that is scored: prompts, their tokens and images, completions, their fewest and most tokens."""
    seen = []
    logprobs = PostTraining.logprobs

    def noted(self, prompts, completions, *rest):
        lengths = completions.lengths
        sizes = (len(prompts), int(prompts.lengths.min()), sum(prompts.images_per_prompt))
        seen.append((*sizes, len(lengths), int(lengths.min()), int(lengths.max())))
        return logprobs(self, prompts, completions, *rest)

    monkeypatch.setattr(PostTraining, "logprobs", noted)
    return seen


def test_steps_are_the_largest_and_all_that_is_sampled_is_learned(scored, capsys):
    """A base that ends its answers after a dozen tokens, and is mostly wrong, uses up all six of them here."""
    cli = rehearse("demo/grpo.yaml", *ROLLOUTS, "--model.learn_truncated=false")
    assert scored == [(4, 75, 4, 12, 6, 6)] * 2
    said = capsys.readouterr().out
    assert "2 steps of 4 prompts of 75 tokens (1 images) x 3 completions of 6 tokens" in said
    rows = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")]
    assert rows == ["rollout", "reward", "update", "evaluation"]
    assert isinstance(cli.model, RFT) and cli.trainer.global_step == 2


def test_supervised_steps_have_targets_of_the_length_asked_for_and_each_its_accumulated_batches(scored, capsys):
    cli = rehearse("demo/sft.yaml", "--trainer.accumulate_grad_batches=2", "--rehearse.images=0")
    assert scored == [(4, 75, 0, 4, 5, 5)] * 4
    assert isinstance(cli.model, SFT) and cli.trainer.global_step == 2
    assert "prompts of 75 tokens (0 images) with targets of 5" in capsys.readouterr().out


def test_every_objective_of_several_is_rehearsed(scored, capsys):
    """Of the demo's tasks one is reinforced in this config, and another one supervised: a step of 4 rows of each."""
    rehearse("demo/multitask.yaml", *ROLLOUTS, "--model.objective=rft", "--model.objectives={word2: sft}")
    assert sorted(set(scored)) == [(4, 75, 4, 4, 5, 5), (4, 75, 4, 12, 6, 6)]


def test_own_answers_are_all_kept(scored):
    cli = rehearse("demo/on_policy_sft.yaml", *ROLLOUTS)
    assert isinstance(cli.model, OnPolicySFT)
    assert scored == [(4, 75, 4, 12, 6, 6)] * 2


def test_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rehearse("demo/grpo.yaml", *ROLLOUTS, "--run_dir", str(tmp_path / "run"), "--checkpoint.every_n_steps=1")
    assert list(tmp_path.iterdir()) == []


FILTER = ["--filter.mode=solvable"]
EWC_OF_TWO, DRIFT_OF_TWO = (
    [f"--trainer.callbacks+={name}", "--trainer.callbacks.num_rows=2"] for name in ("EWC", "Drift")
)
BESIDE = {"filter": FILTER, "EWC": EWC_OF_TWO}


@pytest.fixture
def sampled(monkeypatch) -> list[tuple[int, ...]]:
    """Of everything that is tried: prompts, attempts at each, and tokens of the shortest."""
    seen = []
    attempt = PostTraining.attempt

    def noted(self, prompts, size, *rest):
        result = attempt(self, prompts, size, *rest)
        seen.append((len(prompts), size, int(result[0].lengths.min())))
        return result

    monkeypatch.setattr(PostTraining, "attempt", noted)
    return seen


def test_methods_measurements_and_filter_are_rehearsed_over_two_stages(sampled, capsys, tmp_path, monkeypatch):
    """EWC remembers the first stage, so that its penalty is there in the second, before which nothing is judged.

    Two evaluations of 3 rows, and 3 rows judged 8 times each, with all of the 6 tokens that training samples.
    """
    monkeypatch.chdir(tmp_path)
    cli = rehearse("demo/grpo.yaml", *EWC_OF_TWO, *DRIFT_OF_TWO, *FILTER, *ROLLOUTS, "--run_dir=run")
    said = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")]
    assert rows == ["rollout", "reward", "update", "evaluation", "EWC, longest call", "Drift, longest call", "filter"]
    assert "an evaluation of 3 x 4, EWC, Drift, filter, on 1 x cpu" in said
    assert sampled == [(3, 1, 4), (3, 1, 4), (3, 8, 6)]
    ewc, drift = (callback for callback in cli.rehearsed if isinstance(callback, EWC | Drift))
    assert set(ewc.kept) == {"precision", "anchor"} and "train/ewc" in cli.trainer.callback_metrics
    assert {found["name"] for found in drift.measurements} == {*cli.datamodule.task_names, *cli.datamodule.probe_names}
    assert list(tmp_path.iterdir()) == []


def test_a_filter_that_takes_verdicts_over_judges_none(sampled):
    rehearse("demo/grpo.yaml", *FILTER, *ROLLOUTS, "--filter_from=elsewhere")
    assert sampled == [(3, 1, 4)]


def test_a_callback_within_an_update_is_a_part_of_its_own(monkeypatch):
    """It waits for 0.2 s and holds 200 MB in every optimizer step, and before training for no time at all."""

    def heavy(self, *args):
        with held():
            watch.time.sleep(0.2)

    monkeypatch.setattr(L2, "on_before_optimizer_step", heavy)
    cli = rehearse("demo/sft.yaml", "--trainer.callbacks+=L2", "--data.stages=[word2]")
    (seen,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, watch.Watch))
    parts = {part.name: part for part in seen.parts(cli.trainer)}
    assert list(parts) == ["update", "evaluation", "L2"]
    assert parts["L2"].seconds > 0.2
    assert parts["L2"].peak_bytes - parts["update"].peak_bytes > 100e6 and not parts["L2"].is_of_step
    assert (
        duration_of(cli.datamodule, cli.model.processor, list(parts.values())).step_seconds == parts["update"].seconds
    )
    assert not any(name.startswith("on_") for callback in cli.rehearsed for name in vars(callback))


def test_a_part_has_the_memory_that_it_took_and_the_time_of_its_last_step(monkeypatch):
    """A step holds 200 MB in its update, and the second one waits for 0.2 s there."""
    waits = iter([0.0, 0.2])
    losses = RFT.losses

    def heavy(self, *args):
        with held():
            watch.time.sleep(next(waits))
        return losses(self, *args)

    monkeypatch.setattr(RFT, "losses", heavy)
    cli = rehearse("demo/grpo.yaml", *ROLLOUTS)
    (seen,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, watch.Watch))
    parts = {part.name: part for part in seen.parts(cli.trainer)}
    assert parts["update"].seconds > 0.2 > parts["reward"].seconds
    assert parts["update"].peak_bytes - parts["rollout"].peak_bytes > 150e6


def test_a_peak_is_forgotten():
    memory = DeviceMemory(torch.device("cpu"), num_processes=2)
    memory.forget_peak()
    before = memory.peak
    with held():
        assert memory.peak - before > 0.9 * HELD
    memory.forget_peak()
    assert memory.peak - before < 100e6
    assert 2 * memory.total == DeviceMemory(torch.device("cpu")).total > 1e9


def test_how_long_a_run_takes_is_steps_and_evaluations_at_the_pace_of_the_largest(capsys):
    """Five stages of 60 steps at 1 + 2 s, and six evaluations: of ten tasks and probes 150 rows each, 64 at once."""
    cli = RehearseCLI(["-c", str(ROOT / "configs/demo/grpo.yaml")])
    parts = [Part("rollout", 1.0, 0), Part("update", 2.0, 0), Part("evaluation", 0.5, 0, is_of_step=False)]
    duration = duration_of(cli.datamodule, cli.model.processor, parts)
    assert duration.training_s == 5 * 60 * 3.0
    assert duration.evaluation_s == 6 * 10 * 3 * 0.5
    assert duration.filter_s == 0


def test_a_filter_judges_every_training_row():
    """Of two tasks 100 rows each, 64 at once."""
    options = [f"--data.tasks.{name}.num_train=100" for name in ("word2", "bars2")]
    cli = RehearseCLI(["-c", str(ROOT / "configs/demo/grpo.yaml"), "--data.stages=[word2, bars2]", *options])
    parts = [Part("evaluation", 0.5, 0, is_of_step=False), Part("filter", 3.0, 0, is_of_step=False)]
    assert duration_of(cli.datamodule, cli.model.processor, parts).filter_s == 2 * 2 * 3.0


def test_data_may_be_missing(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ["--model.backbone.path=tiny", "--trainer.precision=32-true", "--model.updates_per_rollout=1"]
    rehearse("qwen2_5_vl_7b/grpo.yaml", *ROLLOUTS, *options)
    said = capsys.readouterr().out
    assert "how long the run takes is not known: task 'scienceqa': data set" in said and "evaluation" in said


@pytest.mark.parametrize(
    ("config", "breaks", "part", "mend"),
    [
        ("grpo", (ManualUpdates, "update"), "update", "micro_batch_prompts 1"),
        ("grpo", (RFT, "_sample"), "rollout", "rollout_batch_prompts"),
        ("grpo", (RFT, "evaluate"), "evaluation", "data.eval_prompts_per_step"),
        ("sft", (SFT, "training_step"), "update", "trainer.accumulate_grad_batches"),
        ("sft", (SFT, "load_model"), "loading", "trainer.strategy fsdp2"),
        ("grpo", (Judge, "verdicts"), "filter", "filter.completions_per_row"),
        ("grpo", (EWC, "fisher"), "EWC", "num_rows"),
    ],
)  # fmt: skip
def test_memory_that_does_not_suffice_is_said_with_the_part_and_the_mend(config, breaks, part, mend, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(*breaks, full)
    with pytest.raises(SystemExit) as stop:
        rehearse(f"demo/{config}.yaml", *(ROLLOUTS if config == "grpo" else []), *BESIDE.get(part, []))
    first, second = str(stop.value.code).splitlines()
    assert first == f"out of memory in the {part}: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert mend in second


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--rehearse.prompt_tokens=2"], 1, "prompt_tokens=2 has no room for images=1"),
        (["--rehearse.prompt_tokens=null"], 2, "give --rehearse.prompt_tokens, which cpt inspect measures"),
        (["--rehearse.steps=1"], 2, "steps=1; give at least 2"),
        (["--model.updates_per_rollout=8"], 1, "a batch of 4 prompts cannot be spread over updates_per_rollout=8"),
    ],
)  # fmt: skip
def test_what_cannot_be_rehearsed_is_said_in_a_line(options, code, said, capsys):
    with pytest.raises(SystemExit) as stop:
        rehearse("demo/grpo.yaml", *ROLLOUTS, *options)
    assert stop.value.code == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_share_the_batch_and_one_of_them_speaks(strategy):
    command = [sys.executable, "-m", "cpt_lightning", "rehearse", "-c", "configs/demo/grpo.yaml", *SMALL, *ROLLOUTS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ["--trainer.devices=2", f"--trainer.strategy={strategy}"]
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the largest batches") == 1 and done.stdout.count("on 2 x cpu") == 1
    assert "One step: 2 prompts x 3 completions" in done.stderr


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["rehearse", "--help"])
    said = capsys.readouterr().out
    assert "--rehearse.prompt_tokens" in said and "--rehearse.steps" in said and "for example:" in said
