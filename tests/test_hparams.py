"""The options by which runs are told apart in TensorBoard's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt_lightning.cli.hparams import NUMBERS, TEXTS, hparams_of
from cpt_lightning.cli.lightning_cli import CPTCLI

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hparams(monkeypatch):
    """Those of a command line, which is parsed and not run."""
    monkeypatch.chdir(ROOT)
    for method in ("before_instantiate_classes", "instantiate_classes"):
        monkeypatch.setattr(CPTCLI, method, lambda self: None)
    monkeypatch.setattr(CPTCLI, "_run_subcommand", lambda self, verb: None)
    return lambda *args: hparams_of(CPTCLI(["fit", *args]).config["fit"])


def test_the_demos_say_what_their_files_say(hparams):
    assert hparams("-c", "configs/demo/grpo.yaml", "--seed_everything", "3") == {
        "objective": "RFT",
        "backbone": "tiny",
        "tuning": "full",
        "optimizer": "torch.optim.AdamW",
        "lr": 3e-5,
        "weight_decay": 0.0,
        "group_size": 8.0,
        "advantage": "grpo",
        "policy_loss": "ppo",
        "kl_coef": 0.0,
        "temperature": 1.0,
        "prompts_per_step": 16.0,
        "steps": "60",
    
        "seed": 3.0,
    }
    multitask = hparams("-c", "configs/demo/multitask.yaml", "--trainer.precision", "bf16-mixed")
    assert multitask["stages"] == "word2+bars2+polygon2+single+digit2"
    assert multitask["precision"] == "bf16-mixed" and "group_size" not in multitask


def test_every_option_of_the_table_is_one_that_some_run_has(hparams):
    """None is misspelled: together these runs fill every column."""
    rft = hparams("-c", "configs/demo/grpo.yaml", "-c", "configs/filter/rif.yaml", "-c", "configs/methods/ewc.yaml")
    replay = ["-c", "configs/methods/replay.yaml", "--data.passes", "{word2: 1, bars2: 2}", "--data.style", "direct"]
    sft = hparams(
        "-c", "configs/demo/sft.yaml", *replay, "--data.target", "{answer}", "--trainer.precision", "bf16-mixed"
    )
    stages = hparams("-c", "configs/demo/sft.yaml", "--data.stages", "[word2, [bars2, single]]")
    assert rft["methods"] == "EWC" and rft["filter"] == "solvable"
    assert sft["passes"] == "word2=1, bars2=2" and stages["stages"] == "word2, bars2+single"
    assert set(rft) | set(sft) | set(stages) == {*NUMBERS, *TEXTS} - {"rollouts"}
