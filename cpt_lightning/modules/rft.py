"""Reinforcement fine-tuning by group rollouts (GRPO)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cpt_lightning.functional import (
    AdvantageScale,
    Reduction,
    clipped_policy_loss,
    group_normalized_advantages,
    kl_k3,
    masked_mean,
    token_weights,
    weighted_sum,
    zero_signal_fraction,
)
from cpt_lightning.models.adapters import has_adapters
from cpt_lightning.models.qwen_vl import encode_images, has_dropout, vision_is_frozen
from cpt_lightning.models.sharding import gather, is_sharded
from cpt_lightning.modules.reference import Reference, ReferenceKind
from cpt_lightning.modules.updates import Loss, ManualUpdates, UpdateStats
from cpt_lightning.rewards import YES_NO_COUNTS, OverlongPenalty, score
from cpt_lightning.rollouts import Sampling, run_prompts, sample_groups
from cpt_lightning.rollouts.sampling import row_generators
from cpt_lightning.types import Batch, Completions, Prompts, Rollout

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

STATE_PAYS_FROM = 2 / 3
"""Share of the groups that must have a gradient for the rollout's pass over the prompts to be worth going back through:
backward, two thirds of a step's work, goes through all of its prompts or none."""


@dataclass
class Policy:
    """What stays fixed over the updates that learn from a rollout.

    Args:
        advantages: ``[B, G]``.
        row_weights: ``[B]`` weight of each prompt in the loss.
        old_logps: ``[N, T]`` under the policy that sampled; ``None`` if there is one update only, before which the
            policy is still that one.
        ref_logps: ``[N, T]`` under the reference; ``None`` without a KL term.
    """

    advantages: Tensor
    row_weights: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None


class RFT(ManualUpdates):
    """Reinforcement fine-tuning with GRPO (DeepSeekMath, arXiv 2402.03300): samples groups, learns from their rewards.

    A training batch is a rollout: of each of its prompts (``data.prompts_per_step``) ``group_size`` completions are
    sampled, and learned from in ``updates_per_rollout`` optimizer steps.

    Args:
        group_size: Completions of each prompt.
        sampling: How completions are drawn.
        updates_per_rollout: Optimizer steps over which the prompts of a rollout are spread.
        passes_per_rollout: How often the prompts of a rollout are gone through (mu in GRPO).
        rollout_batch_prompts: Prompts whose groups are sampled at once; all by default. Limits memory.
        micro_batch_prompts: Prompts whose groups go through backward at once; all by default. Limits memory, and
            changes no result.
        advantage_scale: ``std`` divides by the group's standard deviation (GRPO), ``none`` does not (Dr. GRPO).
        clip_low: How far below 1 the ratio to the sampling policy may fall and still be learned from.
        clip_high: How far above 1 it may rise and still be learned from.
        dual_clip: Bounds the loss of completions with a negative advantage (paper A: 3.0); off by default.
        reduction: How the loss averages over tokens: ``token_mean``, ``sequence_mean``, or ``constant``, which divides
            token sums by ``sampling.max_new_tokens`` (Dr. GRPO).
        kl_coef: Weight of the KL term (k3 estimator) that holds the policy to the reference; 0 needs no reference.
        reference: ``task_start`` is the model as it was when the task began (paper A), ``base`` as it was loaded.
        overlong_margin: Tokens before ``sampling.max_new_tokens`` over which a penalty for the length grows from 0 to
            -1, added to the reward (DAPO, arXiv 2503.14476, eq. 13) and logged as ``train/reward/overlong``; off by
            default.
        **kwargs: Options of :class:`PostTraining`.
    """

    def __init__(
        self,
        group_size: int = 8,
        sampling: Sampling = Sampling(max_new_tokens=64),  # noqa: B008 a dataclass that is never changed
        updates_per_rollout: int = 1,
        passes_per_rollout: int = 1,
        rollout_batch_prompts: int | None = None,
        micro_batch_prompts: int | None = None,
        advantage_scale: AdvantageScale = "std",
        clip_low: float = 0.2,
        clip_high: float = 0.3,
        dual_clip: float | None = None,
        reduction: Reduction = "token_mean",
        kl_coef: float = 0.0,
        reference: ReferenceKind = "task_start",
        overlong_margin: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if group_size < 2:
            raise ValueError(
                f"group_size={group_size}: a completion is compared with its siblings, so sample 2 or more"
            )
        if sampling.prefix:
            raise ValueError(
                f"sampling.prefix={sampling.prefix!r}: RFT learns from what was sampled, not from what was forced"
            )
        if sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 makes all completions of a group the same; use e.g. 1.0")
        for name, value in {"kl_coef": kl_coef, "clip_low": clip_low, "clip_high": clip_high}.items():
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if dual_clip is not None and dual_clip <= 1:
            raise ValueError(f"dual_clip={dual_clip} bounds ratios above 1, so it must be above 1 (paper A: 3.0)")
        if overlong_margin is not None and not 1 <= overlong_margin <= sampling.max_new_tokens:
            raise ValueError(
                f"overlong_margin={overlong_margin} must be a number of tokens from 1 to "
                f"sampling.max_new_tokens={sampling.max_new_tokens}; null switches the penalty off"
            )
        _check_positive(
            updates_per_rollout=updates_per_rollout,
            passes_per_rollout=passes_per_rollout,
            rollout_batch_prompts=rollout_batch_prompts,
            micro_batch_prompts=micro_batch_prompts,
        )
        self.group_size = group_size
        self.sampling = sampling
        self.updates_per_rollout = updates_per_rollout
        self.passes_per_rollout = passes_per_rollout
        self.rollout_batch_prompts = rollout_batch_prompts
        self.micro_batch_prompts = micro_batch_prompts
        self.advantage_scale: AdvantageScale = advantage_scale
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.reduction: Reduction = reduction
        self.kl_coef = kl_coef
        self.reference_kind: ReferenceKind = reference
        self.overlong = None if overlong_margin is None else OverlongPenalty(sampling.max_new_tokens, overlong_margin)

    # -- the algorithm -------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Samples groups, rewards them, and updates the policy."""
        self.start_step(batch, batch_idx)
        rollout = self.collect(batch.prompts, batch_idx)
        with self.timed("update"):
            policy = self.prepare(rollout)
            stats = [
                part
                for rows in self.update_rows(range(len(batch)))
                for part in self.update(self.policy_losses(rollout, policy, rows), batch.prompts)
            ]
        self.log_rollout(rollout)
        self.log_updates(stats, self.updates_per_step)

    def collect(self, prompts: Prompts, batch_idx: int) -> Rollout:
        """Samples a group of completions of every prompt and has them rewarded."""
        with self.timed("rollout"):
            prompts = self.compute_once(prompts)
            size = self.rollout_batch_prompts or len(prompts)
            chunks = [prompts.select(rows.tolist()) for rows in torch.arange(len(prompts)).split(size)]
            completions = Completions.cat(
                [
                    sample_groups(self.model, self.processor, chunk, self.group_size, self.sampling, generators)
                    for chunk in chunks
                    for generators in [row_generators(self.device, chunk, self.seed, self.current_epoch, batch_idx)]
                ],
                pad_id=self.processor.pad_token_id,
            )
            texts = self.processor.decode(completions)
            self.account.add_flops(self.flops.sampled(prompts, completions))
            self.account.add_tokens(prompts, completions)
        with self.timed("reward"):
            examples = [example for example in prompts.examples for _ in range(self.group_size)]
            scores = score(texts, examples, self.overlong, completions.lengths.tolist())
        # The counts are for precision and recall of an evaluation; tasks without them would draw their means to 0 here.
        names = sorted({name for each in scores for name in each}.difference(YES_NO_COUNTS))
        parts = {name: torch.tensor([each.get(name, 0.0) for each in scores], device=self.device) for name in names}
        parts = {name: part.view(-1, self.group_size) for name, part in parts.items()}
        return Rollout(prompts, completions, texts, rewards=parts.pop("total"), reward_parts=parts)

    def compute_once(self, prompts: Prompts) -> Prompts:
        """Computes what both rollout and update need of the prompts, where the update may use the rollout's.

        An update on the weights that sampled takes the whole pass over prompts and images, gradients included, if all
        groups go through backward at once and nothing is dropped out. Otherwise a frozen vision tower's features are
        what stays the same.
        """
        all_at_once = self.rollout_batch_prompts is None and self.micro_batch_prompts is None
        if self.updates_per_step == 1 and all_at_once and not has_dropout(self.model):
            return replace(prompts, state=run_prompts(self.model, prompts))
        if vision_is_frozen(self.model):
            with torch.no_grad():
                return replace(prompts, image_features=encode_images(self.model, prompts))
        return prompts

    def prepare(self, rollout: Rollout) -> Policy:
        """Turns rewards into advantages, and scores the completions where later updates need the scores of now."""
        policy = Policy(
            advantages=group_normalized_advantages(rollout.rewards, self.advantage_scale),
            row_weights=torch.ones(len(rollout.prompts), device=self.device),
        )
        if self.updates_per_step > 1:
            with torch.no_grad():
                policy.old_logps = self._logps(self.model, rollout)
        if self.kl_coef:
            with self.reference.model(self.model) as reference:
                policy.ref_logps = self._logps(reference, rollout)
        return policy

    def policy_losses(self, rollout: Rollout, policy: Policy, rows: Sequence[int]) -> list[Loss]:
        """The loss of one update on the groups of ``rows``, in micro-batches that add up to it."""
        mask = rollout.completions.mask[self._completions_of(rows)]
        num_tokens = self.mean_over_ranks(mask.sum()).item()
        # Without a KL term a group of equal rewards has no gradient, so it costs no forward either.
        has_gradient = policy.advantages.any(dim=1) | bool(self.kl_coef)
        rows = [row for row in rows if has_gradient[row]]
        if len(rows) < STATE_PAYS_FROM * len(rollout.prompts):
            rollout = replace(rollout, prompts=replace(rollout.prompts, state=None))
        size = self.micro_batch_prompts or max(1, len(rows))
        weigh = partial(
            token_weights,
            reduction=self.reduction,
            constant=self.sampling.max_new_tokens if self.reduction == "constant" else None,
            num_sequences=len(mask),
            num_tokens=num_tokens,
        )
        micro_batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [partial(self.policy_loss, rollout, policy, micro, weigh) for micro in micro_batches]

    def policy_loss(
        self, rollout: Rollout, policy: Policy, rows: Sequence[int], weigh: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, UpdateStats]:
        """A micro-batch's share of the loss of its update."""
        index = self._completions_of(rows)
        completions = rollout.completions.select(index)
        mask, length = completions.mask, completions.mask.shape[1]
        logps = self._score(rollout.prompts.select(rows), completions, self.model)
        old_logps = logps.detach() if policy.old_logps is None else policy.old_logps[index, :length]
        weights = weigh(mask) * policy.row_weights[rows].repeat_interleave(self.group_size)[:, None]
        loss, policy_stats = clipped_policy_loss(
            logps,
            old_logps,
            policy.advantages[rows].flatten(),
            mask,
            weights,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        stats = UpdateStats(loss.detach(), policy_stats)
        if policy.ref_logps is not None:
            kl = kl_k3(logps, policy.ref_logps[index, :length], mask)
            loss = loss + self.kl_coef * weighted_sum(kl, weights, mask)
            stats = UpdateStats(loss.detach(), policy_stats, masked_mean(kl.detach(), mask))
        return loss, stats

    # -- parts of a step -----------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the backbone, and for training the reference if the KL term needs one."""
        super().configure_model()
        is_fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if self.kl_coef and is_fitting and "reference" not in self._modules:
            # What is in shards cannot be copied: then the reference is loaded like the policy.
            policy = self.load_model() if is_sharded(self.model) and not has_adapters(self.model) else self.model
            self.reference = Reference(policy, self.reference_kind)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the reference out where there is none: to evaluate, or to go on without a KL term."""
        if "reference" not in self._modules:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: weights[k] for k in weights if not k.startswith("reference.")}

    @property
    def steps_of_task(self) -> int:
        """Optimizer steps of the task that is being learned."""
        return int(self.trainer.num_training_batches) * self.updates_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a training step."""
        return self.updates_per_rollout * self.passes_per_rollout

    def start_step(self, batch: Batch, batch_idx: int) -> None:
        """Checks the size of the batch, says once what a step is, and renews the reference when a task begins."""
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
        if batch_idx == 0 and self.kl_coef:
            self.reference.start_task(self.model)
            gather(self.model)

    def update_rows(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Which prompts each update of the rollout learns from."""
        parts = torch.tensor(list(rows), dtype=torch.long).tensor_split(self.updates_per_rollout)
        for _ in range(self.passes_per_rollout):
            yield from (part.tolist() for part in parts)

    def _completions_of(self, rows: Sequence[int]) -> list[int]:
        return [row * self.group_size + member for row in rows for member in range(self.group_size)]

    def _logps(self, model: QwenVL, rollout: Rollout) -> Tensor:
        """``[N, T]`` of the whole rollout, in micro-batches, by a model that need not be the one that sampled."""
        prompts, num_prompts = replace(rollout.prompts, state=None), len(rollout.prompts)
        logps = torch.zeros(rollout.completions.mask.shape, device=self.device, dtype=torch.float32)
        for rows in torch.arange(num_prompts).split(self.micro_batch_prompts or num_prompts):
            index = self._completions_of(rows.tolist())
            completions = rollout.completions.select(index)
            part = self._score(prompts.select(rows.tolist()), completions, model)
            logps[index, : part.shape[1]] = part
        return logps

    def _score(self, prompts: Prompts, completions: Completions, model: QwenVL) -> Tensor:
        return self.logprobs(prompts, completions, model, self.sampling.temperature)

    # -- what is shown -------------------------------------------------------------------------------------------

    def log_rollout(self, rollout: Rollout) -> None:
        """Logs rewards and what the completions look like."""
        completions = rollout.completions
        ended = (torch.isin(completions.ids, completions.ids.new_tensor(self.processor.stop_token_ids))).any(dim=1)
        shown = {
            "train/completion_length": completions.lengths.float().mean(),
            "train/truncated_fraction": (~ended).float().mean(),
            "train/zero_signal_groups": zero_signal_fraction(rollout.rewards),
        }
        # Not exchanged: tasks have different parts, and ranks may hold different tasks.
        self.log_dict({f"train/reward/{name}": part.mean() for name, part in rollout.reward_parts.items()})
        if completions.logps is not None:
            # The sampled tokens' mean surprise is an unbiased estimate of the entropy, and costs nothing.
            shown["train/entropy"] = -masked_mean(completions.logps, completions.mask)
        num_prompts = len(rollout.prompts)
        self.log_dict(shown, batch_size=num_prompts, sync_dist=True)
        self.log("train/reward", rollout.rewards.mean(), prog_bar=True, batch_size=num_prompts, sync_dist=True)


def _check_positive(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
