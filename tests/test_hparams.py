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


def test_a_command_line_is_told_by_a_few_options_and_none_of_them_is_misspelled(hparams):
    """Together the two runs fill every column, but for ``rollouts``, which needs a file and excludes ``target``."""
    rft = hparams("-c", "configs/demo/grpo.yaml", "-c", "configs/filter/rif.yaml", "-c", "configs/methods/ewc.yaml")
    assert rft == {
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
        "filter": "solvable",
        "methods": "EWC",
        "seed": 0.0,
    }
    how = ["--data.passes", "{word2: 1, bars2: 0.5}", "--data.style", "direct", "--data.target", "{answer}"]
    further = ["--data.stages", "[word2, [bars2, single]]", "--trainer.precision", "bf16-mixed", "--seed_everything=3"]
    sft = hparams("-c", "configs/demo/sft.yaml", "-c", "configs/methods/replay.yaml", *how, *further)
    assert sft["passes"] == "word2=1, bars2=0.5" and sft["stages"] == "word2, bars2+single"
    assert sft["precision"] == "bf16-mixed" and sft["seed"] == 3.0
    assert "group_size" not in sft and "filter" not in sft
    assert set(rft) | set(sft) == {*NUMBERS, *TEXTS} - {"rollouts"}
