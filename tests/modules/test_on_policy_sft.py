"""On-policy SFT learns what SFT would learn from the completions that were kept."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.models import Backbone
from cpt_lightning.modules import OnPolicySFT
from cpt_lightning.rollouts import Hint, Sampling, Selection
from cpt_lightning.types import Rollout
from tests.naive import naive_logprobs
from tests.training import fit, largest_difference, sgd, weights, with_examples

LOOSE = Selection(threshold=0.5, finished_only=False, distinct=False)


def make(folder: str, **options) -> OnPolicySFT:
    settings = {"group_size": 4, "sampling": Sampling(max_new_tokens=6), "optimizer": sgd, "max_grad_norm": None}
    return OnPolicySFT(backbone=Backbone(folder), **{**settings, "selection": LOOSE, **options})


def never(completion: str, gold: str | list[str]) -> dict[str, float]:
    return {"total": 0.0, "accuracy": 0.0}


def only_of_last_row(completion: str, gold: str | list[str]) -> dict[str, float]:
    """Right where the gold answer is that of row 3, whose group every second completion is right in."""
    right = float(gold == "3333" and len(completion) % 2)
    return {"total": right, "accuracy": right}


def caught(module: OnPolicySFT) -> list[Rollout]:
    rollouts = []
    collect = module.collect
    module.collect = lambda *args: rollouts.append(collect(*args)) or rollouts[-1]
    return rollouts


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("micro_batch_prompts", [None, 1])
def test_one_step_is_that_of_sft_on_what_was_kept(
    small_folder, processor, mixed_prompts, reduction, micro_batch_prompts
):
    """-mean of log pi over the kept completions alone, written out naively; unequally many of each row."""
    module = make(small_folder, reduction=reduction, micro_batch_prompts=micro_batch_prompts)
    untouched = make(small_folder)
    untouched.configure_model()
    rollouts = caught(module)
    metrics = fit(module, [with_examples(mixed_prompts, processor)]).callback_metrics
    (rollout,) = rollouts
    kept = rollout.reward_parts["accuracy"] >= 0.5
    assert 0 < kept.sum() < kept.numel() and len(set(kept.sum(dim=1).tolist())) > 1

    logps = naive_logprobs(untouched.model, rollout.prompts, rollout.completions)
    mask = rollout.completions.mask
    logps, mask = (each[kept.flatten()] for each in (logps, mask))
    loss = -logps[mask].mean() if reduction == "token_mean" else -((logps * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in untouched.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert largest_difference(weights(module), weights(untouched)) < 1e-5
    assert metrics["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["train/kept_fraction"] == pytest.approx(kept.float().mean().item())
    assert metrics["train/left_out/incorrect"] == pytest.approx(1 - kept.float().mean().item())
    assert metrics["train/left_out/duplicate"] == 0
    assert metrics["train/learned_rows"] == pytest.approx(kept.any(dim=1).float().mean().item())


def test_a_batch_without_a_right_answer_changes_nothing(small_folder, processor, mixed_prompts):
    """Nor does weight decay."""
    decaying = lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)  # noqa: E731
    module = make(small_folder, optimizer=decaying)
    module.configure_model()
    before = weights(module)
    metrics = fit(module, [with_examples(mixed_prompts, processor, never)]).callback_metrics
    assert largest_difference(weights(module), before) == 0
    assert metrics["train/learned_rows"] == metrics["train/kept_fraction"] == 0


def test_rows_without_a_right_answer_are_passed_over_and_every_pass_is_fresh(small_folder, processor, mixed_prompts):
    """One of four rows can be right; the second step draws other completions of the same rows."""
    module = make(small_folder, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    rollouts = caught(module)
    seen = []
    losses = module.losses
    module.losses = lambda rollout, kept: seen.append(kept) or losses(rollout, kept)
    fit(module, [with_examples(mixed_prompts, processor, only_of_last_row)] * 2)
    assert all(not kept[:3].any() for kept in seen) and seen[0][3].any()
    assert rollouts[0].texts != rollouts[1].texts


def test_the_hint_is_seen_by_the_sampler_only(small_folder, processor, mixed_prompts):
    """What is sampled depends on the hint; what is learned has the prompts of the batch."""
    module = make(small_folder, hint=Hint(" Say {answer}!"))
    batch = with_examples(mixed_prompts, processor)
    for example, images in zip(batch.prompts.examples, batch.prompts.images_per_prompt, strict=True):
        example.messages = [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": "?"}]}]
    sampled, learned = caught(module), []
    losses = module.losses
    module.losses = lambda rollout, kept: learned.append(rollout) or losses(rollout, kept)
    fit(module, [batch])
    text = processor.tokenizer.batch_decode(sampled[0].prompts.input_ids)
    assert [f"Say {example.gold}!" in prompt for example, prompt in zip(batch.prompts.examples, text, strict=True)] == [
        True
    ] * 4
    assert torch.equal(learned[0].prompts.input_ids, batch.prompts.input_ids)
    assert learned[0].texts == sampled[0].texts


@pytest.mark.parametrize("options", [{"reduction": "constant"}, {"micro_batch_prompts": 0}, {"group_size": 0}])
def test_bad_options_are_refused(small_folder, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(small_folder, **options)


def test_a_forced_beginning_is_refused(small_folder):
    with pytest.raises(ValueError, match="sampling.prefix='so': what was forced would be missing"):
        make(small_folder, sampling=Sampling(6, prefix="so"))


@pytest.mark.parametrize("text", ["no slot", "{question}", "{answer} <|im_end|>"])
def test_a_bad_hint_is_refused(text):
    with pytest.raises(ValueError, match=r"hint\.text"):
        Hint(text)
