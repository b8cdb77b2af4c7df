"""What a task did to the weights, read off its checkpoints; with LoRA off weights that PEFT merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpt_lightning.callbacks import WeightChange
from cpt_lightning.models import Backbone
from cpt_lightning.models.adapted_layers import merge_into_base
from cpt_lightning.models.adapters import Lora
from cpt_lightning.modules import SFT
from cpt_lightning.rollouts import Sampling
from tests.callbacks.analysis.test_gradient_risk import fit
from tests.fakes import KillAt, Killed
from tests.training import sgd

LORAS = {"shared": Lora(rank=4), "renewed": Lora(rank=4, along_stream="renewed"), "dora": Lora(rank=4, use_dora=True)}


def module_of(folder: str, tuning: str) -> SFT:
    options = {} if tuning == "full" else {"tuning": "lora", "lora": LORAS[tuning]}
    return SFT(backbone=Backbone(folder, **options), optimizer=sgd, evaluation=Sampling(2, temperature=0.0))


def read(folder: Path) -> list[dict]:
    record = json.loads((folder / "weight_change.json").read_text())
    assert record["version"] == 1
    return record["measurements"]


def naive(before: Tensor, now: Tensor) -> dict[str, float]:
    by = now - before
    return {
        "norm": by.norm().item(),
        "relative_norm": (by.norm() / before.norm()).item(),
        "changed_fraction": (before.to(torch.bfloat16) != now.to(torch.bfloat16)).double().mean().item(),
    }


def naive_rank(change: Tensor) -> float:
    """By the eigenvalues of its Gram matrix."""
    values = torch.linalg.eigvalsh(change.double() @ change.double().T).clamp_min(0).sqrt()
    return torch.distributions.Categorical(values).entropy().exp().item()


def test_full_tuning_against_the_checkpoints_of_two_tasks(tmp_path, small_folder, caplog):
    module = module_of(small_folder, "full")
    with caplog.at_level("INFO"):
        fit(tmp_path, module, [WeightChange("q_proj|down_proj")])
    assert "WeightChange: 2 measurements in weight_change.json, " in caplog.text
    states = [torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("1_bars2.ckpt", "2_facts.ckpt")]
    before, now = (torch.cat([state[name].flatten() for name in dict(module.named_parameters())]) for state in states)
    first, second = read(tmp_path)
    assert (first["stage"], first["name"], second["stage"], second["name"]) == (1, "bars2", 2, "facts")
    assert second["num_weights"] == len(now)
    expected = naive(before, now)
    assert 0.01 < expected["changed_fraction"] < 0.99
    assert {name: second[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    ranks = second["effective_ranks"]
    assert len(ranks) == 2 * 2 + 2, "two layers of the language model; gated MLPs of two blocks of the vision tower"
    for name, rank in ranks.items():
        change = states[1][name] - states[0][name]
        if change.any():
            assert rank == pytest.approx(naive_rank(change), rel=1e-2), name
    assert second["effective_rank"] == pytest.approx(sum(ranks.values()) / len(ranks))


@pytest.mark.parametrize("tuning", ["shared", "renewed"])
def test_with_lora_the_weights_under_the_adapters_count(tmp_path, small_folder, tuning):
    """After the first task: the merged weights against those of the base. A product of rank 4 has at most that."""
    module = module_of(small_folder, tuning)
    fit(tmp_path, module, [WeightChange("down_proj")], max_epochs=1)
    base = module.load_model()
    merge_into_base(module.model)
    merged = dict(module.model.named_parameters())
    names = [name for name, _ in base.named_parameters() if name.endswith("base_layer.weight")]
    before, now = (
        torch.cat([weights[name].detach().flatten() for name in names])
        for weights in (dict(base.named_parameters()), merged)
    )
    (found,) = read(tmp_path)
    assert found["num_weights"] == len(now)
    expected = naive(before, now)
    assert expected["norm"] > 1e-3
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert len(found["effective_ranks"]) == 2
    assert all(1 <= rank <= 4.01 for rank in found["effective_ranks"].values())


def test_a_renewed_adapter_starts_from_nothing(tmp_path, small_folder):
    """Of the second task, too, the change has rank 4 at most: not what the first task's adapter did beside it."""
    fit(tmp_path, module_of(small_folder, "renewed"), [WeightChange()])
    assert all(1 <= rank <= 4.01 for rank in read(tmp_path)[1]["effective_ranks"].values())


def test_a_killed_run_has_the_same_figures(tmp_path, small_folder):
    tuning = "shared"
    fit(tmp_path / "whole", module_of(small_folder, tuning), [WeightChange()])
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        fit(killed, module_of(small_folder, tuning), [WeightChange(), KillAt(1, batch=2)])
    fit(killed, module_of(small_folder, tuning), [WeightChange()], resume=True)
    assert (killed / "weight_change.json").read_text() == (tmp_path / "whole" / "weight_change.json").read_text()


def test_what_cannot_be_measured_is_refused(tmp_path, small_folder):
    with pytest.raises(ValueError, match=r"WeightChange: matrices='\(' is no regular expression"):
        WeightChange("(")
    with pytest.raises(ValueError, match="WeightChange: matrices='none' is in the name of no trained matrix; one of"):
        fit(tmp_path, module_of(small_folder, "full"), [WeightChange("none")])
    with pytest.raises(ValueError, match="not the sum of a weight and a product"):
        fit(tmp_path, module_of(small_folder, "dora"), [WeightChange()])
    with pytest.raises(ValueError, match="WeightChange: the checkpoint was measured with matrices='a', now it is None"):
        WeightChange(None).load_state_dict(WeightChange("a").state_dict())
