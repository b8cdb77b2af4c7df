"""What every way of post-training shares: the backbone, the optimizer, and evaluation by generated answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from cpt_lightning.checkpoint_io import is_within_task
from cpt_lightning.functional.logprobs import token_logprobs
from cpt_lightning.models import Backbone
from cpt_lightning.models.qwen_vl import output_weight
from cpt_lightning.modules.accounting import Accounted
from cpt_lightning.modules.clipping import ClippedGradients, check_clipping
from cpt_lightning.modules.evaluating import Evaluating
from cpt_lightning.modules.schedules import TaskSchedule
from cpt_lightning.rollouts import Attempts, Sampler, Sampling, completion_hidden
from cpt_lightning.rollouts.prefixes import prefixes_of
from cpt_lightning.strategy import FSDP2, check_strategy
from cpt_lightning.tasks.checks import check_kinds
from cpt_lightning.tasks.records import kind_of
from cpt_lightning.types import Completions, Prompts, Scored

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL


class PostTraining(Accounted, Evaluating, ClippedGradients):
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
        backbone: Backbone = Backbone(),
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        evaluation: Sampling = Sampling(max_new_tokens=64, temperature=0.0),
        forced_prefix: str | None = None,
        attempts: Attempts | None = None,
        sampler: Sampler | None = None,
        peak_flops: float | None = None,
        seed: int = 0,
    ):
        super().__init__(peak_flops)
        check_kinds(backbone=(backbone, Backbone), evaluation=(evaluation, Sampling))
        if attempts is not None:
            check_kinds(attempts=(attempts, Attempts))
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        for name, make in {"optimizer": optimizer, "lr_scheduler": lr_scheduler}.items():
            if make is not None and not callable(make):
                raise TypeError(
                    f"{name}={make!r} is {kind_of(make)}; give what makes one, such as lambda parameters: "
                    "torch.optim.AdamW(parameters, lr=1e-5), or for a schedule lambda optimizer: ..."
                )
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

    def configure_model(self) -> None:
        """Loads the backbone, once, and says what it is."""
        if self._trainer is not None:
            check_strategy(self._trainer.strategy, self.backbone)
            check_clipping(self._trainer)
        is_new = "model" not in self._modules
        super().configure_model()
        if is_new and self._trainer is not None:
            trained, total = (self.model.num_parameters(only_trainable=only) / 1e6 for only in (True, False))
            rank_zero_info(
                f"model: {self.backbone.path}, {trained:,.1f} of {total:,.1f} million parameters are trained "
                f"({self.backbone.tuning}, {self.backbone.dtype}), on {self._trainer.strategy.root_device} x "
                f"{self._trainer.world_size}"
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

    def check_checkpoint(self, where: str, checkpoint: Mapping[str, Any], is_fitting: bool) -> None:
        """Looks at the optimizer too, which a task that was begun goes on with."""
        super().check_checkpoint(where, checkpoint, is_fitting)
        if not is_fitting or not is_within_task(checkpoint):
            return
        # What an optimizer is can be told by the options of its parameters; versions of torch add some. Some take
        # matrices alone.
        before = checkpoint["optimizer_states"][0]["param_groups"][0].keys()
        optimizer = self.make_optimizer([nn.Parameter(torch.zeros(1, 1))])
        now = optimizer.param_groups[0].keys()
        if now - before and before - now - {"initial_lr"}:
            raise ValueError(
                f"{where} was written in the middle of a task by another optimizer than {type(optimizer).__name__} (it "
                f"knows no {sorted(now - before)[0]}); restore model.optimizer, or resume from a checkpoint at the end "
                "of a task"
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
        return prefixes_of(vars(self))

    @property
    def learns_by_logprobs(self) -> bool:
        """Whether the loss knows of the policy only the log-probabilities of the tokens that it learns."""
        return True

    @property
    def ranks_go_back_alike(self) -> bool:
        """Whether the backward passes of a step go through each decoder layer equally often on every rank.

        Then ``fsdp2`` need not hold the gradients of all layers at once. An objective whose ranks may differ says
        ``False``; under ``fsdp2`` each must go back once at least, as :meth:`ManualUpdates.update` sees to.
        """
        return True
