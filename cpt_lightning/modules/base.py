"""What every way of post-training shares: the backbone, the optimizer, and evaluation by generated answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from cpt_lightning.functional.logprobs import token_logprobs
from cpt_lightning.models import Backbone
from cpt_lightning.models.qwen_vl import output_weight
from cpt_lightning.models.sharding import is_sharded, own_part, unsteady, whole
from cpt_lightning.modules.accounting import Accounted
from cpt_lightning.modules.evaluating import Evaluating
from cpt_lightning.modules.schedules import TaskSchedule
from cpt_lightning.rollouts import (
    Attempts,
    Sampler,
    Sampling,
    completion_hidden,
    completion_logprobs,
    sample_groups,
)
from cpt_lightning.rollouts.sampling import keyed_generator, with_prefix
from cpt_lightning.strategy import FSDP2
from cpt_lightning.types import Batch, Completions, Prompts, Scored

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

SHARDED = (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)
"""Strategies that split weights over ranks."""

DRAWN_AT_ONCE = 8
"""Rows that :meth:`PostTraining.drawn` samples together: their images and keys must fit beside what training holds."""

NONFINITE_STEPS_ALLOWED = 5
"""After so many steps in a row without a finite gradient the run stops: it will not recover."""


class PostTraining(Accounted, Evaluating):
    """The base of all objectives: owns the backbone and the optimizer, and evaluates by letting the model answer.

    Args:
        backbone: The model that is tuned, and how.
        optimizer: Makes the optimizer from the trainable parameters; a fresh one for every task unless the callback
            ``ContinualLearning`` is told otherwise. On the command line and in files another class takes over what it
            also has of the options before it, of this default ``lr`` 1e-5 and ``weight_decay`` 0.01: give it its own.
        lr_scheduler: Makes the learning-rate schedule, stepped after every optimizer step; constant if not given.
        max_grad_norm: Gradients of a larger norm are scaled down to it. ``null`` switches clipping off.
        evaluation: How answers are drawn when the model is evaluated; greedy by default.
        forced_prefix: Evaluates every row a second time with the answer made to begin like this, logged as
            ``val/<task>/forced_accuracy``. With the base's own way to begin it tells knowledge that is lost from a
            style that is suppressed.
        attempts: Answers every row several times in ``predict``, to be collected; as in an evaluation if not given.
        sampler: Engine that draws the completions of rollouts, evaluations and the filter, such as
            :class:`~cpt_lightning.rollouts.VLLM`; ours if not given. What callbacks measure is always drawn by ours.
        peak_flops: Operations per second that the device can do, for ``perf/mfu``; known for common GPUs in bfloat16.
        seed: Keys all sampling of this module.
    """

    def __init__(
        self,
        backbone: Backbone = Backbone(),  # noqa: B008 a dataclass that is never changed
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        evaluation: Sampling = Sampling(max_new_tokens=64, temperature=0.0),  # noqa: B008
        forced_prefix: str | None = None,
        attempts: Attempts | None = None,
        sampler: Sampler | None = None,
        peak_flops: float | None = None,
        seed: int = 0,
    ):
        super().__init__(peak_flops)
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm={max_grad_norm} must be positive; null switches clipping off")
        self.backbone = backbone
        self.make_optimizer = optimizer
        self.make_schedule = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.evaluation = evaluation
        self.forced_prefix = forced_prefix
        self.attempts = attempts
        self.sampler = sampler
        self.seed = seed
        self.listener: Callable[[Scored], None] | None = None  # is told what an update learns from
        self._nonfinite_in_a_row = 0

    def configure_model(self) -> None:
        """Loads the backbone, once, and says what it is."""
        self._check_strategy()
        is_new = "model" not in self._modules
        super().configure_model()
        if is_new and self._trainer is not None:
            trained, total = (self.model.num_parameters(only_trainable=only) / 1e6 for only in (True, False))
            rank_zero_info(
                f"model: {self.backbone.path}, {trained:,.1f} of {total:,.1f} million parameters are trained "
                f"({self.backbone.tuning}, {self.backbone.dtype}), on {self._trainer.strategy.root_device} x "
                f"{self._trainer.world_size}"
            )

    def _check_strategy(self) -> None:
        """Refuses to split what must stay whole, and to split by other means than ours.

        Four-bit weights know their scales by an attribute of the tensor, which no sharding takes along. Under other
        strategies a rank would clip by the norm of its own share of the gradient, and sample from its share of weights.
        """
        if self._trainer is None or not isinstance(self._trainer.strategy, SHARDED):
            return
        if self.backbone.tuning == "qlora":
            raise ValueError(
                f"backbone.tuning=qlora: {type(self._trainer.strategy).__name__} would split four-bit weights and lose "
                "their scales; set trainer.strategy to auto or ddp, or backbone.tuning to lora"
            )
        if self.along_stream != "shared":
            raise ValueError(
                f"backbone.lora.along_stream={self.along_stream}: {type(self._trainer.strategy).__name__} splits "
                "adapters and weights over ranks, which are exchanged and merged whole; set trainer.strategy to auto "
                "or ddp, or along_stream to shared"
            )
        if not isinstance(self._trainer.strategy, FSDP2):
            raise ValueError(
                f"trainer.strategy={type(self._trainer.strategy).__name__}: every rank would clip by the norm of its "
                "own share of the gradient, and sample without the whole weights; set trainer.strategy to fsdp2"
            )

    def load_model(self) -> QwenVL:
        """The backbone; without its weights where the strategy brings this rank its share of them."""
        strategy = self._trainer and self._trainer.strategy
        return self.backbone.load_model(on_meta=isinstance(strategy, FSDP2) and strategy.receives_weights)

    # -- optimization --------------------------------------------------------------------------------------------

    def configure_optimizers(self):
        """A fresh optimizer over what is trainable, with its schedule if there is one."""
        optimizer = self.make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self.make_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_schedule(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Refuses Trainer options that would silently do nothing, or that another option replaces."""
        super().on_fit_start()
        if self.trainer.gradient_clip_val is not None:
            raise ValueError(
                "trainer.gradient_clip_val: set model.init_args.max_grad_norm instead, for every objective"
            )

    def on_train_epoch_start(self) -> None:
        """A task begins: its schedule learns how long it lasts."""
        super().on_train_epoch_start()
        schedule = self.lr_schedulers()
        if isinstance(schedule, TaskSchedule):
            schedule.start_task(self.steps_of_task)

    @property
    def steps_of_task(self) -> int:
        """Optimizer steps of the task that is being learned."""
        return -(-int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clips by norm, and logs the gradient's norm and the learning rate of the coming step."""
        # Not in on_before_optimizer_step: once another hook logs, Lightning (2.6) drops what training_step had logged
        # before its optimizer step in the first batch of an epoch.
        self.log_clipping(self.clip_gradients_by_norm(optimizer))

    def log_clipping(self, shown: dict[str, Tensor | float]) -> None:
        """Logs what :meth:`clip_gradients_by_norm` tells."""
        for name, value in shown.items():
            self.log(name, value, prog_bar=name == "train/nonfinite_steps")

    def clip_gradients_by_norm(self, optimizer) -> dict[str, Tensor | float]:
        """Scales a large gradient down; drops one that is not finite, so that the step changes nothing.

        Returns:
            What to log: ``train/grad_norm``, ``train/lr``, and where a gradient was dropped ``train/nonfinite_steps``.

        Raises:
            FloatingPointError: Gradients were not finite several times in a row.
        """
        self._forget_untouched_vision()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        limit = torch.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = whole(nn.utils.clip_grad_norm_(parameters, limit))
        shown: dict[str, Tensor | float] = {"train/grad_norm": norm, "train/lr": float(optimizer.param_groups[0]["lr"])}
        if torch.isfinite(norm):
            self._nonfinite_in_a_row = 0
            return shown
        optimizer.zero_grad(set_to_none=True)
        self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row >= NONFINITE_STEPS_ALLOWED:
            raise FloatingPointError(
                f"{self._nonfinite_in_a_row} steps in a row had a gradient that is not finite "
                f"(step {self.global_step}); "
                "lower the learning rate, or use bf16-mixed or 32-true precision"
            )
        return {**shown, "train/nonfinite_steps": float(self._nonfinite_in_a_row)}

    def _forget_untouched_vision(self) -> None:
        """Where no image and no penalty gave the vision tower a gradient, on any rank, lets the optimizer pass it by.

        A zero, as :meth:`anchored` leaves, would have weight decay and moments move it; one process has none at all.
        """
        reached = [weight for weight in self.model.model.visual.parameters() if weight.grad is not None]
        if not reached:  # on all ranks alike: the tower is frozen, or nothing is learned
            return
        is_touched = torch.tensor(any(bool(own_part(weight.grad).any()) for weight in reached), device=self.device)
        if not self.trainer.strategy.reduce(is_touched.int(), reduce_op="max"):
            for weight in reached:
                weight.grad = None

    # -- shared by objectives ------------------------------------------------------------------------------------

    def logprobs(
        self, prompts: Prompts, completions: Completions, model: QwenVL | None = None, temperature: float = 1.0
    ) -> Tensor:
        """``[N, T]`` log-probabilities of completions in nats, by the policy or another model."""
        self.account.add_flops(self.flops.scored(prompts, completions, backward=torch.is_grad_enabled()))
        model = model or self.model
        hidden = completion_hidden(model, prompts, completions)
        logps = token_logprobs(hidden, output_weight(model), completions.ids[completions.mask], temperature)
        if self.listener is not None and logps.requires_grad:
            self.listener(Scored(prompts, completions, hidden.detach(), logps, temperature))
        return completions.unpacked(logps)

    @property
    def prefixes(self) -> dict[str, str]:
        """What replies are made to begin with, by the option that says so; an option that forces nothing is no part."""
        return {"evaluation.prefix": self.evaluation.prefix} if self.evaluation.prefix else {}

    @property
    def learns_by_logprobs(self) -> bool:
        """Whether the loss knows of the policy only the log-probabilities of the tokens that it learns."""
        return True

    def drawn(self, batch: Batch, sampling: Sampling, *key: int) -> Batch:
        """The batch with completions that the policy draws, one of each row, in the place of its targets.

        Always by our own engine: callbacks measure the policy by them. What evaluations have them begin with
        (``evaluation.prefix``) belongs to the prompts of the result.

        Args:
            batch: B rows.
            sampling: How the policy draws.
            key: What the draws depend on, besides the seed and a row's place: the same on every rank.
        """
        completions = []
        prefix = self.processor.encode_prefix(self.evaluation.prefix)
        batch = replace(batch, prompts=with_prefix(batch.prompts, prefix))
        for rows in torch.arange(len(batch)).split(DRAWN_AT_ONCE):
            generators = [keyed_generator(self.device, self.seed, *key, row) for row in rows.tolist()]
            prompts = batch.prompts.select(rows.tolist())
            completions.append(sample_groups(self.model, self.processor, prompts, 1, sampling, generators))
        return replace(batch, targets=Completions.cat(completions, self.processor.pad_token_id))

    def log_likelihoods(self, batch: Batch) -> Tensor:
        """``[B]`` log-probability of every row's target, in nats; callbacks measure the policy by its gradient.

        Raises:
            ValueError: A row has no target.
        """
        # Not by `logprobs`: this is looked at, and not learned from.
        return completion_logprobs(self.model, batch.prompts, targets_of(batch)).sum(dim=1)

    @property
    def ranks_go_back_alike(self) -> bool:
        """Whether the backward passes of a step go through each decoder layer equally often on every rank.

        Then ``fsdp2`` need not hold the gradients of all layers at once. An objective whose ranks may differ says
        ``False``; under ``fsdp2`` each must go back once at least, as :meth:`ManualUpdates.update` sees to.
        """
        return True

    def anchored(self, loss: Tensor) -> Tensor:
        """The same loss, with every trainable parameter in its graph where there are several ranks.

        These wait for a gradient of each, and a batch without an image gives the vision tower none. Shards of decoder
        layers have theirs anyway.
        """
        if self.trainer.world_size == 1:
            return loss
        mine = unsteady(self.model) if is_sharded(self.model) else [p for p in self.parameters() if p.requires_grad]
        return loss + sum(parameter.sum() for parameter in mine) * 0

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all ranks; every rank must call it."""
        return self.trainer.strategy.reduce(value.detach().clone().float(), reduce_op="mean")


def targets_of(batch: Batch) -> Completions:
    """The reference completions of a batch.

    Raises:
        ValueError: A row has none; names it.
    """
    if batch.targets is None:
        row = next((example for example in batch.prompts.examples if example.target is None), None)
        where = f"row {row.row_id} of task {row.task!r}" if row else "this batch"
        raise ValueError(f"{where} has no target to learn by SFT: give its task a `target` template, e.g. '{{answer}}'")
    return batch.targets
