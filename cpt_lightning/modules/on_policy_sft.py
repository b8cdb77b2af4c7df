"""Supervised fine-tuning on the model's own right answers, sampled anew at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cpt_lightning.functional import Reduction, token_weights, weighted_sum
from cpt_lightning.modules.group_rollouts import GroupRollouts
from cpt_lightning.modules.updates import Loss, UpdateStats
from cpt_lightning.rollouts import Hint, Selection
from cpt_lightning.rollouts.selection import FATES, Fate
from cpt_lightning.tasks.checks import check_known
from cpt_lightning.types import Batch, Completions, Prompts, Rollout


@dataclass
class Chosen:
    """Prompts and those of their completions that are learned.

    Args:
        prompts: B' prompts that have one.
        completions: B' * G' completions; a prompt with fewer than G' fills up with some that are not learned.
        mask: ``[B' * G', T]`` tokens that are learned.
    """

    prompts: Prompts
    completions: Completions
    mask: Tensor


class OnPolicySFT(GroupRollouts):
    """Supervised fine-tuning on what the current model answered rightly a moment ago, its data fresh in every pass.

    A step samples ``group_size`` completions of each of its prompts, keeps those that ``selection`` lets through, and
    raises their probability in one optimizer step. Rows without one are passed over, and a batch without any leaves
    the weights as they are. Of equal weights and rows this is SFT on a file of rollouts; it is also REINFORCE with the
    reward 1 for what is kept and 0 for the rest.

    Logs ``train/kept_fraction`` of the completions, ``train/learned_rows``, the share of the rows that have one, and
    ``train/left_out/<reason>``, the share of the completions that each filter leaves out.

    Args:
        selection: Which completions are learned.
        hint: Shows the reference answer while completions are sampled, see :class:`~cpt_lightning.rollouts.Hint`; what
            is learned is asked without it. ``{}`` does so in its default words.
        reduction: How the loss averages over tokens: ``sequence_mean`` gives every kept completion the same weight,
            ``token_mean`` every token.
        **kwargs: Options of :class:`GroupRollouts` and :class:`PostTraining`.

    Raises:
        ValueError: An option out of range.
    """

    def __init__(
        self,
        selection: Selection = Selection(),
        hint: Hint | None = None,
        reduction: Reduction = "sequence_mean",
        **kwargs,
    ):
        # Which groups and completions are learned from is for the selection to say.
        super().__init__(informative_prompts=None, overlong_margin=None, learn_truncated=True, **kwargs)
        if prefix := self.sampling.prefix:
            raise ValueError(
                f"sampling.prefix={prefix!r}: what was forced would be missing in what is learned: omit it"
            )
        check_known(reduction=(reduction, Reduction))
        if reduction == "constant":
            raise ValueError("reduction='constant' belongs to RFT; SFT has 'sequence_mean' and 'token_mean'")
        self.selection = selection
        self.hint = hint
        self.reduction: Reduction = reduction

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Samples, keeps what is right, and learns it."""
        rollout = self._sample_hinted(batch.prompts, batch_idx)
        verdicts = self.judge(rollout)
        kept = torch.tensor([verdict == "kept" for verdict in verdicts], device=self.device).view_as(rollout.rewards)
        with self.timed("update"):
            stats = self.update(self.losses(rollout, kept), batch.prompts)
        self.log_rollout(rollout)
        self._log_kept(verdicts, kept)
        return self.log_updates(stats, num_updates=1)

    def _sample_hinted(self, prompts: Prompts, batch_idx: int) -> Rollout:
        """Groups of completions that the hint may have helped to, to prompts without it."""
        with self.timed("rollout"):
            prompts = self.compute_once(prompts)
        hinted = prompts if self.hint is None else self.hint.show(self.processor, prompts)
        return replace(self.collect(hinted, batch_idx), prompts=prompts)

    def judge(self, rollout: Rollout) -> list[Fate]:
        """What becomes of each of the N completions."""
        lengths = rollout.completions.lengths.tolist()
        ends = rollout.completions.ended(self.processor.stop_token_ids).tolist()
        verdicts: list[Fate] = []
        for start in range(0, len(lengths), self.group_size):
            group = slice(start, start + self.group_size)
            verdicts += self.selection.judge(rollout.texts[group], rollout.scores[group], lengths[group], ends[group])
        return verdicts

    def losses(self, rollout: Rollout, kept: Tensor) -> list[Loss]:
        """The loss of the update in micro-batches that add up to it; none if this rank kept nothing.

        Args:
            rollout: B groups.
            kept: ``[B, G]`` completions that are learned.
        """
        # Ranks keep unequally many: all divide by the mean, and the mean of their gradients is that of all completions.
        num_sequences, num_tokens = self.mean_counts(kept.sum(), rollout.completions.lengths[kept.flatten()].sum())
        weigh = partial(token_weights, reduction=self.reduction, num_sequences=num_sequences, num_tokens=num_tokens)
        rows = kept.any(dim=1).nonzero().flatten().tolist()
        size = self.micro_batch_prompts or max(1, len(rows))
        return [
            partial(self.loss, chosen(rollout, kept, rows[start : start + size]), weigh)
            for start in range(0, len(rows), size)
        ]

    def loss(self, chosen: Chosen, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, UpdateStats]:
        """A micro-batch's share of the negative log-likelihood of what is learned, in nats."""
        logps = self.logprobs(chosen.prompts, chosen.completions)
        loss = -weighted_sum(logps, weigh(chosen.mask), chosen.mask)
        return loss, UpdateStats(loss.detach())

    def _log_kept(self, verdicts: Sequence[Fate], kept: Tensor) -> None:
        shown = {"train/kept_fraction": kept.float().mean(), "train/learned_rows": kept.any(dim=1).float().mean()}
        fates = torch.tensor([FATES.index(verdict) for verdict in verdicts], device=self.device)
        for number, fate in enumerate(FATES):
            if fate != "kept":
                shown[f"train/left_out/{fate}"] = (fates == number).float().mean()
        self.log_means(shown, count=len(kept))


def chosen(rollout: Rollout, kept: Tensor, rows: Sequence[int]) -> Chosen:
    """What is learned of some prompts; they have as many completions each as the one that kept most.

    Args:
        rollout: B groups.
        kept: ``[B, G]`` completions that are learned.
        rows: Prompts that have one.
    """
    of_rows = kept[list(rows)]
    most = int(of_rows.sum(dim=1).max())
    members = of_rows.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    index = torch.tensor(list(rows), device=kept.device)[:, None] * kept.shape[1] + members
    completions = rollout.completions.select(index.flatten().tolist())
    learned = of_rows.gather(1, members).view(-1, 1)
    return Chosen(rollout.prompts.select(rows), completions, completions.mask & learned)
