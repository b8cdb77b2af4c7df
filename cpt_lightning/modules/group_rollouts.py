"""The half of reinforcement fine-tuning that looks: groups of completions, and what they earn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor

from cpt_lightning.functional import masked_mean
from cpt_lightning.models.qwen_vl import QwenVL, encode_images, has_dropout, vision_is_frozen
from cpt_lightning.modules.updates import ManualUpdates
from cpt_lightning.rewards import YES_NO_COUNTS, OverlongPenalty, score
from cpt_lightning.rollouts import Sampling, run_prompts, sample_groups
from cpt_lightning.rollouts.sampling import row_generators, with_prefix
from cpt_lightning.tasks.checks import check_kinds
from cpt_lightning.types import Completions, Prompts, Rollout


class GroupRollouts(ManualUpdates):
    """For objectives that learn from groups of completions of their own.

    Args:
        group_size: Completions of each prompt.
        sampling: How completions are drawn; ``sampling.prefix`` is rewarded, and not learned: it belongs to the prompt.
        rollout_batch_prompts: Prompts whose groups are sampled at once; all by default. Limits memory.
        informative_prompts: Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): prompts are sampled
            ``rollout_batch_prompts`` at a time until so many groups have both better and worse answers, and only these
            are learned from. The rest of the batch is not sampled; if the batch ends first, what there is is learned
            from. So ``data.prompts_per_step`` bounds the tries; off by default.
        overlong_margin: Tokens before ``sampling.max_new_tokens`` over which a penalty for the length grows from 0 to
            -1, added to the reward (DAPO, eq. 13) and logged as ``train/reward/overlong``; off by default.
        learn_truncated: Learn from completions that were cut off at ``sampling.max_new_tokens`` (their reward counts
            for their siblings' advantages in any case). DAPO leaves them out.
        micro_batch_prompts: Prompts whose groups go through backward at once; all by default. Limits memory, and
            changes no result.
        **kwargs: Options of :class:`PostTraining`.
    """

    updates_per_rollout = 1

    def __init__(
        self,
        group_size: int = 8,
        sampling: Sampling = Sampling(max_new_tokens=64),
        rollout_batch_prompts: int | None = None,
        informative_prompts: int | None = None,
        overlong_margin: int | None = None,
        learn_truncated: bool = True,
        micro_batch_prompts: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_kinds(sampling=(sampling, Sampling))
        if sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 makes all completions of a group the same; use e.g. 1.0")
        if overlong_margin is not None and not 1 <= overlong_margin <= sampling.max_new_tokens:
            raise ValueError(
                f"overlong_margin={overlong_margin} must be a number of tokens from 1 to "
                f"sampling.max_new_tokens={sampling.max_new_tokens}; null switches the penalty off"
            )
        check_positive(
            group_size=group_size,
            rollout_batch_prompts=rollout_batch_prompts,
            informative_prompts=informative_prompts,
            micro_batch_prompts=micro_batch_prompts,
        )
        if informative_prompts is not None and rollout_batch_prompts is None:
            raise ValueError(
                f"informative_prompts={informative_prompts} samples rollout_batch_prompts prompts at a time until it "
                "has enough: say how many that are"
            )
        self.group_size = group_size
        self.sampling = sampling
        self.rollout_batch_prompts = rollout_batch_prompts
        self.informative_prompts = informative_prompts
        self.overlong = None if overlong_margin is None else OverlongPenalty(sampling.max_new_tokens, overlong_margin)
        self.learn_truncated = learn_truncated
        self.micro_batch_prompts = micro_batch_prompts

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a training step."""
        return 1

    @property
    def samples_greedy(self) -> bool:
        """Whether a greedy completion of each prompt is sampled and rewarded beside its group."""
        return False

    @property
    def goes_back_through_rollout(self) -> bool:
        """Whether the update uses the weights that sampled, on all groups at once: then their pass serves it too."""
        return False

    def collect(self, prompts: Prompts, batch_idx: int) -> Rollout:
        """Samples a group of completions of every prompt and has them rewarded."""
        with self.timed("rollout"):
            prefix = self.processor.encode_prefix(self.sampling.prefix)
            begun = self.processor.tokenizer.decode(prefix)
            prompts = self.compute_once(with_prefix(prompts, prefix))
        parts: list[Completions] = []
        texts: list[str] = []
        scores: list[dict[str, float]] = []
        for chunk in self._chunks(prompts):
            with self.timed("rollout"):
                first = len(texts) // self._per_prompt
                phase = f"rollout {first + 1}-{first + len(chunk)}/{len(prompts)}"
                parts.append(self._sample(chunk, batch_idx, phase))
                new = [begun + text for text in self.processor.decode(parts[-1])]
            with self.timed("reward"):
                examples = [example for example in chunk.examples for _ in range(self._per_prompt)]
                scores += score(new, examples, self.overlong, parts[-1].lengths.tolist())
            texts += new
            if self.informative_prompts and len(self._informative(scores)) >= self.informative_prompts:
                break
        self._let_sampler_sleep()
        rollout = self._rollout(prompts, Completions.cat(parts, self.processor.pad_token_id), texts, scores)
        return rollout if self.informative_prompts is None else self._of_informative(rollout, scores)

    def shares_prompt_pass(self, model: QwenVL) -> bool:
        """Whether the update goes back through the rollout's pass over prompts and images."""
        samples_all_at_once = self.sampler is None and self.rollout_batch_prompts is None
        return samples_all_at_once and self.goes_back_through_rollout and not has_dropout(model)

    def compute_once(self, prompts: Prompts) -> Prompts:
        """Computes what both rollout and update need of the prompts, where the update may use the rollout's.

        An update on the weights that sampled takes the whole pass over prompts and images, gradients included, if all
        groups go through backward at once, nothing is dropped out and our own engine samples. Otherwise a frozen vision
        tower's features are what stays the same.
        """
        if self.shares_prompt_pass(self.model):
            return replace(prompts, state=run_prompts(self.model, prompts))
        if vision_is_frozen(self.model):
            with torch.no_grad():
                return replace(prompts, image_features=encode_images(self.model, prompts))
        return prompts

    def _let_sampler_sleep(self) -> None:
        freed = None if self.sampler is None else self.sampler.sleep()
        if freed is not None:
            self.log("perf/sampler_freed_gb", freed / 1e9)

    @property
    def _per_prompt(self) -> int:
        return self.group_size + self.samples_greedy

    def _chunks(self, prompts: Prompts) -> Iterator[Prompts]:
        size = self.rollout_batch_prompts or len(prompts)
        if size >= len(prompts):
            yield prompts
            return
        for rows in torch.arange(len(prompts)).split(size):
            yield prompts.select(rows.tolist())

    def _sample(self, prompts: Prompts, batch_idx: int, phase: str) -> Completions:
        longest = self.sampling.max_new_tokens
        generators = row_generators(self.device, prompts, self.seed, self.current_epoch, batch_idx)
        sample = sample_groups if self.sampler is None else self.sampler.sample
        completions = sample(
            self.model,
            self.processor,
            prompts,
            self.group_size,
            replace(self.sampling, prefix=""),
            generators,
            with_greedy=self.samples_greedy,
            on_token=lambda token: self.say_phase(f"{phase}: {token}/{longest} tokens"),
        )
        self.account.add_flops(self.flops.sampled(prompts, completions))
        self.account.add_tokens(prompts, completions)
        self.account.add_rollouts(completions)
        return completions

    def _rollout(
        self, prompts: Prompts, completions: Completions, texts: Sequence[str], scores: Sequence[dict[str, float]]
    ) -> Rollout:
        """The rollout of the first prompts, as many as were sampled."""
        num_prompts = len(texts) // self._per_prompt
        parts = self._reward_parts(scores)
        rewards, greedy_rewards = parts.pop("total"), None
        if self.samples_greedy:
            greedy_rewards = rewards[:, -1]
            rewards, parts = rewards[:, :-1], {name: part[:, :-1] for name, part in parts.items()}
            sampled = [row for row in range(len(texts)) if (row + 1) % self._per_prompt]
            completions, texts = completions.select(sampled), [texts[row] for row in sampled]
            scores = [scores[row] for row in sampled]
        learned = None if self.learn_truncated else self._ended(completions).view_as(rewards)
        prompts = prompts if num_prompts == len(prompts) else prompts.select(range(num_prompts))
        return Rollout(prompts, completions, list(texts), rewards, parts, learned, greedy_rewards, list(scores))

    def _reward_parts(self, scores: Sequence[dict[str, float]]) -> dict[str, Tensor]:
        """Each ``[B, G]``, the total among them; without counts, which an evaluation makes precision and recall of."""
        names = sorted({name for each in scores for name in each}.difference(YES_NO_COUNTS))
        values = [[each.get(name, math.nan) for each in scores] for name in names]
        parts = torch.tensor(values, dtype=torch.float32, device=self.device)  # whatever the Trainer's precision
        return dict(zip(names, parts.view(len(names), -1, self._per_prompt), strict=True))

    def _ended(self, completions: Completions) -> Tensor:
        """``[N]`` whether each completion came to its end."""
        return completions.ended(self.processor.stop_token_ids)

    # -- dynamic sampling ----------------------------------------------------------------------------------------

    def _informative(self, scores: Sequence[dict[str, float]]) -> list[int]:
        """The prompts whose sampled completions differ in accuracy."""
        accuracy = torch.tensor([each["accuracy"] for each in scores]).view(-1, self._per_prompt)[:, : self.group_size]
        return (accuracy != accuracy[:, :1]).any(dim=1).nonzero().flatten().tolist()

    def _of_informative(self, rollout: Rollout, scores: Sequence[dict[str, float]]) -> Rollout:
        """The first informative groups, as many as are wanted; if there is none, one from which nothing is learned."""
        rows = self._informative(scores)
        num_prompts = len(rollout.prompts)
        share = torch.tensor(len(rows) / num_prompts, device=self.device)
        self.log_means({"train/informative_fraction": share}, count=num_prompts)
        return rollout.select(rows[: self.informative_prompts] or [0])

    # -- what is shown -------------------------------------------------------------------------------------------

    def log_rollout(self, rollout: Rollout, **means: Tensor) -> None:
        """Logs rewards and what the completions look like.

        Args:
            rollout: The groups; every rank must have some, see ``Rollout.counts``.
            **means: What else to log of them, each a mean over groups, by its name behind ``train/``.
        """
        completions = rollout.completions
        shown = {
            "train/reward": rollout.rewards.mean(),
            "train/completion_length": completions.lengths.float().mean(),
            "train/truncated_fraction": (~self._ended(completions)).float().mean(),
            **{f"train/{name}": value for name, value in means.items()},
        }
        if rollout.group_size > 1:
            shown["train/reward_variance"] = rollout.rewards.var(dim=1).mean()
        self.log_means(shown, count=len(rollout.prompts) * rollout.counts, prog_bar=["train/reward"])
        if completions.logps is not None:
            # The sampled tokens' mean surprise costs nothing, and without top-k and top-p estimates the entropy.
            surprise = -masked_mean(completions.logps, completions.mask)
            self.log_means({"train/entropy": surprise}, count=completions.mask.sum() * rollout.counts)
        parts = rollout.reward_parts if rollout.counts else {}
        self.log_means_of_some({f"train/reward/{name}": part for name, part in parts.items()})


def check_positive(**counts: object) -> None:
    """Refuses counts that are no whole numbers, or below 1.

    Raises:
        ValueError: Names the option.
    """
    for name, value in counts.items():
        if value is None:
            continue
        if not isinstance(value, Integral):
            raise ValueError(f"{name}={value!r} must be a whole number")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
