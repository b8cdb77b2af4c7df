"""The Fisher information against Hessians, the risk by hand and by autograd, what must not be touched, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from cpt_lightning.callbacks import L2, GradientRisk
from cpt_lightning.callbacks.methods.fisher import diagonal_fisher, gradient_risk, own_answers, squared_norm
from cpt_lightning.data import TaskStream
from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import Lora
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.rollouts import Sampling
from cpt_lightning.rollouts.sampling import keyed_generator
from cpt_lightning.tasks import Task, ToyWorld
from cpt_lightning.types import Batch
from tests.fakes import KillAt, Killed, LinearModule, make_trainer, number_stream
from tests.training import sgd

RISK = {"num_rows": 3, "max_new_tokens": 6}


class Softmax(LinearModule):
    """Draws its answers from what it believes."""

    def drawn(self, batch: Batch, sampling, *key) -> Batch:
        odd = self.logits(batch).softmax(dim=1)[:, 1]
        draws = torch.rand(len(batch), generator=keyed_generator("cpu", *key)) < odd
        return Batch(batch.prompts, self.processor.encode_targets([str(int(draw)) for draw in draws]))


def softmax_rows(module: LinearModule, num_rows: int, repeats: int = 1) -> Batch:
    stream = number_stream()
    stream.processor = module.processor
    batch = stream.rows_of_stage(0, num_rows)
    return batch.select([row for row in range(num_rows) for _ in range(repeats)])


def exact_hessian(module: LinearModule, batch: Batch) -> Tensor:
    """Diagonal, for the weights, of the Hessian of the mean negative log-likelihood: it has no labels in it."""
    features = torch.sin(batch.prompts.input_ids[:, -1:] * torch.arange(1.0, 5.0))
    labels = torch.zeros(len(batch), dtype=torch.long)

    def loss(weight: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(features @ weight.T + module.layer.bias, labels)

    hessian = torch.autograd.functional.hessian(loss, module.layer.weight.detach())
    size = module.layer.weight.numel()
    return hessian.reshape(size, size).diagonal().view_as(module.layer.weight)


def test_the_fisher_information_of_own_samples_is_the_hessian_of_a_softmax_regression():
    """Without bias or sampling noise at p = (1/4, 3/4): of four equal rows one is answered 0 and three 1. That is
    logits that differ by log 3 for every row: no weights, a bias."""
    module = LinearModule()
    torch.nn.init.zeros_(module.layer.weight)
    module.layer.bias.data = torch.tensor([0.0, 3.0]).clamp_min(1).log()
    batch = softmax_rows(module, num_rows=5, repeats=4)
    batch = Batch(batch.prompts, module.processor.encode_targets(["0", "1", "1", "1"] * 5))
    fisher = diagonal_fisher(module, batch)
    torch.testing.assert_close(fisher["layer.weight"], exact_hessian(module, batch))
    torch.testing.assert_close(fisher["layer.bias"], torch.tensor([3 / 16, 3 / 16]))


def test_drawn_answers_give_the_fisher_information_and_references_do_not():
    """400 draws of each of 3 rows: within 15 % of the Hessian."""
    module = Softmax()
    torch.nn.init.normal_(module.layer.weight)
    batch = softmax_rows(module, num_rows=3, repeats=400)
    exact = exact_hessian(module, batch)
    own = diagonal_fisher(module, own_answers(module, batch, Sampling(), 1))["layer.weight"]
    torch.testing.assert_close(own, exact, rtol=0.15, atol=0.0)
    of_references = diagonal_fisher(module, batch)["layer.weight"]
    assert ((of_references - exact).abs() > 0.3 * exact).any()


def test_the_risk_is_twice_the_divergence_that_a_small_step_makes():
    """Of one weight, so that nothing lies beside the diagonal: KL(before || after) = R(step) / 2, to second order."""
    module = Softmax()
    torch.nn.init.normal_(module.layer.weight)
    batch = softmax_rows(module, num_rows=3)
    exact = {"layer.weight": exact_hessian(module, batch)}
    step = torch.zeros(2, 4)
    step[1, 2] = 1e-2
    before = module.logits(batch).log_softmax(dim=1).detach().double()
    module.layer.weight.grad, module.layer.bias.requires_grad = step, False
    risk = gradient_risk(module, exact).item()
    module.layer.weight.data += step
    after = module.logits(batch).log_softmax(dim=1).detach().double()
    divergence = (before.exp() * (before - after)).sum(dim=1).mean().item()
    assert risk / 2 == pytest.approx(divergence, rel=0.02)


def test_risk_and_norm_by_hand():
    """F = [1, 2, 0, 5], g = [3, 1, 7, 0]: 9 + 2 + 0 + 0 = 11; |g|^2 = 59. A weight without a gradient adds nothing."""
    module = L.LightningModule()
    module.one, module.two = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    module.one.grad = torch.tensor([3.0, 1.0, 7.0, 0.0])
    fisher = {"one": torch.tensor([1.0, 2.0, 0.0, 5.0]), "two": torch.ones(4)}
    assert gradient_risk(module, fisher).item() == 11
    assert squared_norm(module).item() == 59


# -- in a run --------------------------------------------------------------------------------------------------------


def task(family: str) -> Task:
    return Task(ToyWorld(family), num_train=6, num_test=4, num_val=3)


def toy_stream() -> TaskStream:
    """Two tasks, with images and without, and a probe; three steps each."""
    words = {"bars2": task("bars2"), "facts": task("facts")}
    return TaskStream(words, {"colour": task("colour")}, prompts_per_step=2, steps=3)


def fit(folder: Path, module: L.LightningModule, callbacks=(), resume: bool = False, **options) -> None:
    torch.manual_seed(0)  # as cpt does: random draws of the run do not depend on what ran before
    stream = toy_stream()
    trainer = make_trainer(folder, stream, callbacks=callbacks, **options)
    if not resume:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=folder / "last.ckpt" if resume else None)


def sft(folder: str, **options) -> SFT:
    """With a limit that every gradient of the small model exceeds."""
    lora = Lora(rank=4, dropout=0.3, along_stream="renewed")
    options = {"max_grad_norm": 0.5, "optimizer": sgd, "evaluation": Sampling(2, temperature=0.0)} | options
    return SFT(backbone=Backbone(folder, tuning="lora", lora=lora), **options)


def rft(folder: str) -> RFT:
    return RFT(
        backbone=Backbone(folder), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), group_size=4,
        updates_per_rollout=2, sampling=Sampling(6), evaluation=Sampling(2), kl_coef=0.1,
    )  # fmt: skip


def read(folder: Path) -> dict:
    record = json.loads((folder / "gradient_risk.json").read_text())
    assert record["version"] == 1
    return record


class Spy(L.Callback):
    """Computes what is expected of plain SGD from the weights alone: gradient = what a step changed / learning rate."""

    def __init__(self, risk: GradientRisk) -> None:
        self.risk, self.expected = risk, []

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        after = dict(pl_module.named_parameters())
        gradient = {name: (value - after[name].detach()) / 0.1 for name, value in self.before.items()}
        flat = {
            kind: torch.cat([fisher[name].flatten() for name in gradient]) for kind, fisher in self.risk.kept.items()
        }
        g = torch.cat([value.flatten() for value in gradient.values()])
        found = {kind: (g @ (fisher * g)).item() for kind, fisher in flat.items()}
        found |= {f"{kind}_per_weight": found[kind] / (g @ g * fisher.mean()).item() for kind, fisher in flat.items()}
        self.expected.append({"grad_norm": g.norm().item(), **found})


def test_the_gradient_is_the_one_that_the_optimizer_steps_with(tmp_path, small_folder):
    """Read off the weights: clipped, and with the penalty of a callback that comes later."""
    risk = GradientRisk(**RISK)
    spy = Spy(risk)
    fit(tmp_path, sft(small_folder), [risk, L2(10.0), spy])
    found = read(tmp_path)["measurements"]
    assert [(row["stage"], row["step"]) for row in found] == [(stage, step) for stage in (1, 2) for step in (1, 2, 3)]
    assert [set(row) for row in spy.expected] == [set(row) - {"stage", "step"} for row in found]
    assert ("earlier" in found[0], "earlier" in found[-1]) == (False, True)
    for row, expected in zip(found, spy.expected, strict=True):
        assert row["grad_norm"] <= 0.5 + 1e-4
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-2), name
            assert value > 0


def test_the_information_is_that_of_held_out_rows_of_earlier_tasks_and_probes(tmp_path, small_folder):
    """The mean over tasks of the mean over rows, here of one earlier task, at the weights at which the task begins."""

    class Again(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 0 and trainer.current_epoch == 1:
                stream = trainer.datamodule
                for kind, name, number in (("earlier", "bars2", 0), ("probes", "colour", 2)):
                    batch = pl_module.drawn(stream.rows_of_evaluation(name, 3), Sampling(6), number)
                    for weight, value in diagonal_fisher(pl_module, batch).items():
                        torch.testing.assert_close(risk.kept[kind][weight], value)
                        self.largest = max(getattr(self, "largest", 0.0), value.max().item())

    risk, again = GradientRisk(**RISK), Again()
    fit(tmp_path, sft(small_folder), [risk, again])
    assert again.largest > 0
    fishers = read(tmp_path)["fishers"]
    assert [(found["stage"], found["of"], found["names"]) for found in fishers] == [
        (1, "probes", ["colour"]), (2, "earlier", ["bars2"]), (2, "probes", ["colour"]),
    ]  # fmt: skip
    everything = torch.cat([value.flatten() for value in risk.kept["probes"].values()])
    assert fishers[-1]["mean"] == pytest.approx(everything.mean().item(), rel=1e-4)


@pytest.mark.parametrize("make", [sft, rft])
def test_a_killed_run_has_the_same_figures_and_no_run_is_changed_by_them(tmp_path, small_folder, make):
    fit(tmp_path / "without", make(small_folder))
    fit(tmp_path / "whole", make(small_folder), [GradientRisk(**RISK)])
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        fit(killed, make(small_folder), [GradientRisk(**RISK), KillAt(1, batch=2)])
    assert len(read(killed)["measurements"]) == 3
    fit(killed, make(small_folder), [GradientRisk(**RISK)], resume=True)
    assert (killed / "gradient_risk.json").read_text() == (tmp_path / "whole" / "gradient_risk.json").read_text()
    without, whole = (
        torch.load(tmp_path / run / "last.ckpt", weights_only=True)["state_dict"] for run in ("without", "whole")
    )
    assert without.keys() == whole.keys()
    assert all(torch.equal(without[name], whole[name]) for name in without)
    rows = read(killed)["measurements"]
    assert len(rows) == 6
    assert all(("reward_variance" in row) == (make is rft) for row in rows)


def test_every_second_optimizer_step_is_measured(tmp_path, small_folder):
    fit(tmp_path, sft(small_folder), [GradientRisk(**RISK, with_probes=False, every_n_steps=2)])
    assert [(row["stage"], row["step"]) for row in read(tmp_path)["measurements"]] == [(2, 2)]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_rows": 0}, {"max_new_tokens": 0}, {"every_n_steps": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=rf"GradientRisk: {next(iter(options))}=0 must be at least 1"):
        GradientRisk(**options)


def test_a_record_is_not_continued_with_other_rows():
    with pytest.raises(ValueError, match="GradientRisk: the checkpoint was measured with num_rows=8, now it is 4"):
        GradientRisk(num_rows=4).load_state_dict(GradientRisk().state_dict())


@pytest.mark.parametrize("stages", [["facts"], ["facts", ["bars2", "facts"]]])
def test_a_run_without_anything_before_its_tasks_is_refused(tmp_path, small_folder, stages):
    names = ["bars2", "facts"] if len(stages) > 1 else ["facts"]
    stream = TaskStream({name: task(name) for name in names}, stages=stages)
    trainer = make_trainer(tmp_path, stream, callbacks=[GradientRisk()])
    with pytest.raises(ValueError, match="GradientRisk: no stage comes after .* add data.probes"):
        trainer.fit(sft(small_folder), stream)


def test_an_adapter_for_each_task_is_refused(tmp_path, small_folder):
    module = sft(small_folder)
    module.backbone.lora.along_stream = "per_task"
    with pytest.raises(ValueError, match="GradientRisk: .*along_stream=per_task"):
        fit(tmp_path, module, [GradientRisk()])
