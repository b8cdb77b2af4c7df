"""One GRPO step is the hand calculation's, however it is cut into micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning import Callback
from torch.utils.data import DataLoader

from cpt_lightning.models import Backbone, Lora
from cpt_lightning.modules import RFT
from cpt_lightning.rewards import Reward
from cpt_lightning.rollouts import Sampling
from cpt_lightning.rollouts.sampling import with_prefix
from cpt_lightning.types import Rollout
from tests.naive import naive_logprobs
from tests.training import fit, largest_difference, length_reward, sgd, weights, with_examples

SAMPLING = Sampling(max_new_tokens=6)


def make(folder: str, **options) -> RFT:
    settings = {"group_size": 4, "sampling": SAMPLING, "optimizer": sgd, "max_grad_norm": None, **options}
    return RFT(backbone=Backbone(folder), **settings)


def catch_rollouts(module: RFT) -> list[Rollout]:
    rollouts = []
    collect = module.collect
    module.collect = lambda *args: rollouts.append(collect(*args)) or rollouts[-1]
    return rollouts


def by_hand(model, rollout: Rollout, reduction: str) -> torch.Tensor:
    """-mean of A * log pi: on-policy the ratio is 1 and its gradient that of log pi, no clipping, written out
    naively."""
    rewards, mask = rollout.rewards, rollout.completions.mask
    deviation = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = (deviation / (rewards.std(dim=1, keepdim=True) + 1e-6)).flatten()
    tokens = -advantages[:, None] * naive_logprobs(model, rollout.prompts, rollout.completions)
    if reduction == "token_mean":
        return tokens[mask].mean()
    per_row = (tokens * mask).sum(dim=1)
    if reduction == "sequence_mean":
        return (per_row / mask.sum(dim=1)).mean()
    return per_row.mean() / SAMPLING.max_new_tokens


@pytest.mark.parametrize(
    ("reduction", "prefix"), [("token_mean", ""), ("token_mean", "<answer>"), ("sequence_mean", ""), ("constant", "")]
)
def test_one_step_moves_the_weights_as_the_hand_calculation_does(
    small_folder, processor, mixed_prompts, reduction, prefix
):
    """Plain SGD, so that the step is the gradient of the hand-written loss of the very same completions."""
    module = make(small_folder, reduction=reduction, sampling=replace(SAMPLING, prefix=prefix))
    module.configure_model()
    untouched = make(small_folder)
    untouched.configure_model()
    rollouts = catch_rollouts(module)
    fit(module, [with_examples(mixed_prompts, processor)])
    assert rollouts[0].rewards.std(dim=1).max() > 0

    loss = by_hand(untouched.model, rollouts[0], reduction)
    loss.backward()
    with torch.no_grad():
        for weight in untouched.model.parameters():
            weight -= 0.1 * weight.grad
    assert largest_difference(weights(module), weights(untouched)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1, "updates_per_rollout": 2, "passes_per_rollout": 2}])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_a_step_gives_the_same_weights_for_any_micro_batch_size(
    small_folder, processor, mixed_prompts, options, reduction
):
    batch = with_examples(mixed_prompts, processor)
    results = []
    for size in (None, 1, 3):
        module = make(small_folder, reduction=reduction, micro_batch_prompts=size, **options)
        fit(module, [batch])
        results.append(weights(module))
    assert largest_difference(results[0], results[1]) < 1e-6
    assert largest_difference(results[0], results[2]) < 1e-6
    untouched = make(small_folder)
    untouched.configure_model()
    assert largest_difference(results[0], weights(untouched)) > 1e-4


@pytest.mark.parametrize("options", [{}, {"updates_per_rollout": 2}, {"rollout_batch_prompts": 3}])
def test_a_forced_beginning_is_rewarded_and_belongs_to_the_prompt(small_folder, processor, mixed_prompts, options):
    """Nothing of it is learned: with it in the prompts of the batch the weights are the same."""
    prefix = "<think></think><answer>"

    def reward(completion: str, gold: str | list[str]) -> dict[str, float]:
        assert completion.startswith(prefix)
        return length_reward(completion, gold)

    batch = with_examples(mixed_prompts, processor, reward)
    module = make(small_folder, sampling=replace(SAMPLING, prefix=prefix), **options)
    rollouts = catch_rollouts(module)
    fit(module, [batch])
    tokens = processor.encode_prefix(prefix)
    assert len(tokens) > 1 and rollouts[0].prompts.input_ids[:, -len(tokens) :].tolist() == [tokens] * 4
    assert processor.decode(rollouts[0].completions) == [text.removeprefix(prefix) for text in rollouts[0].texts]

    begun = with_examples(with_prefix(mixed_prompts, tokens), processor, lambda text, gold: reward(prefix + text, gold))
    other = make(small_folder, **options)
    fit(other, [begun])
    assert largest_difference(weights(module), weights(other)) == 0


def test_groups_of_equal_rewards_cost_no_forward_and_move_nothing(small_folder, processor, mixed_prompts):
    module = make(small_folder)
    module.configure_model()
    before = weights(module)
    scored = []
    module._score = lambda *args: scored.append(args)
    batch = with_examples(mixed_prompts, processor, reward=lambda completion, gold: {"total": 1.0, "accuracy": 1.0})
    trainer = fit(module, [batch])
    assert scored == []
    assert largest_difference(before, weights(module)) == 0
    assert trainer.callback_metrics["train/zero_signal_groups"] == 1
    assert trainer.global_step == 1


def test_the_first_of_several_updates_is_on_policy_and_the_next_ones_are_not(small_folder, processor, mixed_prompts):
    """Old log-probabilities are scored once, before the first update: its ratio is exactly 1."""
    from cpt_lightning.modules import rft as module_file

    ratios = []
    real = module_file.clipped_policy_loss
    module = make(small_folder, updates_per_rollout=1, passes_per_rollout=2)

    def watched(*args, **kwargs):
        loss, stats = real(*args, **kwargs)
        ratios.append(stats.ratio_mean.item())
        return loss, stats

    module_file.clipped_policy_loss = watched
    try:
        fit(module, [with_examples(mixed_prompts, processor)])
    finally:
        module_file.clipped_policy_loss = real
    assert ratios[0] == 1.0
    assert abs(ratios[1] - 1.0) > 1e-4


def test_the_kl_term_pulls_a_policy_that_has_strayed_back(small_folder, processor, mixed_prompts):
    """Nothing is rewarded, so the KL term alone moves the policy, which noise has moved away from the base."""
    batch = with_examples(mixed_prompts, processor, reward=lambda *_: {"total": 0.0, "accuracy": 0.0})
    module = make(small_folder, kl_coef=1.0, reference="base")

    kl = []

    class Watch(Callback):
        def on_fit_start(self, trainer, pl_module):
            with torch.no_grad():
                for weight in pl_module.model.parameters():
                    weight += 0.05 * weight.std(correction=0) * torch.randn_like(weight)

        def on_train_batch_end(self, trainer, *args):
            kl.append(float(trainer.callback_metrics["train/kl_k3"]))

    fit(module, [batch] * 12, callbacks=[Watch()])
    assert sum(kl[-3:]) < 0.7 * sum(kl[:3]), kl


@pytest.mark.parametrize("reference", ["task_start", "base"])
def test_the_kl_term_is_zero_at_the_start_and_then_is_not(small_folder, processor, mixed_prompts, reference):
    module = make(small_folder, kl_coef=1.0, reference=reference)
    batch = with_examples(mixed_prompts, processor)
    assert fit(module, [batch]).callback_metrics["train/kl_k3"] == pytest.approx(0, abs=1e-6)
    module = make(small_folder, kl_coef=1.0, reference=reference)
    assert fit(module, [batch] * 2).callback_metrics["train/kl_k3"] > 1e-4


def test_the_reference_is_renewed_at_a_tasks_start_or_never(small_folder, processor, mixed_prompts):
    batch = with_examples(mixed_prompts, processor)
    for kind, renewed in (("task_start", True), ("base", False)):
        starts = []

        class Watched(RFT):
            def start_step(self, batch, batch_idx, starts=starts):
                if batch_idx == 0:
                    starts.append(weights(self))
                super().start_step(batch, batch_idx)

        module = Watched(
            backbone=Backbone(small_folder),
            group_size=4,
            sampling=SAMPLING,
            optimizer=sgd,
            kl_coef=0.01,
            reference=kind,
        )
        module.configure_model()
        loaded = weights(module)
        fit(module, [batch] * 2, max_epochs=2)
        assert len(starts) == 2
        expected = starts[1] if renewed else loaded
        kept = dict(module.reference.copy.named_parameters())
        assert largest_difference(expected, {name: weight.detach() for name, weight in kept.items()}) == 0


def test_with_lora_the_base_reference_is_the_policy_without_adapters(small_folder, processor, mixed_prompts):
    backbone = Backbone(small_folder, tuning="lora", lora=Lora(rank=4))
    module = RFT(backbone=backbone, group_size=4, sampling=SAMPLING, kl_coef=0.01, reference="base", optimizer=sgd)
    module.configure_model()
    before = weights(module)
    trainer = fit(module, [with_examples(mixed_prompts, processor)] * 3)
    assert module.reference.copy is None
    assert trainer.callback_metrics["train/kl_k3"] > 0
    changed = {name for name, weight in weights(module).items() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_checkpoint_with_a_reference_is_evaluated_without_one(small_folder, processor, mixed_prompts, tmp_path):
    batch = with_examples(mixed_prompts, processor)
    trained = make(small_folder, kl_coef=0.01)
    fit(trained, [batch]).save_checkpoint(tmp_path / "kl.ckpt")
    plain = make(small_folder)
    trainer = fit(plain, [batch], max_steps=0)
    trainer.limit_val_batches = 1.0
    trainer.validate(plain, DataLoader([batch], batch_size=None), ckpt_path=tmp_path / "kl.ckpt", verbose=False)
    assert largest_difference(weights(plain), weights(trained)) == 0


def test_a_frozen_vision_tower_runs_once_per_step(small_folder, processor, mixed_prompts):
    backbone = Backbone(small_folder, freeze=["vision_tower", "projector"])
    module = RFT(backbone=backbone, group_size=4, sampling=SAMPLING, optimizer=sgd)
    module.configure_model()
    calls = []
    module.model.model.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    fit(module, [with_examples(mixed_prompts, processor)])
    assert len(calls) == 1


def test_over_long_completions_lose_what_the_margin_says(small_folder, processor, mixed_prompts):
    """At most 6 tokens, margin 4, so DAPO's penalty is (2 - length) / 4 from 2 tokens on: 6 tokens lose 1, 5 lose 3/4.

    The reward of ``with_examples`` is its accuracy, so the total is accuracy + penalty.
    """
    module = make(small_folder, overlong_margin=4)
    rollouts = catch_rollouts(module)
    trainer = fit(module, [with_examples(mixed_prompts, processor)])
    rollout = rollouts[0]
    by_length = torch.tensor([0, 0, 0, -0.25, -0.5, -0.75, -1.0])
    penalties = by_length[rollout.completions.lengths].view(-1, 4)
    assert torch.equal(rollout.reward_parts["overlong"], penalties)
    assert torch.equal(rollout.rewards, rollout.reward_parts["accuracy"] + penalties)
    assert penalties.min() == -1
    logged = trainer.callback_metrics
    assert logged["train/reward/overlong"] == pytest.approx(penalties.mean().item())
    assert logged["train/reward"] == pytest.approx(rollout.rewards.mean().item())


def test_the_counts_behind_precision_and_recall_are_no_part_of_a_rollout(small_folder, processor, mixed_prompts):
    module = make(small_folder)
    rollouts = catch_rollouts(module)
    batch = with_examples(mixed_prompts, processor, Reward("yes_no", "think_answer"))
    trainer = fit(module, [batch])
    assert set(rollouts[0].reward_parts) == {"accuracy", "format"}
    parts = {name for name in trainer.callback_metrics if name.startswith("train/reward/")}
    assert parts == {"train/reward/accuracy", "train/reward/format"}


def test_reward_rises_where_a_token_is_rewarded(small_folder, processor, mixed_prompts):
    """Reward for the letter a: after some steps of plain GRPO there are more of them."""

    def reward(completion, gold):
        value = completion.count("a") / 6
        return {"total": value, "accuracy": value}

    module = RFT(
        backbone=Backbone(small_folder),
        group_size=8,
        sampling=SAMPLING,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    rollouts = catch_rollouts(module)
    fit(module, [with_examples(mixed_prompts, processor, reward)] * 25)
    assert rollouts[-1].rewards.mean() > rollouts[0].rewards.mean() + 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size=1"),
        ({"advantage": "gpro"}, "advantage='gpro' is unknown; there are grpo, dr_grpo"),
        ({"policy_loss": "pppo"}, "policy_loss='pppo' is unknown; there are ppo, gspo, cispo"),
        ({"reduction": "mean"}, "reduction='mean' is unknown"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4' is unknown"),
        ({"sampling": Sampling(8, temperature=0)}, "temperature=0"),
        ({"kl_coef": -1}, "kl_coef=-1"),
        ({"clip_low": -0.1}, "clip_low=-0.1"),
        ({"dual_clip": 0.5}, "dual_clip=0.5"),
        ({"updates_per_rollout": 0}, "updates_per_rollout=0"),
        ({"micro_batch_prompts": 0}, "micro_batch_prompts=0"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"overlong_margin": 0}, "overlong_margin=0 must be .* from 1 to sampling.max_new_tokens=64"),
        ({"overlong_margin": 9, "sampling": Sampling(8)}, "overlong_margin=9"),
    ],
)
def test_impossible_settings_are_refused_in_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        RFT(**options)


def test_more_updates_than_prompts_are_refused(small_folder, processor, mixed_prompts):
    with pytest.raises(ValueError, match=r"4 prompts cannot be spread over updates_per_rollout=5"):
        fit(make(small_folder, updates_per_rollout=5), [with_examples(mixed_prompts, processor)])


def test_a_reward_that_raises_names_task_and_row(small_folder, processor, mixed_prompts):
    def reward(completion, gold):
        raise KeyError("oops")

    with pytest.raises(RuntimeError, match=r"demo.*demo/0"):
        fit(make(small_folder), [with_examples(mixed_prompts, processor, reward)])


def test_under_bf16_true_rewards_and_advantages_stay_float32(small_folder, processor, mixed_prompts):
    """A reward of .9 is not that of bfloat16, .8984."""
    module = make(small_folder)
    rollouts = catch_rollouts(module)
    batch = with_examples(mixed_prompts, processor, lambda text, gold: {"total": 0.9, "accuracy": 0.0})
    fit(module, [batch], precision="bf16-true")
    assert rollouts[0].rewards.dtype == torch.float32
    assert rollouts[0].rewards.unique().tolist() == pytest.approx([0.9], abs=1e-7)


def test_old_log_probabilities_are_those_that_sampled_whatever_is_dropped_out(small_folder, processor, mixed_prompts):
    """Completions are drawn without dropout, so the ratio's denominator must know none either."""
    lora = Backbone(small_folder, tuning="lora", lora=Lora(rank=4, dropout=0.5))
    module = RFT(backbone=lora, group_size=4, sampling=SAMPLING, optimizer=sgd, updates_per_rollout=2)
    module.configure_model()
    for name, weight in module.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    rollouts, kept = catch_rollouts(module), []
    prepare = module.prepare
    module.prepare = lambda rollout: kept.append(prepare(rollout)) or kept[-1]
    fit(module, [with_examples(mixed_prompts, processor)])
    torch.testing.assert_close(kept[0].old_logps, rollouts[0].completions.logps, atol=1e-5, rtol=1e-5)


def test_what_all_answer_rightly_teaches_one_zero_reinforce_and_grpo_nothing(small_folder, processor, mixed_prompts):
    batch = with_examples(mixed_prompts, processor, lambda text, gold: {"total": 1.0, "accuracy": 1.0})
    for advantage, share in (("one_zero", 0.0), ("grpo", 1.0)):
        trainer = fit(make(small_folder, advantage=advantage), [batch])
        assert trainer.callback_metrics["train/zero_signal_groups"] == share


def test_clips_are_those_of_the_loss_unless_they_are_given(small_folder):
    """GSPO's ratios move a thousandth of PPO's: with PPO's bounds it would never clip."""
    clips = {
        loss: (module.clip_low, module.clip_high)
        for loss in ("ppo", "gspo", "cispo")
        for module in [make(small_folder, policy_loss=loss)]
    }
    assert clips == {"ppo": (0.2, 0.3), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
    assert make(small_folder, policy_loss="gspo", clip_high=0.1).clip_high == 0.1
