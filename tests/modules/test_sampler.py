"""Another engine than ours behind `sampler`: who asks it, what is logged of it, and how it is corrected for."""

from __future__ import annotations

from math import exp

import pytest
import torch

from cpt_lightning.models import Backbone
from cpt_lightning.modules import RFT
from cpt_lightning.rollouts import Sampler, Sampling, sample_groups
from tests.training import fit, largest_difference, sgd, weights, with_examples

OFF_BY = 0.5
"""Nats by which the stand-in's log-probabilities lie below the policy's: every ratio policy / sampler is e^0.5."""


class Odd(Sampler):
    """Draws as our engine does, and is wrong about its log-probabilities, or not."""

    def __init__(self, off_by: float = 0.0, freed: int | None = None) -> None:
        self.off_by, self.freed, self.calls = off_by, freed, []

    def sample(self, *args, **kwargs):
        self.calls.append("sample")
        completions = sample_groups(*args, **kwargs)
        completions.logps = completions.logps - self.off_by * completions.mask
        return completions

    def sleep(self):
        self.calls.append("sleep")
        return self.freed

    def close(self):
        self.calls.append("close")


def make(folder: str, sampler: Sampler | None, **options) -> RFT:
    settings = {"group_size": 4, "sampling": Sampling(6), "optimizer": sgd, "max_grad_norm": None, **options}
    return RFT(backbone=Backbone(folder), sampler=sampler, **settings)


def step(folder, batch, sampler, **options):
    """The weights after one step, and what was logged."""
    module = make(folder, sampler, **options)
    trainer = fit(module, [batch])
    return weights(module), trainer.callback_metrics


@pytest.fixture
def batch(mixed_prompts, processor):
    return with_examples(mixed_prompts, processor)


def test_an_engine_that_draws_the_same_ends_in_the_same_weights(small_folder, batch):
    ours, shown = step(small_folder, batch, None)
    assert not [name for name in shown if name.startswith("train/mismatch")]
    theirs, shown = step(small_folder, batch, Odd())
    assert largest_difference(ours, theirs) < 1e-6
    assert float(shown["train/mismatch/max"]) < 1e-5


def test_the_mismatch_is_logged(small_folder, batch):
    """Every difference is 0.5: k1 is -0.5, and k3 e^0.5 - 0.5 - 1."""
    _, shown = step(small_folder, batch, Odd(OFF_BY), micro_batch_prompts=1)
    expected = {"mean": OFF_BY, "max": OFF_BY, "kl_k1": -OFF_BY, "kl_k3": exp(OFF_BY) - OFF_BY - 1}
    for name, value in expected.items():
        assert float(shown[f"train/mismatch/{name}"]) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("cap, factor", [(2.0, exp(OFF_BY)), (1.2, 1.2)])
def test_importance_sampling_scales_each_token_s_gradient(small_folder, batch, cap, factor, updates):
    """Plain SGD of one update moves the weights by the gradient: e^0.5 times as far, or as far as the cap lets it.

    Of two updates the second begins elsewhere; there only the sign is sure: it moves farther.
    """
    before = make(small_folder, None)
    before.configure_model()
    start = weights(before)
    options = {"updates_per_rollout": updates}
    plain, _ = step(small_folder, batch, Odd(OFF_BY), **options)
    corrected, _ = step(small_folder, batch, Odd(OFF_BY), importance_sampling="token", importance_cap=cap, **options)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    moved, farther = plain[name] - start[name], corrected[name] - start[name]
    assert float(farther.norm() / moved.norm()) > 1.1
    if updates == 1:
        torch.testing.assert_close(farther, factor * moved, atol=1e-6, rtol=1e-3)


def test_a_sequence_s_weight_is_that_of_all_its_tokens(small_folder, batch):
    """A completion's ratios multiply to e^(0.5 T), T at least 1, which a cap of e^0.5 brings down to a token's."""
    token, sequence = (
        step(small_folder, batch, Odd(OFF_BY), importance_sampling=level, importance_cap=exp(OFF_BY))[0]
        for level in ("token", "sequence")
    )
    uncapped, _ = step(small_folder, batch, Odd(OFF_BY), importance_sampling="sequence", importance_cap=100.0)
    assert largest_difference(token, sequence) < 1e-6
    assert largest_difference(token, uncapped) > 1e-4


def test_the_engine_sleeps_between_rollout_and_update_and_after_an_evaluation(small_folder, batch):
    sampler = Odd(freed=3_000_000_000)
    _, shown = step(small_folder, batch, sampler, rollout_batch_prompts=2)
    assert sampler.calls == ["sample", "sample", "sleep"]
    assert float(shown["perf/sampler_freed_gb"]) == 3
    sampler.calls.clear()
    module = make(small_folder, sampler)
    batch.prompts.valid = torch.ones(len(batch), dtype=torch.bool)
    fit(module, [batch], limit_val_batches=1, num_sanity_val_steps=0)
    assert sampler.calls == ["sample", "sleep", "sample", "sleep"]


def test_importance_sampling_is_refused_where_it_has_no_meaning(small_folder):
    with pytest.raises(
        ValueError, match="importance_sampling=token corrects for another engine than ours: set sampler"
    ):
        make(small_folder, None, importance_sampling="token")
    with pytest.raises(ValueError, match="importance_cap=0.5 must be at least 1"):
        make(small_folder, Odd(), importance_sampling="token", importance_cap=0.5)
