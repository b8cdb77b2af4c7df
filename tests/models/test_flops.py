"""Counted operations are those that torch counts while they run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cpt_lightning.models.adapters import freeze
from cpt_lightning.models.flops import FlopCounter
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.rollouts import Sampling, completion_logprobs, run_prompts, sample_groups
from cpt_lightning.types import Completions, Prompts
from tests.naive import naive_logprobs, random_completions


@pytest.fixture
def completions() -> Completions:
    return random_completions(12, 9, 256, torch.Generator().manual_seed(0))


def counted(work, uncounted: float = 0.0) -> float:
    """torch 2.13 counts neither the CPU's fused attention, so single products are asked for, nor ``mm(out=)``."""
    with FlopCounterMode(display=False) as mode, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        work()
    return mode.get_total_flops() + uncounted


def logits_into_buffers(model: QwenVL, completions: Completions) -> float:
    """Logits forward and backward, and the gradient of their matrix, which is added to in place."""
    return 1 * 2.0 * int(completions.mask.sum()) * model.get_output_embeddings().weight.numel()


def test_scoring_and_going_back(small_model: QwenVL, mixed_prompts: Prompts, completions: Completions):
    """Within 5 %: torch also counts the masked halves of causal attention, which are nothing to a real kernel."""
    work = FlopCounter(small_model).scored(mixed_prompts, completions)
    uncounted = logits_into_buffers(small_model, completions)
    run = counted(lambda: completion_logprobs(small_model, mixed_prompts, completions).sum().backward(), uncounted)
    assert work.executed == pytest.approx(run, rel=0.05)


def test_a_kept_state_spares_the_forward_over_the_prompts(
    small_model: QwenVL, mixed_prompts: Prompts, completions: Completions
):
    kept = replace(mixed_prompts, state=run_prompts(small_model, mixed_prompts))
    uncounted = logits_into_buffers(small_model, completions)
    run = counted(lambda: completion_logprobs(small_model, kept, completions).sum().backward(), uncounted)
    work = FlopCounter(small_model).scored(kept, completions)
    assert work.executed == pytest.approx(run, rel=0.05)
    assert work.executed < 0.8 * FlopCounter(small_model).scored(mixed_prompts, completions).executed


def test_gradient_checkpointing_runs_forward_again(
    small_model: QwenVL, mixed_prompts: Prompts, completions: Completions
):
    for part in (small_model.model.visual, small_model.model.language_model):
        getattr(part, "activation_checkpointing_enable", part.gradient_checkpointing_enable)({"use_reentrant": False})
    small_model.train()
    uncounted = logits_into_buffers(small_model, completions)
    run = counted(lambda: completion_logprobs(small_model, mixed_prompts, completions).sum().backward(), uncounted)
    assert FlopCounter(small_model).scored(mixed_prompts, completions).executed == pytest.approx(run, rel=0.05)


@pytest.mark.parametrize(
    "frozen",
    [
        ["vision_tower", "projector"], ["vision_tower"], ["projector"],
        ["language_model"], ["language_model", "projector"], ["language_model", "vision_tower"],
    ],
    ids="+".join,
)  # fmt: skip
def test_what_is_frozen_has_no_backward_unless_something_before_it_is_trained(
    small_model: QwenVL, mixed_prompts: Prompts, completions: Completions, frozen: list
):
    """Within 7 %: the less else there is, the more the masked halves of attention weigh that torch counts too."""
    freeze(small_model, frozen)
    is_trained = small_model.get_output_embeddings().weight.requires_grad
    uncounted = logits_into_buffers(small_model, completions) if is_trained else 0.0
    run = counted(lambda: completion_logprobs(small_model, mixed_prompts, completions).sum().backward(), uncounted)
    assert FlopCounter(small_model).scored(mixed_prompts, completions).executed == pytest.approx(run, rel=0.07)


def test_equivalent_is_what_separate_sequences_cost(
    small_model: QwenVL, mixed_prompts: Prompts, completions: Completions
):
    """The naive forward computes logits of prompts too, which nobody needs: they are taken off."""
    run = counted(lambda: naive_logprobs(small_model, mixed_prompts, completions).sum().backward())
    counter = FlopCounter(small_model)
    unneeded = 3 * 3 * counter._logits(int(mixed_prompts.lengths.sum()))
    work = counter.scored(mixed_prompts, completions)
    assert work.equivalent == pytest.approx(run - unneeded, rel=0.08)
    assert work.equivalent > 1.5 * work.executed


def test_sampling(small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts, monkeypatch):
    """With no stop token nothing ends early, so every completion has 6 tokens."""
    monkeypatch.setattr(PromptProcessor, "stop_token_ids", property(lambda self: []))
    drawn = []
    run = counted(lambda: drawn.append(sample_groups(small_model, processor, mixed_prompts, 3, Sampling(6))))
    assert FlopCounter(small_model).sampled(mixed_prompts, drawn[0]).executed == pytest.approx(run, rel=0.05)


def test_scoring_alone_is_forward_alone(small_model: QwenVL, mixed_prompts: Prompts, completions: Completions):
    with torch.no_grad():
        run = counted(lambda: completion_logprobs(small_model, mixed_prompts, completions))
    assert FlopCounter(small_model).scored(mixed_prompts, completions, backward=False).executed == pytest.approx(
        run, rel=0.05
    )
