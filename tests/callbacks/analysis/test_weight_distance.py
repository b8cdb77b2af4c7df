"""How far the weights are from the base's, read off checkpoints; F computed row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cpt_lightning.callbacks import WeightDistance
from cpt_lightning.models.adapted_layers import merge_into_base
from cpt_lightning.rollouts import Sampling, completion_logprobs
from tests.callbacks.analysis.test_gradient_risk import fit, toy_stream
from tests.callbacks.analysis.test_weight_change import module_of
from tests.fakes import KillAt, Killed


def read(folder: Path) -> list[dict]:
    record = json.loads((folder / "weight_distance.json").read_text())
    assert (record["version"], record["num_rows"]) == (1, 2)
    return record["measurements"]


def naive_fisher(module, stream) -> dict[str, torch.Tensor]:
    """Of the weights as they are: a row at a time, autograd of the whole answer's log-probability, squared."""
    total = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    rows = 0
    for number, probe in enumerate(stream.probe_names):
        batch = module.drawn(stream.rows_of_evaluation(probe, 2), Sampling(64), number)
        for row in range(len(batch)):
            prompt, answer = batch.select([row]).prompts, batch.select([row]).targets
            value = completion_logprobs(module.model, prompt, answer).sum()
            gradients = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += 0 if gradient is None else gradient.square()
            rows += 1
    return {name: value / rows for name, value in total.items()}


def test_both_distances_against_the_checkpoints_of_two_tasks(tmp_path, small_folder):
    module = module_of(small_folder, "full")
    fit(tmp_path, module, [WeightDistance(2)])
    untrained = module_of(small_folder, "full")
    untrained.configure_model()
    untrained.eval()
    base = {name: weight.detach().clone() for name, weight in untrained.named_parameters()}
    stream = toy_stream()
    stream.processor = untrained.processor
    fisher = naive_fisher(untrained, stream)
    found = read(tmp_path)
    assert [(row["stage"], row["name"]) for row in found] == [(1, "bars2"), (2, "facts")]
    for row, checkpoint in zip(found, ("1_bars2.ckpt", "2_facts.ckpt"), strict=True):
        now = torch.load(tmp_path / checkpoint, weights_only=True)["state_dict"]
        squares = {name: (now[name] - base[name]).double().square() for name in base}
        assert row["distance"] == pytest.approx(sum(each.sum().item() for each in squares.values()) ** 0.5, rel=1e-4)
        expected = sum((fisher[name] * squares[name]).sum().item() for name in base) / 2
        assert row["fisher_distance"] == pytest.approx(expected, rel=1e-3) and expected > 0
    assert found[1]["distance"] != pytest.approx(found[0]["distance"], rel=1e-3)


def test_with_lora_the_distance_is_of_the_weights_under_the_adapters(tmp_path, small_folder):
    module = module_of(small_folder, "shared")
    fit(tmp_path, module, [WeightDistance(2)])
    base = dict(module.load_model().named_parameters())
    merge_into_base(module.model)
    merged = dict(module.model.named_parameters())
    names = [name for name in base if name.endswith("base_layer.weight")]
    expected = sum((merged[name] - base[name]).detach().double().square().sum().item() for name in names) ** 0.5
    assert read(tmp_path)[1]["distance"] == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    assert read(tmp_path)[1]["fisher_distance"] > 0


def test_measuring_changes_nothing_and_a_killed_run_has_the_same_figures(tmp_path, small_folder):
    fit(tmp_path / "bare", module_of(small_folder, "full"))
    fit(tmp_path / "whole", module_of(small_folder, "full"), [WeightDistance(2)])
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        fit(killed, module_of(small_folder, "full"), [WeightDistance(2), KillAt(1, batch=2)])
    fit(killed, module_of(small_folder, "full"), [WeightDistance(2)], resume=True)
    assert (killed / "weight_distance.json").read_text() == (tmp_path / "whole/weight_distance.json").read_text()
    ends = [torch.load(tmp_path / run / "last.ckpt", weights_only=True)["state_dict"] for run in ("bare", "whole")]
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def test_without_rows_there_is_no_distance_by_f(tmp_path, small_folder):
    fit(tmp_path, module_of(small_folder, "full"), [WeightDistance(num_rows=0)], max_epochs=1)
    (row,) = json.loads((tmp_path / "weight_distance.json").read_text())["measurements"]
    assert row["distance"] > 0 and "fisher_distance" not in row


def test_what_cannot_be_measured_is_refused(tmp_path, small_folder):
    with pytest.raises(ValueError, match="num_rows=-1 must not be negative"):
        WeightDistance(-1)
    with pytest.raises(ValueError, match="WeightDistance: with backbone.lora.along_stream=renewed"):
        fit(tmp_path, module_of(small_folder, "renewed"), [WeightDistance()])
    run = tmp_path / "run"
    fit(run, module_of(small_folder, "full"), [WeightDistance(2)], max_epochs=1)
    with pytest.raises(ValueError, match="num_rows"):
        fit(run, module_of(small_folder, "full"), [WeightDistance(3)], resume=True)
