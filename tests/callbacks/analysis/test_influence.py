"""Influence against naive forwards and gradients; for every objective; what it must not touch; how it resumes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from cpt_lightning.callbacks import Influence
from cpt_lightning.data import TaskStream
from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import Lora
from cpt_lightning.models.weights import trained
from cpt_lightning.modules import RFT, SFT, MultiTask
from cpt_lightning.rewards import Reward, RewardPart
from cpt_lightning.rollouts import Sampling
from cpt_lightning.tasks import Task, ToyWorld
from tests.fakes import KillAt, Killed, make_trainer
from tests.naive import naive_logits

TUNINGS = {
    "full": {},
    "lora": {"tuning": "lora"},
    "dropout": {"tuning": "lora", "lora": Lora(dropout=0.3)},
    "renewed": {"tuning": "lora", "lora": Lora(along_stream="renewed")},
    "per_task": {"tuning": "lora", "lora": Lora(along_stream="per_task")},
}


def parity(completion: str, gold: str | list[str]) -> float:
    """Something in which a random model's answers differ."""
    return float(len(completion) % 2)


def toy_stream(**options) -> TaskStream:
    """Two tasks, with images and without, and a probe; three steps each."""
    reward = Reward(extra={"parity": RewardPart(parity, weight=1.0)})
    words = {
        family: Task(ToyWorld(family), num_train=6, num_test=count, reward=reward)
        for family, count in {"bars2": 5, "facts": 4, "colour": 3}.items()
    }
    probes = {"colour": words.pop("colour")}
    return TaskStream(words, probes, **{"prompts_per_step": 2, "steps": 3} | options)


def fit(folder: Path, module: L.LightningModule, callbacks=(), resume: bool = False, **options) -> None:
    torch.manual_seed(0)  # as cpt does: random draws of the run do not depend on what ran before
    stream = toy_stream()
    trainer = make_trainer(folder, stream, callbacks=callbacks, **options)
    if not resume:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=folder / "last.ckpt" if resume else None)


def sft(folder: str, tuning: str = "full", lr: float = 0.1, **options) -> SFT:
    return SFT(
        backbone=Backbone(folder, **TUNINGS[tuning]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        evaluation=Sampling(2, temperature=0.0),
        **options,
    )


def rft(folder: str, tuning: str = "full", make: type[RFT] = RFT, **options) -> RFT:
    return make(
        backbone=Backbone(folder, **TUNINGS[tuning]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        **{"group_size": 4, "sampling": Sampling(4, temperature=0.7), "evaluation": Sampling(2)} | options,
    )


def read(folder: Path) -> list[dict]:
    record = json.loads((folder / "influence.json").read_text())
    assert record["version"] == 1
    return record["measurements"]


# -- what is measured --------------------------------------------------------------------------------------------------


class Moments(L.Callback):
    """Keeps the model as it was before and after each update, what the update saw, and what the base was asked."""

    def __init__(self, influence: Influence) -> None:
        self.influence = influence
        self.before, self.after, self.batches = [], [], []

    def on_train_start(self, *_) -> None:
        self.asked = self.influence._asked

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.before.append(copy.deepcopy(pl_module.model).eval())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, *_) -> None:
        self.batches.append(batch)
        self.after.append(copy.deepcopy(pl_module.model).eval())


def logits_of(model, prompts, completions) -> list[Tensor]:
    return list(naive_logits(model, prompts, completions))


def flat_gradient(value: Tensor, model) -> Tensor:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    found = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    return torch.cat([gradient.flatten() for gradient in found])


def weights_of(model) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_update_of_sft_against_naive_forwards_and_gradients(tmp_path, small_folder, tuning):
    """The first of the second task, with bars2 as prior knowledge beside the probe."""
    influence = Influence(num_rows=3, max_new_tokens=5, every_n_steps=1, exact=True)
    moments = Moments(influence)
    fit(tmp_path, sft(small_folder, tuning, lr=0.1), [influence, moments])
    found = read(tmp_path)
    assert [(row["stage"], row["step"], list(row["on"])) for row in found] == [
        (stage, step, names) for stage, names in ((1, ["colour"]), (2, ["bars2", "colour"])) for step in (1, 2, 3)
    ]
    row, before, after, batch = (each[3] for each in (found, moments.before, moments.after, moments.batches))
    assert row["lr"] == 0.1

    # G: the loss is the mean over rows of the mean over tokens.
    tables, lengths = logits_of(before, batch.prompts, batch.targets), batch.targets.lengths.tolist()
    ids = [batch.targets.ids[number, :length] for number, length in enumerate(lengths)]
    losses = [torch.nn.functional.cross_entropy(table, y) for table, y in zip(tables, ids, strict=True)]
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, tables, retain_graph=True)
    gradient_squared = sum(each.square().sum() for each in gradients).item()
    assert row["gradient_squared"] == pytest.approx(gradient_squared, rel=1e-4)
    downhill = -flat_gradient(loss, before)

    base = Backbone(small_folder).load_model().eval()
    tables = logits_of(base, batch.prompts, batch.targets)
    nats = sum(torch.nn.functional.cross_entropy(t, y, reduction="sum") for t, y in zip(tables, ids, strict=True))
    assert row["base_perplexity"] == {"facts": pytest.approx((nats / sum(lengths)).exp().item(), rel=1e-4)}

    moved = weights_of(after) - weights_of(before)
    for name, measured in row["on"].items():
        expected = naive_influence(before, after, moments.asked[name], gradient_squared, downhill, moved)
        assert measured["num_rows"] == 3
        for key, value in expected.items():
            assert measured[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
    assert row["on"]["colour"]["change_squared"] > 1e-5


def naive_influence(before, after, asked, gradient_squared: float, downhill: Tensor, moved: Tensor) -> dict:
    rows = []
    pairs = zip(*(logits_of(model, asked.prompts, asked.answers) for model in (before, after)), strict=True)
    for number, (old, new) in enumerate(pairs):
        ids = asked.answers.ids[number, : len(old), None]
        old_logps, new_logps = old.log_softmax(dim=1), new.log_softmax(dim=1)
        jacobian = torch.eye(old.shape[1]) - old_logps.exp()[:, None, :]
        squared = (new_logps - old_logps).square().sum()
        gradient = flat_gradient(old_logps.gather(1, ids).sum(), before)
        change = (new_logps - old_logps).gather(1, ids).sum()
        rows.append(
            {
                "log_prob_change": change.item(),
                "rise_fraction": float(change > 0),
                "change_squared": squared.item(),
                "jacobian_squared": jacobian.square().sum().item(),
                "lbk": (squared / jacobian.square().sum() / gradient_squared).item(),
                "cosine": torch.nn.functional.cosine_similarity(gradient, downhill, dim=0).item(),
                "first_order_change": (gradient @ moved).item(),
            }
        )
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


class Held(L.Callback):
    """Where the output matrices lie that an update is measured by, of each update that is about to be made."""

    def __init__(self, influence: Influence) -> None:
        self.influence = influence
        self.matrices = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        update = self.influence._update
        self.matrices.append({scores.weight.data_ptr() for scores in update.before.values()})
        self.matrices[-1] |= {pl_module.model.get_output_embeddings().weight.data_ptr()}


@pytest.mark.parametrize("tuning, num_copies", [("full", 1), ("lora", 0)])
def test_all_that_is_scored_before_an_update_shares_a_copy_of_the_output_matrix(
    tmp_path, small_folder, tuning, num_copies
):
    """A gigabyte each in a large model; one that is frozen needs no copy. The second task has two names behind it."""
    influence = Influence(num_rows=2, max_new_tokens=2, every_n_steps=1)
    held = Held(influence)
    fit(tmp_path, sft(small_folder, tuning), [influence, held])
    assert [len(matrices) for matrices in held.matrices] == [1 + num_copies] * 6


class Compare(L.Callback):
    """At an update that is about to be made: its gradient against that of what Influence took for its objective."""

    def __init__(self, influence: Influence) -> None:
        self.influence = influence
        self.differences = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        update = self.influence._update
        if update is None:
            return
        parameters = list(trained(pl_module).values())
        with torch.enable_grad():
            found = torch.autograd.grad(update.learned.objective(pl_module.model), parameters, allow_unused=True)
        pairs = [(p.grad, -g) for p, g in zip(parameters, found, strict=True) if p.grad is not None and g is not None]
        scale = max(real.abs().max() for real, _ in pairs)
        self.differences.append(max((real - ours).abs().max() / scale for real, ours in pairs).item())


MULTI = {"make": MultiTask, "objectives": {"facts": "sft"}, "objective": "rft"}


@pytest.mark.parametrize(
    "make, options, trainer_options",
    [
        (sft, {"reduction": "token_mean"}, {"accumulate_grad_batches": 2}),
        (rft, {}, {}),
        (rft, {"passes_per_rollout": 2, "micro_batch_prompts": 1, "kl_coef": 0.1}, {}),
        (rft, {"policy_loss": "cispo", "clip_low": 1.0, "reduction": "constant"}, {}),
        (rft, MULTI, {}),
    ],
)
def test_what_is_listened_to_has_the_gradient_of_the_update(tmp_path, small_folder, make, options, trainer_options):
    """Of each update, whatever the objective: micro-batches, temperature, advantages, penalties and accumulation."""
    influence = Influence(num_rows=1, max_new_tokens=2, every_n_steps=1)
    compare = Compare(influence)
    fit(tmp_path, make(small_folder, **options), [influence, compare], **trainer_options)
    assert len(compare.differences) == len(read(tmp_path)) >= 4
    assert max(compare.differences) < 1e-4
    assert all(row["on"]["colour"]["lbk"] > 0 for row in read(tmp_path))
    assert all(perplexity > 1 for row in read(tmp_path) for perplexity in row["base_perplexity"].values())


def test_every_third_update_is_measured_across_batches(tmp_path, small_folder):
    """Three batches of two updates: the third is the first of the second batch."""
    fit(tmp_path, rft(small_folder, passes_per_rollout=2, kl_coef=0.1), [Influence(1, 2, every_n_steps=3)])
    assert [(row["stage"], row["step"]) for row in read(tmp_path)] == [(1, 3), (1, 6), (2, 3), (2, 6)]


@pytest.mark.parametrize("lr, low, high", [(1e-4, 0.0, 0.02), (1e-2, 0.05, 1.0)])
def test_influence_is_symmetric_for_small_steps_alone(tmp_path, small_folder, lr, low, high):
    """And then the real change is that of first order."""
    module = sft(small_folder, lr=lr, max_grad_norm=None)
    fit(tmp_path, module, [Influence(3, 5, every_n_steps=1, exact=True)])
    for name, measured in read(tmp_path)[0]["on"].items():
        assert low <= measured["asymmetry"] <= high, name
        off = abs(measured["log_prob_change"] / measured["first_order_change"] - 1)
        assert (off < 0.02) == (high < 1)


def test_nothing_changes_without_a_learning_rate(tmp_path, small_folder):
    fit(tmp_path, sft(small_folder, lr=0.0), [Influence(2, 4, every_n_steps=2, exact=True)])
    for row in read(tmp_path):
        for values in row["on"].values():
            changes = ("log_prob_change", "change_squared", "lbk", "first_order_change", "asymmetry")
            assert [values[key] for key in changes] == [0.0] * 5
            assert values["cosine"] != 0


def test_the_adapter_of_another_task_is_out_of_reach(tmp_path, small_folder):
    fit(tmp_path, sft(small_folder, "per_task", lr=1.0), [Influence(2, 4, every_n_steps=3)])
    last = read(tmp_path)[-1]["on"]
    assert last["bars2"]["change_squared"] == 0.0
    assert last["colour"]["change_squared"] > 0


@pytest.mark.parametrize(
    "make, target, low, high",
    [
        (sft, "{answer}", 1e3, 1e9),
        (sft, "<think>{thought}</think><answer>{answer}</answer>", 1.1, 3),
        (rft, None, 1, 3),
    ],
)
def test_what_the_base_finds_surprising_is_neither_its_style_nor_its_own_answers(tmp_path, make, target, low, high):
    """The embedded base, which answers with <think>; bfloat16 is near enough."""
    stream = toy_stream(stages=["bars2"], steps=1, target=target)
    trainer = make_trainer(tmp_path, stream, [Influence(1, 2, every_n_steps=1)], precision="bf16-mixed")
    torch.manual_seed(0)
    module = make("tiny", **({"sampling": Sampling(24)} if make is rft else {}))
    trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    assert low < read(tmp_path)[0]["base_perplexity"]["bars2"] < high


# -- what must not change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, tuning, exact",
    [(sft, "dropout", True), (sft, "renewed", False), (rft, "full", True)],
)
def test_a_killed_run_has_the_same_record_and_no_run_is_changed_by_it(tmp_path, small_folder, make, tuning, exact):
    def influence() -> Influence:
        return Influence(2, 4, every_n_steps=1, exact=exact)

    fit(tmp_path / "without", make(small_folder, tuning))
    fit(tmp_path / "whole", make(small_folder, tuning), [influence()])
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        fit(killed, make(small_folder, tuning), [influence(), KillAt(1, batch=2)])
    whole_record = read(tmp_path / "whole")
    assert whole_record[:-1] == read(killed)
    (killed / "influence.json").unlink()
    fit(killed, make(small_folder, tuning), [influence()], resume=True)
    assert read(killed) == whole_record
    assert [row["step"] for row in whole_record][-3:] == [1, 2, 3]
    without, whole = (
        torch.load(tmp_path / run / "last.ckpt", weights_only=True)["state_dict"] for run in ("without", "whole")
    )
    assert without.keys() == whole.keys(), "the base is in no checkpoint"
    assert all(torch.equal(without[name], whole[name]) for name in without)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["num_rows", "max_new_tokens", "every_n_steps"])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=rf"Influence: {option}=0 must be at least 1"):
        Influence(**{option: 0})


@pytest.mark.parametrize(
    "make, options, message",
    [
        (sft, {"kl_coef": 0.1}, "Influence: the loss is held to a reference over the whole vocabulary"),
        (rft, {"kl_coef": 0.1, "kl_estimator": "full"}, "set model.init_args.kl_coef to 0"),
        (sft, {"tuning": "per_task"}, "Influence: exact=true with backbone.lora.along_stream=per_task"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, small_folder, make, options, message):
    stream = toy_stream()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, stream, [Influence(exact=True)]).fit(make(small_folder, **options), stream)
