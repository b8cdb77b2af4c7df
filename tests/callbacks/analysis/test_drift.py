"""Drift against closed forms and naive forwards, for every way of tuning; what it must not touch; how it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from cpt_lightning.callbacks import Drift, Influence
from cpt_lightning.callbacks.analysis.measuring import Measuring
from cpt_lightning.data import TaskStream
from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import Lora
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.rollouts import Sampling, sample_groups
from cpt_lightning.rollouts.sampling import row_generators
from cpt_lightning.tasks import Task, ToyWorld
from tests.fakes import KillAt, Killed, WordProcessor, make_trainer, number_stream
from tests.naive import naive_logits

TUNINGS = {
    "full": {},
    "lora": {"tuning": "lora"},
    "renewed": {"tuning": "lora", "lora": Lora(dropout=0.3, along_stream="renewed")},
    "per_task": {"tuning": "lora", "lora": Lora(along_stream="per_task")},
}


def toy_stream() -> TaskStream:
    """Two tasks, with images and without, and a probe; three steps each."""
    words = {
        family: Task(ToyWorld(family), num_train=6, num_test=count)
        for family, count in {"bars2": 5, "facts": 4, "colour": 3}.items()
    }
    probes = {"colour": words.pop("colour")}
    return TaskStream(words, probes, prompts_per_step=2, steps=3)


def fit(folder: Path, module: L.LightningModule, callbacks=(), resume: bool = False) -> TaskStream:
    torch.manual_seed(0)  # as cpt does: random draws of the run do not depend on what ran before
    stream = toy_stream()
    trainer = make_trainer(folder, stream, callbacks=callbacks)
    if not resume:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=folder / "last.ckpt" if resume else None)
    return stream


def sft(folder: str, tuning: str = "full", lr: float = 0.1) -> SFT:
    return SFT(
        backbone=Backbone(folder, **TUNINGS[tuning]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        evaluation=Sampling(2, temperature=0.0),
    )


def read(folder: Path) -> list[dict]:
    record = json.loads((folder / "drift.json").read_text())
    assert record["version"] == 1
    return record["measurements"]


class Keep(L.Callback):
    """Holds on to what the base was asked."""

    def __init__(self, drift: Drift) -> None:
        self.drift = drift

    def on_train_start(self, *_) -> None:
        self.asked = self.drift._asked


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_base_against_itself_is_at_exactly_no_distance(tmp_path, small_folder, tuning):
    """A learning rate of 0. Of each task so far and the probe, within the tasks and after them, as many rows as there
    are."""
    fit(tmp_path, sft(small_folder, tuning, lr=0.0), [Drift(num_rows=4, max_new_tokens=6, every_n_steps=2)])
    found = read(tmp_path)
    first, both = ["bars2", "colour"], ["bars2", "facts", "colour"]
    expected = [(stage, step, name) for stage, names in ((1, first), (2, both)) for step in (2, 3) for name in names]
    assert [(row["stage"], row["step"], row["name"]) for row in found] == expected
    assert {row["name"]: row["num_rows"] for row in found} == {"bars2": 4, "facts": 4, "colour": 3}
    kinds = ["forward_kl", "reverse_kl", "forward_kl_per_answer", "reverse_kl_per_answer", "total_variation"]
    assert {row[kind] for row in found for kind in kinds} == {0.0}
    assert {row["top1_agreement"] for row in found} == {1.0}


def test_answers_begin_as_those_of_evaluations(tmp_path, small_folder):
    """What is forced belongs to the prompts: no divergence is counted there."""
    module, keep = sft(small_folder), Keep(Drift(num_rows=2, max_new_tokens=6))
    module.evaluation = Sampling(2, temperature=0.0, prefix="<think></think><answer>")
    stream = fit(tmp_path, module, [keep.drift, keep])
    tokens = module.processor.encode_prefix(module.evaluation.prefix)
    for asked in keep.asked.values():
        assert asked.prompts.input_ids[:, -len(tokens) :].tolist() == [tokens] * 2
        assert asked.answers.ids.shape[1] <= 6
    batch = stream.rows_of_evaluation("facts", 2)
    drawn = module.drawn(batch, Sampling(6))
    assert drawn.prompts.input_ids[:, -len(tokens) :].tolist() == [tokens] * len(batch)


class Sharpen(L.Callback):
    """Multiplies all logits: the last norm's weight stands before the output matrix."""

    factor = 1.5

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.current_epoch == 0 and trainer.is_last_batch:
            pl_module.model.model.language_model.norm.weight.data.mul_(self.factor)


@torch.no_grad()
def test_logits_times_a_constant_have_a_divergence_in_closed_form(tmp_path, small_folder):
    """softmax(z) and softmax(c z) are an exponential family in c with log-partition A(c) = logsumexp(c z): KL(1 || c) =
    A(c) - A(1) - (c - 1) E_1[z] and KL(c || 1) = A(1) - A(c) - (1 - c) E_c[z]. The favourite stays."""
    module, drift, c = sft(small_folder, lr=0.0), Drift(num_rows=3, max_new_tokens=6), Sharpen.factor
    keep = Keep(drift)
    fit(tmp_path, module, [Sharpen(), drift, keep])
    base = module.load_model().eval()
    for row in read(tmp_path)[:2]:
        asked = keep.asked[row["name"]]
        z = torch.cat(list(naive_logits(base, asked.prompts, asked.answers))).double()
        mean = (z.softmax(dim=1) * z).sum(dim=1)
        forward = (c * z).logsumexp(dim=1) - z.logsumexp(dim=1) - (c - 1) * mean
        assert forward.mean() > 0.01
        assert row["forward_kl"] == pytest.approx(forward.mean().item(), rel=1e-4)
        assert row["forward_kl_per_answer"] == pytest.approx(forward.sum().item() / 3, rel=1e-4)
        variation = ((c * z).softmax(dim=1) - z.softmax(dim=1)).abs().sum(dim=1) / 2
        assert row["total_variation"] == pytest.approx(variation.mean().item(), rel=1e-4)
        assert row["top1_agreement"] == 1.0

        generators = row_generators("cpu", asked.prompts, module.seed)
        own = sample_groups(module.model, module.processor, asked.prompts, 1, Sampling(6), generators)
        assert not torch.equal(own.ids, asked.answers.ids), "otherwise both divergences have one text"
        z = torch.cat(list(naive_logits(base, asked.prompts, own))).double()
        mean = ((c * z).softmax(dim=1) * z).sum(dim=1)
        reverse = z.logsumexp(dim=1) - (c * z).logsumexp(dim=1) - (1 - c) * mean
        assert row["reverse_kl"] == pytest.approx(reverse.mean().item(), rel=1e-4)
        assert row["reverse_kl_per_answer"] == pytest.approx(reverse.sum().item() / 3, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tuning", TUNINGS)
def test_whatever_is_tuned_the_base_is_a_model_loaded_anew(tmp_path, small_folder, tuning):
    """After two tasks, against naive forwards of the trained model and of another that never was trained."""
    module, drift = sft(small_folder, tuning, lr=1.0), Drift(num_rows=4, max_new_tokens=6)
    keep = Keep(drift)
    stream = fit(tmp_path, module, [drift, keep])
    base = Backbone(small_folder).load_model().eval()
    module.model.eval()
    last = {row["name"]: row for row in read(tmp_path) if row["stage"] == stream.num_stages}
    assert list(last) == ["bars2", "facts", "colour"]
    for name, row in last.items():
        asked = keep.asked[name]
        with module.adapters_of(name):
            logits = torch.cat(list(naive_logits(module.model, asked.prompts, asked.answers)))
        expected = naive_kl(torch.cat(list(naive_logits(base, asked.prompts, asked.answers))), logits)
        assert expected > 1e-4
        assert row["forward_kl"] == pytest.approx(expected, rel=1e-3)


class KeepBases(L.Callback):
    """Holds on to the bases of other callbacks."""

    def __init__(self, *callbacks: Measuring) -> None:
        self.callbacks = callbacks

    def on_train_start(self, *_) -> None:
        self.bases = [callback._base for callback in self.callbacks]


def test_one_base_serves_all_callbacks_of_a_run_and_none_of_the_next(tmp_path, small_folder):
    """A second run of the same callbacks, as after one that failed and let go of nothing."""
    drift, influence = Drift(num_rows=2, max_new_tokens=4), Influence(num_rows=2, max_new_tokens=4)
    keep = KeepBases(drift, influence)
    fit(tmp_path / "one", sft(small_folder), [drift, influence, keep])
    first, same = keep.bases
    assert first is same and first.copy is not None and drift._base is influence._base is None
    drift._base = influence._base = first
    module = sft(small_folder)
    fit(tmp_path / "two", module, [drift, influence, keep])
    second, same = keep.bases
    assert second is same and second is not first and second.trained is module.model


def naive_kl(logits: Tensor, other: Tensor) -> float:
    """The mean of KL(softmax(logits) || softmax(other)), by torch."""
    one, two = (each.double().log_softmax(dim=1) for each in (logits, other))
    return torch.nn.functional.kl_div(two, one, log_target=True, reduction="batchmean").item()


def rft(folder: str, tuning: str) -> RFT:
    return RFT(
        backbone=Backbone(folder, **TUNINGS[tuning]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        group_size=2,
        sampling=Sampling(4),
        evaluation=Sampling(2),
        kl_coef=0.1,
    )


@pytest.mark.parametrize("make, tuning", [(sft, "full"), (sft, "lora"), (sft, "renewed"), (rft, "full")])
def test_a_killed_run_has_the_same_figures_and_no_run_is_changed_by_them(tmp_path, small_folder, make, tuning):
    fit(tmp_path / "without", make(small_folder, tuning))
    fit(tmp_path / "whole", make(small_folder, tuning), [Drift(3, 6, every_n_steps=1)])
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        fit(killed, make(small_folder, tuning), [Drift(3, 6, every_n_steps=1), KillAt(1, batch=2)])
    assert len(read(killed)) == 3 * 2 + 2 * 3
    (killed / "drift.json").unlink()
    fit(killed, make(small_folder, tuning), [Drift(3, 6, every_n_steps=1)], resume=True)
    assert len(read(killed)) == 3 * 2 + 3 * 3
    assert all(row["forward_kl"] > 1e-6 for row in read(killed)[-3:]), "otherwise nothing was compared"
    assert (killed / "drift.json").read_text() == (tmp_path / "whole" / "drift.json").read_text()
    without, whole = (
        torch.load(tmp_path / run / "last.ckpt", weights_only=True)["state_dict"] for run in ("without", "whole")
    )
    assert without.keys() == whole.keys(), "the base is in no checkpoint"
    assert all(torch.equal(without[name], whole[name]) for name in without)


def test_rows_are_spread_evenly_over_what_is_evaluated():
    """Of 6 rows 3 and 4 and of 5 all that there are; the first is always one of them."""
    stream = number_stream()
    stream.processor = WordProcessor()

    def rows(name: str, num_rows: int) -> list[str]:
        return [example.row_id for example in stream.rows_of_evaluation(name, num_rows).prompts.examples]

    assert rows("a", 3) == ["a/test/0", "a/test/2", "a/test/4"]
    assert rows("a", 4) == ["a/test/0", "a/test/1", "a/test/3", "a/test/4"]
    assert rows("p", 9) == [f"p/test/{number}" for number in range(5)]


@pytest.mark.parametrize("options", [{"num_rows": 0}, {"max_new_tokens": 0}, {"every_n_steps": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=rf"Drift: {next(iter(options))}=0 must be at least 1"):
        Drift(**options)


def test_a_record_is_not_continued_with_other_rows():
    with pytest.raises(ValueError, match="Drift: the checkpoint was measured with num_rows=8, now it is 4"):
        Drift(num_rows=4).load_state_dict(Drift().state_dict())
