"""What is measured of a step on a GPU does not hold it up."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.models.flops import FlopCounter
from cpt_lightning.modules.accounting import StepAccount
from cpt_lightning.rollouts import Sampling, sample_groups
from tests.pretend_gpu import pretended_gpu


def test_tokens_and_operations_of_a_step_are_counted_without_a_wait_for_the_gpu(small_model, processor, mixed_prompts):
    """Of groups of two and images; what is logged in the end is what the CPU counts."""
    completions = sample_groups(small_model, processor, mixed_prompts, 2, Sampling(6))
    counter, found = FlopCounter(small_model), []
    for device in ("cpu", "cuda"):
        with pretended_gpu() as waits:
            prompts, drawn = mixed_prompts.to(device), completions.to(device)
            account = StepAccount(peak_flops=1.0)
            account.start()
            account.add_flops(counter.sampled(prompts, drawn))
            account.add_flops(counter.scored(prompts, drawn))
            account.add_tokens(prompts, drawn)
            measured = account.end(torch.device(device))
            assert not waits.total(), waits
        names = ("perf/mfu", "perf/mfu_equivalent", "perf/tokens_per_s")
        found.append([float(measured[name]) * measured["time/step_s"] for name in names])
    assert found[1] == pytest.approx(found[0])
    assert found[0][2] == pytest.approx(int(mixed_prompts.attention_mask.sum() + completions.mask.sum()))
