"""Reinforcement fine-tuning by group rollouts: GRPO and its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cpt_lightning.functional import (
    Mismatch,
    PolicyStats,
    RatioLevel,
    Reduction,
    clipped_policy_loss,
    clipped_weight_loss,
    kl_full,
    masked_mean,
    token_weights,
    truncated_importance,
    weighted_sum,
    zero_signal_fraction,
)
from cpt_lightning.models.sharding import gather
from cpt_lightning.modules.advantages import Advantage, advantages_of
from cpt_lightning.modules.group_rollouts import GroupRollouts, check_positive
from cpt_lightning.modules.reference import HeldToReference
from cpt_lightning.modules.rft_options import (
    KL_ESTIMATES,
    USUAL_CLIPS,
    KLEstimator,
    PolicyLoss,
    check_options,
)
from cpt_lightning.modules.updates import Loss, UpdateStats
from cpt_lightning.rollouts.sampling import sampling_mode
from cpt_lightning.tasks.checks import check_known
from cpt_lightning.types import Batch, Completions, Prompts, Rollout

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

STATE_PAYS_FROM = 2 / 3
"""Share of the groups that must have a gradient for the rollout's pass over the prompts to be worth going back through:
backward, two thirds of a step's work, goes through all of its prompts or none."""


@dataclass
class Prepared:
    """What the updates that learn from a rollout share.

    Args:
        advantages: ``[B, G]``.
        row_weights: ``[B]`` weight of each prompt in the loss.
        mask: ``[N, T]`` tokens that are learned from.
        old_logps: ``[N, T]`` under the policy that sampled; ``None`` if there is one update only, before which the
            policy is still that one.
        ref_logps: ``[N, T]`` under the reference; ``None`` where the loss has no estimate of the divergence from it.
    """

    advantages: Tensor
    row_weights: Tensor
    mask: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None

    @property
    def zero_signal_groups(self) -> Tensor:
        """Share of the groups that advantages teach nothing."""
        return zero_signal_fraction(self.advantages)


class RFT(GroupRollouts, HeldToReference):
    """Reinforcement fine-tuning with GRPO (DeepSeekMath, arXiv 2402.03300) and its relatives.

    A training batch is a rollout: of each of its prompts (``data.prompts_per_step``) ``group_size`` completions are
    sampled, and learned from in ``updates_per_rollout`` optimizer steps.

    Args:
        updates_per_rollout: Optimizer steps over which the prompts of a rollout are spread.
        passes_per_rollout: How often the prompts of a rollout are gone through (mu in GRPO).
        advantage: What a reward is compared with. ``grpo``: its group's mean, over the standard deviation; ``dr_grpo``:
            the mean alone; ``rloo``: the siblings' mean; ``remax``: the reward of the prompt's greedy completion, which
            is sampled beside the group; ``reinforce_plus_plus``: the batch's mean, over its standard deviation;
            ``reinforce_plus_plus_baseline``: the group's mean first; ``one_zero``: nothing, 1 where the answer is
            right and 0 where it is not.
        policy_loss: ``ppo`` clips each token's ratio to the sampling policy, and with it the gradient; ``gspo`` clips
            the geometric mean of a completion's ratios (arXiv 2507.18071); ``cispo`` clips the weight of a token's
            gradient only (arXiv 2506.13585).
        clip_low: How far below 1 the ratio may fall and still be learned from. By default what the loss is used with:
            ppo 0.2, gspo 3e-4, cispo 1, which is no bound.
        clip_high: How far above 1 it may rise and still be learned from. By default ppo 0.3 (paper A), gspo 4e-4, cispo
            4, which bounds the weight at 5 (arXiv 2510.13786).
        dual_clip: Bounds the loss of completions with a negative advantage (paper A: 3.0); off by default.
        reduction: How the loss averages over tokens: ``token_mean``, ``sequence_mean``, or ``constant``, which divides
            token sums by ``sampling.max_new_tokens`` (Dr. GRPO).
        kl_estimator: Per token ``k1``, ``k2`` or ``k3`` (GRPO), or ``full`` over the whole vocabulary.
        kl_in_reward: Subtract each completion's summed divergence from its reward, as PPO does, in place of a term of
            the loss; logged as ``train/reward/kl``.
        reference_every: Training steps between two renewals of a ``synchronised`` reference.
        importance_sampling: Corrects for a ``sampler`` whose probabilities are not quite the policy's: weighs the
            policy loss of each token by their ratio, the ``token``'s own or that of the whole ``sequence``, but by
            ``importance_cap`` at most (truncated importance sampling); off by default.
        importance_cap: Largest such weight.
        **kwargs: Options of :class:`GroupRollouts`, :class:`HeldToReference` and :class:`PostTraining`.
    """

    def __init__(
        self,
        updates_per_rollout: int = 1,
        passes_per_rollout: int = 1,
        advantage: Advantage = "grpo",
        policy_loss: PolicyLoss = "ppo",
        clip_low: float | None = None,
        clip_high: float | None = None,
        dual_clip: float | None = None,
        reduction: Reduction = "token_mean",
        kl_estimator: KLEstimator = "k3",
        kl_in_reward: bool = False,
        reference_every: int | None = None,
        importance_sampling: RatioLevel | None = None,
        importance_cap: float = 2.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_known(
            advantage=(advantage, Advantage),
            policy_loss=(policy_loss, PolicyLoss),
            reduction=(reduction, Reduction),
            kl_estimator=(kl_estimator, KLEstimator),
        )
        if importance_sampling is not None:
            check_known(importance_sampling=(importance_sampling, RatioLevel))
        check_positive(
            updates_per_rollout=updates_per_rollout,
            passes_per_rollout=passes_per_rollout,
            reference_every=reference_every,
        )
        self.updates_per_rollout = updates_per_rollout
        self.passes_per_rollout = passes_per_rollout
        self.advantage: Advantage = advantage
        self.policy_loss: PolicyLoss = policy_loss
        usual_low, usual_high = USUAL_CLIPS[policy_loss]
        self.clip_low = usual_low if clip_low is None else clip_low
        self.clip_high = usual_high if clip_high is None else clip_high
        self.dual_clip = dual_clip
        self.reduction: Reduction = reduction
        self.kl_estimator, self.kl_in_reward = kl_estimator, kl_in_reward
        self.reference_every = reference_every
        self.importance_sampling, self.importance_cap = importance_sampling, importance_cap
        check_options(self)

    # -- the algorithm -------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Samples groups, rewards them, and updates the policy."""
        self.start_step(batch, batch_idx)
        rollout = self.collect(batch.prompts, batch_idx)
        with self.timed("update"):
            prepared = self.prepare(rollout)
            stats = [
                part
                for rows in self.update_rows(range(len(rollout.prompts)))
                for part in self.update(self.losses(rollout, prepared, rows), batch.prompts)
            ]
        self.log_rollout(rollout, zero_signal_groups=prepared.zero_signal_groups)
        return self.log_updates(stats, self.updates_per_step)

    def prepare(self, rollout: Rollout) -> Prepared:
        """Turns rewards into advantages, and scores the completions where later updates need the scores of now."""
        own_logps = ref_logps = None
        if self.updates_per_step > 1 or (self._has_kl_reward and self.sampler is not None):
            with sampling_mode(self.model):  # nothing was dropped out of the policy that sampled
                own_logps = self._logps(self.model, rollout)
        if self.kl_coef and self.kl_estimator != "full":
            with self.reference.model(self.model) as reference:
                ref_logps = self._logps(reference, rollout)
        if self._has_kl_reward:
            self._penalize(rollout, rollout.completions.logps if own_logps is None else own_logps, ref_logps)
        mask = rollout.completions.mask & rollout.counts
        return Prepared(
            advantages=advantages_of(rollout, self.advantage, self.sum_over_ranks),
            row_weights=torch.ones(len(rollout.prompts), dtype=torch.float32, device=self.device),
            mask=mask if rollout.learned is None else mask & rollout.learned.view(-1, 1),
            old_logps=own_logps if self.updates_per_step > 1 else None,
            ref_logps=ref_logps if self._has_kl_loss else None,
        )

    def losses(self, rollout: Rollout, prepared: Prepared, rows: Sequence[int]) -> list[Loss]:
        """The loss of one update on the groups of ``rows``, in micro-batches that add up to it."""
        mask = prepared.mask[rollout.completions_of(rows)]
        num_sequences, num_tokens = self.mean_counts(len(mask) * rollout.counts, mask.sum())
        # Without a KL term a group without advantages has no gradient, so it costs no forward either.
        has_gradient = (prepared.advantages.any(dim=1) | self._has_kl_loss).tolist()
        rows = [row for row in rows if has_gradient[row]] if rollout.counts else []
        if len(rows) < STATE_PAYS_FROM * len(rollout.prompts):
            rollout.prompts = replace(rollout.prompts, state=None)  # nobody holds its graph any longer
        size = self.micro_batch_prompts or max(1, len(rows))
        weigh = partial(
            token_weights,
            reduction=self.reduction,
            constant=self.sampling.max_new_tokens if self.reduction == "constant" else None,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
        )
        micro_batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [partial(self.loss, rollout, prepared, micro, weigh) for micro in micro_batches]

    def loss(
        self, rollout: Rollout, prepared: Prepared, rows: Sequence[int], weigh: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, UpdateStats]:
        """A micro-batch's share of the loss of its update."""
        index = rollout.completions_of(rows)
        prompts, completions = rollout.prompts.select(rows), rollout.completions.select(index)
        length = completions.mask.shape[1]
        mask = prepared.mask[index, :length]
        logps, kl = self._scores(prompts, completions)
        if prepared.ref_logps is not None:
            kl = KL_ESTIMATES[self.kl_estimator](logps, prepared.ref_logps[index, :length], mask)
        old_logps = logps.detach() if prepared.old_logps is None else prepared.old_logps[index, :length]
        weights = weigh(mask) * prepared.row_weights[rows].repeat_interleave(self.group_size)[:, None]
        importance, mismatch = self._against_sampler(old_logps, completions.logps, mask)
        advantages = prepared.advantages[rows].flatten()
        loss, stats = self._policy_loss(logps, old_logps, advantages, mask, weights * importance)
        if kl is None:
            return loss, UpdateStats(loss.detach(), stats, mismatch=mismatch)
        loss = loss + self.kl_coef * weighted_sum(kl, weights, mask)
        return loss, UpdateStats(loss.detach(), stats, masked_mean(kl.detach(), mask), mismatch)

    def _against_sampler(
        self, logps: Tensor, sampler_logps: Tensor | None, mask: Tensor
    ) -> tuple[Tensor | float, Mismatch | None]:
        """Weights of the tokens for what another engine sampled, and how far the policy is from it."""
        if self.sampler is None or sampler_logps is None:
            return 1.0, None
        mismatch = Mismatch.between(logps, sampler_logps, mask)
        if self.importance_sampling is None:
            return 1.0, mismatch
        level, cap = self.importance_sampling, self.importance_cap
        return truncated_importance(logps, sampler_logps, mask, level, cap), mismatch

    @property
    def _policy_loss(self) -> Callable[..., tuple[Tensor, PolicyStats]]:
        if self.policy_loss == "cispo":
            return partial(clipped_weight_loss, clip_low=self.clip_low, clip_high=self.clip_high)
        return partial(
            clipped_policy_loss,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            level="sequence" if self.policy_loss == "gspo" else "token",
        )

    def _scores(self, prompts: Prompts, completions: Completions) -> tuple[Tensor, Tensor | None]:
        """``[N, T]`` log-probabilities by the policy, and where it is computed in full its divergence."""
        if not (self._has_kl_loss and self.kl_estimator == "full"):
            return self._score(prompts, completions, self.model), None
        return self.logps_and_divergence(prompts, completions, kl_full, self.sampling.temperature)

    def _penalize(self, rollout: Rollout, logps: Tensor | None, ref_logps: Tensor | None) -> None:
        """Takes the policy's divergence from the reference out of the rewards."""
        assert logps is not None and ref_logps is not None
        kl = KL_ESTIMATES[self.kl_estimator](logps, ref_logps, rollout.completions.mask)
        kl = kl.sum(dim=1).view_as(rollout.rewards)
        rollout.reward_parts["kl"] = -self.kl_coef * kl
        rollout.rewards = rollout.rewards - self.kl_coef * kl

    def log_learned(self, parts: list[UpdateStats]) -> None:
        """Logs the divergence from the reference too, where the loss has it."""
        super().log_learned(parts)
        if self._has_kl_loss:
            measured = [(part.kl, part.policy.num_tokens) for part in parts if part.kl is not None and part.policy]
            divergences, num_tokens = (torch.stack(values) for values in zip(*measured, strict=True))
            mean = (divergences * num_tokens).sum() / num_tokens.sum().clamp(min=1)
            self.log_means({f"train/kl_{self.kl_estimator}": mean}, count=num_tokens.sum())

    # -- parts of a step -----------------------------------------------------------------------------------------

    @property
    def samples_greedy(self) -> bool:
        """Whether ReMax wants its baseline."""
        return self.advantage == "remax"

    @property
    def goes_back_through_rollout(self) -> bool:
        """Whether there is one update, of all groups at once."""
        return self.updates_per_step == 1 and self.micro_batch_prompts is None and self.informative_prompts is None

    @property
    def ranks_go_back_alike(self) -> bool:
        """Not through the rollout's pass over the prompts: it is left out where few groups have a signal."""
        return not self.goes_back_through_rollout

    @property
    def learns_by_logprobs(self) -> bool:
        """Not where the divergence from the reference is computed over the whole vocabulary."""
        return not (self._has_kl_loss and self.kl_estimator == "full")

    @property
    def _has_kl_loss(self) -> bool:
        return bool(self.kl_coef) and not self.kl_in_reward

    @property
    def _has_kl_reward(self) -> bool:
        return bool(self.kl_coef) and self.kl_in_reward

    @property
    def steps_of_task(self) -> int:
        """Optimizer steps of the task that is being learned."""
        return int(self.trainer.num_training_batches) * self.updates_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a training step."""
        return self.updates_per_rollout * self.passes_per_rollout

    def start_step(self, batch: Batch, batch_idx: int) -> None:
        """Checks the size of the batch, says once what a step is, and renews the reference when that is due."""
        num_prompts = len(batch)
        if num_prompts + batch.num_skipped < self.updates_per_rollout:
            raise ValueError(
                f"a batch of {num_prompts} prompts cannot be spread over "
                f"updates_per_rollout={self.updates_per_rollout}; raise data.prompts_per_step"
            )
        if self.global_step == 0:
            rank_zero_info(
                f"One step: {num_prompts} prompts x {self.group_size} completions = {num_prompts * self.group_size} on "
                f"each of {self.trainer.world_size} rank(s), learned from {self.passes_per_rollout} time(s) in "
                f"{self.updates_per_rollout} update(s) of {-(-num_prompts // self.updates_per_rollout)} prompts, "
                f"{self.micro_batch_prompts or 'all'} at once through backward."
            )
        if self.kl_coef and self.reference_every is not None and batch_idx % self.reference_every == 0:
            self.reference.renew(self.model)
            gather(self.model)

    def update_rows(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Which prompts each update of the rollout learns from."""
        parts = torch.tensor(list(rows), dtype=torch.long).tensor_split(self.updates_per_rollout)
        for _ in range(self.passes_per_rollout):
            yield from (part.tolist() for part in parts)

    def _logps(self, model: QwenVL, rollout: Rollout) -> Tensor:
        """``[N, T]`` of the whole rollout, in micro-batches, by a model that need not be the one that sampled."""
        prompts, num_prompts = replace(rollout.prompts, state=None), len(rollout.prompts)
        logps = torch.zeros(rollout.completions.mask.shape, device=self.device, dtype=torch.float32)
        for rows in torch.arange(num_prompts).split(self.micro_batch_prompts or num_prompts):
            index = rollout.completions_of(rows.tolist())
            completions = rollout.completions.select(index)
            part = self._score(prompts.select(rows.tolist()), completions, model)
            logps[index, : part.shape[1]] = part
        return logps

    def _score(self, prompts: Prompts, completions: Completions, model: QwenVL) -> Tensor:
        return self.logprobs(prompts, completions, model, self.sampling.temperature)
