"""GRPO's relatives: each one's step is the hand calculation's, and each option does what it says."""

from __future__ import annotations

import pytest
import torch
from lightning import Callback
from torch import Tensor

from cpt_lightning.models import Backbone, Lora
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.modules import RFT, MultiTask
from cpt_lightning.rollouts import Sampling, sample_groups
from cpt_lightning.types import Rollout
from tests.modules.test_rft import SAMPLING, catch_rollouts, make
from tests.naive import naive_logprobs
from tests.training import fit, largest_difference, sgd, weights, with_examples


def parity(completion: str, gold: str | list[str]) -> dict[str, float]:
    """Right or wrong by the length of a random model's text."""
    return {"total": 0.9 * (len(completion) % 2) + 0.1, "accuracy": float(len(completion) % 2)}


@pytest.fixture
def frequent_ends(monkeypatch) -> None:
    """A sixth of all tokens ends a completion, so that a random model's are of any length and some are cut off."""
    monkeypatch.setattr(PromptProcessor, "stop_token_ids", property(lambda self: list(range(0, 800, 6))))


def expected_advantages(rollout: Rollout, kind: str) -> Tensor:
    """Written out completion by completion."""
    rewards, lengths = rollout.rewards, rollout.completions.lengths.view_as(rollout.rewards)
    if kind == "rloo":
        rows = [[r - sum(row[:i] + row[i + 1 :]) / 3 for i, r in enumerate(row)] for row in rewards.tolist()]
        return torch.tensor(rows)
    if kind == "remax":
        return rewards - rollout.greedy_rewards[:, None]
    if kind == "one_zero":
        return (rollout.reward_parts["accuracy"] == 1).float()
    if kind == "dr_grpo":
        return rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "reinforce_plus_plus_baseline":
        rewards = rewards - rewards.mean(dim=1, keepdim=True)
    tokens = rewards.flatten().repeat_interleave(lengths.flatten())
    return (rewards - tokens.mean()) / tokens.std()


@pytest.mark.parametrize(
    "kind", ["dr_grpo", "rloo", "remax", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "one_zero"]
)
def test_one_step_of_each_relative_is_the_hand_calculations(small_folder, processor, mixed_prompts, kind):
    """On-policy the loss is the token mean of -A log pi; plain SGD, so the step is its gradient."""
    module, untouched = make(small_folder, advantage=kind), make(small_folder)
    untouched.configure_model()
    rollouts = catch_rollouts(module)
    fit(module, [with_examples(mixed_prompts, processor, parity)])
    (rollout,) = rollouts
    advantages = expected_advantages(rollout, kind)
    assert advantages.abs().max() > 0.1
    logps = naive_logprobs(untouched.model, rollout.prompts, rollout.completions)
    (-advantages.flatten()[:, None] * logps)[rollout.completions.mask].mean().backward()
    with torch.no_grad():
        for weight in untouched.model.parameters():
            weight -= 0.1 * weight.grad
    assert largest_difference(weights(module), weights(untouched)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence_mean"},
        {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
        {"kl_coef": 0.1, "kl_estimator": "full", "reference": "base"},
        {"kl_coef": 0.1, "kl_estimator": "k1", "kl_in_reward": True, "reference": "base"},
        {"advantage": "remax", "learn_truncated": False},
    ],
    ids=["gspo", "cispo", "full kl", "kl in reward", "remax without truncated ones"],
)
def test_micro_batches_change_no_result(small_folder, processor, mixed_prompts, options, frequent_ends):
    """Two steps of two passes, so that ratios leave 1 and the policy leaves its reference."""
    batch, results = with_examples(mixed_prompts, processor), []
    for size in (None, 1, 3):
        module = make(small_folder, micro_batch_prompts=size, passes_per_rollout=2, **options)
        fit(module, [batch] * 2)
        results.append(weights(module))
    assert largest_difference(results[0], results[1]) < 2e-6
    assert largest_difference(results[0], results[2]) < 2e-6
    untouched = make(small_folder)
    untouched.configure_model()
    assert largest_difference(results[0], weights(untouched)) > 1e-4


def test_the_greedy_completion_of_a_group_is_what_greedy_decoding_gives(small_model, processor, mixed_prompts):
    """And the others are what the same random numbers draw without it."""
    sampling, generator = Sampling(6), torch.Generator()
    both = sample_groups(small_model, processor, mixed_prompts, 3, sampling, generator.manual_seed(1), with_greedy=True)
    greedy = sample_groups(small_model, processor, mixed_prompts, 1, Sampling(6, temperature=0))
    assert torch.equal(both.select(range(3, 16, 4)).ids, greedy.ids)
    four = sample_groups(small_model, processor, mixed_prompts, 4, sampling, generator.manual_seed(1))
    others = [row for row in range(16) if row % 4 != 3]
    assert torch.equal(both.select(others).ids, four.select(others).ids)


class Noise(Callback):
    """Moves the policy away from its base before the first step."""

    def on_train_start(self, trainer, pl_module):
        with torch.no_grad():
            for weight in pl_module.model.parameters():
                weight += 0.05 * weight.std(correction=0) * torch.randn_like(weight)


def test_the_full_divergence_is_that_of_the_two_models_distributions(small_folder, processor, mixed_prompts):
    """Logged as the mean over completion tokens of KL(policy || reference), here from transformers' own logits."""
    module = make(small_folder, kl_coef=0.1, kl_estimator="full", reference="base")
    rollouts = catch_rollouts(module)
    policies = []
    prepare = module.prepare
    module.prepare = lambda rollout: policies.append(weights(module)) or prepare(rollout)
    trainer = fit(module, [with_examples(mixed_prompts, processor)], callbacks=[Noise()])
    tuned, base = make(small_folder), make(small_folder)
    for each in (tuned, base):
        each.configure_model()
    tuned.model.load_state_dict(policies[0], strict=False)
    (rollout,) = rollouts
    total, count = 0.0, 0
    for number, length in enumerate(rollout.completions.lengths.tolist()):
        prompt = rollout.prompts.select([number // 4])
        ids = torch.cat([prompt.input_ids, rollout.completions.ids[number : number + 1, :length]], dim=1)
        extra = {"mm_token_type_ids": (ids == base.model.config.image_token_id).int()}
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        with torch.no_grad():
            policy, reference = (
                each.model(input_ids=ids, **images, **extra).logits[0, -length - 1 : -1].log_softmax(dim=-1)
                for each in (tuned, base)
            )
        total, count = total + float((policy.exp() * (policy - reference)).sum()), count + length
    assert total > 0
    assert trainer.callback_metrics["train/kl_full"] == pytest.approx(total / count, rel=1e-3)


def test_a_divergence_in_the_reward_lowers_it_by_what_the_completions_have_strayed(
    small_folder, processor, mixed_prompts
):
    """Equal rewards otherwise, so it alone says which completion is better; k1 of a completion is its log-ratio."""
    module = make(small_folder, kl_coef=0.5, kl_estimator="k1", kl_in_reward=True, reference="base")
    rollouts = catch_rollouts(module)
    batch = with_examples(mixed_prompts, processor, lambda *_: {"total": 1.0, "accuracy": 1.0})
    trainer = fit(module, [batch], callbacks=[Noise()])
    base = make(small_folder)
    base.configure_model()
    (rollout,) = rollouts
    with torch.no_grad():
        reference = naive_logprobs(base.model, rollout.prompts, rollout.completions)
    strayed = ((rollout.completions.logps - reference) * rollout.completions.mask).sum(dim=1).view(4, 4)
    torch.testing.assert_close(rollout.rewards, 1 - 0.5 * strayed, atol=1e-4, rtol=1e-4)
    assert trainer.callback_metrics["train/reward/kl"] == pytest.approx(-0.5 * strayed.mean().item(), abs=1e-4)
    assert "train/kl_k1" not in trainer.callback_metrics
    assert trainer.callback_metrics["train/grad_norm"] > 0


def test_truncated_completions_are_compared_with_but_not_learned_from(
    small_folder, processor, mixed_prompts, frequent_ends
):
    """Of the hand calculation's tokens those of completions without an end are left out, of the mean too."""
    module, untouched = make(small_folder, learn_truncated=False), make(small_folder)
    untouched.configure_model()
    rollouts = catch_rollouts(module)
    fit(module, [with_examples(mixed_prompts, processor)])
    (rollout,) = rollouts
    ended = torch.isin(rollout.completions.ids, torch.tensor(processor.stop_token_ids)).any(dim=1)
    assert 0 < ended.sum() < 16
    assert torch.equal(rollout.learned.flatten(), ended)
    spread = rollout.rewards.std(dim=1, keepdim=True) + 1e-6
    advantages = ((rollout.rewards - rollout.rewards.mean(dim=1, keepdim=True)) / spread).flatten()
    logps = naive_logprobs(untouched.model, rollout.prompts, rollout.completions)
    (-advantages[:, None] * logps)[rollout.completions.mask & ended[:, None]].mean().backward()
    with torch.no_grad():
        for weight in untouched.model.parameters():
            weight -= 0.1 * weight.grad
    assert largest_difference(weights(module), weights(untouched)) < 1e-6


def only_row(*rows: int):
    """Right or wrong by the text's length where the row's reference is one of ``rows``, else always wrong."""
    golds = {str(row) * (row + 1) for row in rows}
    return lambda completion, gold: parity(completion, gold) if gold in golds else {"total": 0.1, "accuracy": 0.0}


def test_dynamic_sampling_stops_when_it_has_enough_groups_that_differ(small_folder, processor, mixed_prompts):
    module = make(small_folder, rollout_batch_prompts=1, informative_prompts=1)
    rollouts, sampled = catch_rollouts(module), []
    sample = module._sample
    module._sample = lambda prompts, *place: sampled.append(len(prompts)) or sample(prompts, *place)
    trainer = fit(module, [with_examples(mixed_prompts, processor, only_row(1, 2))])
    assert sampled == [1, 1]  # row 0 teaches nothing, row 1 does; rows 2 and 3 are not sampled
    assert [example.row_id for example in rollouts[0].prompts.examples] == ["demo/1"]
    assert trainer.callback_metrics["train/informative_fraction"] == 0.5
    assert trainer.callback_metrics["train/grad_norm"] > 0


def test_dynamic_sampling_ends_with_the_batch_and_learns_from_what_there_is(small_folder, processor, mixed_prompts):
    module = make(small_folder, rollout_batch_prompts=3, informative_prompts=3, updates_per_rollout=2)
    rollouts = catch_rollouts(module)
    fit(module, [with_examples(mixed_prompts, processor, only_row(1, 3))])
    assert [example.row_id for example in rollouts[0].prompts.examples] == ["demo/1", "demo/3"]
    module = make(small_folder, rollout_batch_prompts=3, informative_prompts=3)
    module.configure_model()
    before = weights(module)
    trainer = fit(module, [with_examples(mixed_prompts, processor, only_row())])
    assert trainer.callback_metrics["train/informative_fraction"] == 0
    assert largest_difference(before, weights(module)) == 0


def test_a_synchronised_reference_is_renewed_every_so_many_steps(small_folder, processor, mixed_prompts):
    """Every second step: after three steps it is the policy as it was before the third."""
    starts = []

    class Watched(RFT):
        def start_step(self, batch, batch_idx):
            starts.append(weights(self))
            super().start_step(batch, batch_idx)

    module = Watched(
        backbone=Backbone(small_folder),
        group_size=4,
        sampling=SAMPLING,
        kl_coef=0.01,
        reference="synchronised",
        reference_every=2,
    )
    fit(module, [with_examples(mixed_prompts, processor)] * 3)
    kept = {name: weight.detach() for name, weight in module.reference.copy.named_parameters()}
    assert largest_difference(starts[2], kept) == 0
    assert largest_difference(starts[1], kept) > 0


def test_with_lora_the_full_divergence_needs_no_second_model(small_folder, processor, mixed_prompts):
    backbone = Backbone(small_folder, tuning="lora", lora=Lora(rank=4))
    module = RFT(
        backbone=backbone, group_size=4, sampling=SAMPLING, kl_coef=0.01, kl_estimator="full", reference="base"
    )
    trainer = fit(module, [with_examples(mixed_prompts, processor)] * 3)
    assert module.reference.copy is None
    assert trainer.callback_metrics["train/kl_full"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_loss": "cispo", "dual_clip": 3.0}, "dual_clip=3.0 has no meaning for policy_loss=cispo"),
        ({"kl_in_reward": True, "kl_estimator": "full"}, "kl_in_reward needs .* k1, k2 or k3"),
        ({"reference": "synchronised"}, "reference=synchronised, reference_every=None"),
        ({"reference_every": 3}, "reference=task_start, reference_every=3"),
        ({"informative_prompts": 3}, "informative_prompts=3 .* rollout_batch_prompts"),
        ({"informative_prompts": 0, "rollout_batch_prompts": 2}, "informative_prompts=0"),
    ],
)
def test_impossible_settings_of_the_family_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RFT(**options)


@pytest.mark.parametrize("advantage", ["remax", "reinforce_plus_plus", "one_zero"])
def test_what_compares_with_no_sibling_takes_one_completion_a_prompt(small_folder, processor, mixed_prompts, advantage):
    module = make(small_folder, group_size=1, advantage=advantage)
    trainer = fit(module, [with_examples(mixed_prompts, processor, parity)])
    assert trainer.callback_metrics["train/grad_norm"] > 0


def test_joint_training_samples_dynamically_too(small_folder, processor, mixed_prompts):
    """Half of the rows are reinforced; the only one that teaches has its own task's weight: 0 leaves all as it was."""
    results = []
    for weight in (1.0, 0.0):
        module = MultiTask(
            backbone=Backbone(small_folder),
            objective="rft",
            weights={"demo": weight},
            group_size=4,
            sampling=SAMPLING,
            rollout_batch_prompts=1,
            informative_prompts=1,
            optimizer=sgd,
        )
        module.configure_model()
        before = weights(module)
        rollouts = catch_rollouts(module)
        fit(module, [with_examples(mixed_prompts, processor, only_row(2))])
        assert [example.row_id for example in rollouts[0].prompts.examples] == ["demo/2"]
        results.append(largest_difference(before, weights(module)))
    assert results[0] > 1e-4 and results[1] == 0


def test_pure_bfloat16_samples_and_scores_in_float32(small_folder, processor, mixed_prompts):
    """The Trainer makes bfloat16 the default dtype there; log-probabilities and random numbers would be too coarse."""
    module = make(small_folder, kl_coef=0.1, passes_per_rollout=2)
    rollouts, policies = catch_rollouts(module), []
    prepare = module.prepare
    module.prepare = lambda rollout: policies.append(prepare(rollout)) or policies[-1]
    trainer = fit(module, [with_examples(mixed_prompts, processor)], precision="bf16-true")
    assert {weight.dtype for weight in module.model.parameters()} == {torch.bfloat16}
    assert rollouts[0].completions.logps.dtype == policies[0].old_logps.dtype == torch.float32
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
