"""Influence: what single updates do to what the model knew before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from lightning import LightningModule, Trainer
from torch.optim import Optimizer

from cpt_lightning.callbacks.analysis.answer_scores import MEANS, AnswerScores, change_of, lasting_weight, scores_of
from cpt_lightning.callbacks.analysis.base_model import BaseModel
from cpt_lightning.callbacks.analysis.exact_influence import ExactInfluence
from cpt_lightning.callbacks.analysis.learned import Learned
from cpt_lightning.callbacks.analysis.measuring import Asked, Measuring
from cpt_lightning.models.qwen_vl import output_weight
from cpt_lightning.models.weights import Weights, copy_of
from cpt_lightning.records.run import INFLUENCE
from cpt_lightning.strategy import FSDP2

SHOWN = ("log_prob_change", "lbk", "cosine")
"""What is logged of a task or probe; the file has all."""


@dataclass
class Update:
    """An update that is being measured.

    Args:
        step: Its number in the stage.
        learned: What it learns from.
        gradient_squared: ``||G||^2`` over all ranks.
        lr: Learning rate.
        seconds: What had been measured before it took.
        before: Scores of this rank's answers before it, by name of task or probe.
        start: The trained weights before it, where gradients are wanted.
    """

    step: int
    learned: Learned
    gradient_squared: float
    lr: float
    seconds: float
    before: dict[str, AnswerScores | None] = field(default_factory=dict)
    start: Weights | None = None


class Influence(Measuring):
    """Measures what single updates do to prior knowledge: the base's own answers to tasks learned before and to probes.

    The answers x_v are greedy and drawn once, to fixed prompts from the split that is evaluated. Every ``n`` optimizer
    steps they are scored before a real update, on whatever it learns from (x_u), and after it. By the learning dynamics
    of arXiv 2506.23508, ``d log pi(x_v) = -eta A(x_v) K(x_v, x_u) G(x_u)``, this gives, as means over answers:

    - ``log_prob_change`` of a whole answer in nats, and ``rise_fraction``, the share of answers that became more
      probable: the direction;
    - ``lbk``, ``||d log pi(x_v)||^2 / (||A(x_v)||^2 ||G(x_u)||^2)`` over the whole vocabulary at each token, a lower
      bound of ``eta^2 ||K||^2``: the magnitude; with ``change_squared`` and ``jacobian_squared``, its parts, and
      ``gradient_squared`` of the update, its third.

    ``base_perplexity`` of each task is the base's, per token, of the completions that the update learned from: targets,
    or rollouts that have an advantage. With ``exact``, from the gradients over all trained weights:

    - ``cosine`` of that of log pi(x_v) and the direction in which the loss falls;
    - ``first_order_change``, the product of the first with the step that was taken: what ``log_prob_change`` would be
      if the step were small;
    - ``asymmetry`` in [0, 1] of what a plain gradient step on x_u does to log pi(x_v) and the converse, each of the
      length of the update; 0 in the limit of small steps.

    A change is that of the update as it was, its optimizer, clipping and penalties included; A, K and G know the loss
    alone. Adam's step does not grow with the gradient, so that under it ``lbk`` is large where G is small: compare
    objectives by their changes. In bfloat16 the changes of small learning rates drown in rounding.

    Writes ``influence.json`` beside ``config.yaml``: an entry for each update, with ``stage`` (1 is the first) and
    ``step`` (updates of that stage so far), and under ``on`` one for each task or probe. Logs
    ``influence/<name>/log_prob_change``, ``.../lbk``, ``.../cosine``, ``influence/<task>/base_perplexity``, and
    ``time/influence_s``, which is no part of ``time/step_s``. Ranks share the rows. Nothing that training draws or
    computes is changed. A measurement takes two passes over all x_v and one of the base over x_u; what a run took is
    printed at its end, at the defaults 5.8 % of ``cpt fit -c configs/demo/grpo.yaml`` (CPU, 2026-11-24). The base costs
    the memory that it costs :class:`Drift`; with full tuning a copy of the output matrix is held for as long as an
    update lasts.

    Args:
        num_rows: Prompts of each task and probe. They are one batch: as many images and answers must fit.
        max_new_tokens: Longest answer.
        every_n_steps: Optimizer steps from one measured update to the next.
        exact: Measure gradients too. For small models: each answer takes a pass back, another over x_u, and several
            copies of the trained weights in float32. Not under ``fsdp2``, and not with ``along_stream: per_task``.

    Raises:
        ValueError: A count below 1, a loss or precision that hides its gradient, ``exact`` where it has no meaning, or
            a checkpoint that was measured otherwise.
    """

    filename = INFLUENCE

    def __init__(
        self, num_rows: int = 4, max_new_tokens: int = 64, every_n_steps: int = 10, exact: bool = False
    ) -> None:
        super().__init__(num_rows, max_new_tokens, every_n_steps, temperature=0.0)
        self.exact = exact
        self._step = 0
        self._listening: Learned | None = None
        self._update: Update | None = None
        self._shown: dict[str, float] = {}

    # -- when --------------------------------------------------------------------------------------------------------

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what cannot be measured."""
        super().check_fit(trainer, pl_module)
        if not pl_module.learns_by_logprobs:
            raise ValueError(
                "Influence: the loss is held to a reference over the whole vocabulary, and its gradient G is not that "
                "of token log-probabilities; set model.init_args.kl_coef to 0, or for RFT kl_estimator to k1, k2 or k3"
            )
        if trainer.precision == "16-mixed":
            raise ValueError("Influence: trainer.precision=16-mixed scales the loss, and G with it; use bf16-mixed")
        if self.exact and isinstance(trainer.strategy, FSDP2):
            raise ValueError(
                "Influence: exact=true takes gradients apart from the update, which fsdp2 does not; set exact to "
                "false, or trainer.strategy to auto or ddp"
            )
        if self.exact and pl_module.along_stream == "per_task":
            raise ValueError(
                "Influence: exact=true with backbone.lora.along_stream=per_task: an update reaches no other task's "
                "adapter; set exact to false, or along_stream to shared or renewed"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks the base; a resumed run goes on within its task."""
        super().on_train_start(trainer, pl_module)
        self._listen(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task begins."""
        self._step = 0
        self._listen(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The update before this one is done, and what this one learns from is known."""
        self._finish(trainer, pl_module)
        self._step += 1
        if self._listening is not None:
            self._begin(trainer, pl_module, self._listening, float(optimizer.param_groups[0]["lr"]))
        self._listen(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        """The batch's last update is done."""
        self._finish(trainer, pl_module)
        # Not earlier: see PostTraining.configure_gradient_clipping.
        if self._shown:
            self.log_dict(self._shown, batch_size=1, sync_dist=True)
            self._shown = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens no more, and says what all of it cost."""
        pl_module.listener = self._listening = None
        super().on_train_end(trainer, pl_module)

    def _listen(self, module: LightningModule) -> None:
        """To the coming update, if it is to be measured."""
        assert self.every_n_steps is not None
        is_due = (self._step + 1) % self.every_n_steps == 0
        module.listener = self._listening = Learned(module.model) if is_due else None

    def state_dict(self) -> dict:
        """The record, and how many updates the task has behind it."""
        return {**super().state_dict(), "step": self._step}

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on with the record of a checkpoint, within its task."""
        super().load_state_dict(state_dict)
        self._step = state_dict["step"]

    # -- measuring ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin(self, trainer: Trainer, module: LightningModule, learned: Learned, lr: float) -> None:
        """Scores the answers before the update, unless there is nothing that it learns from."""
        squared = torch.tensor(learned.gradient_squared, dtype=torch.float64, device=module.device)
        # The gradient of the update is the mean over ranks of those of their losses.
        gradient_squared = float(trainer.strategy.reduce(squared, reduce_op="sum")) / trainer.world_size**2
        if gradient_squared == 0 or not math.isfinite(gradient_squared):
            return
        self._update = update = Update(self._step, learned, gradient_squared, lr, self._seconds)
        with self.aside(trainer, module):
            weight = lasting_weight(module.model)
            for name, asked in self._prior(trainer).items():
                update.before[name] = scores_of(trainer, module, name, asked, weight)
        if self.exact:
            update.start = copy_of(module)

    @torch.no_grad()
    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Scores the answers after the update, if one is being measured, and adds what it did to the record."""
        update, self._update = self._update, None
        if update is None:
            return
        with self.aside(trainer, module) as base:
            prior = self._prior(trainer)
            found = {name: self._change(trainer, module, update, name, asked) for name, asked in prior.items()}
            if update.start is not None:
                exact = ExactInfluence(trainer, module, update.learned, update.start).measure(prior)
                found = {name: {**values, **exact[name]} for name, values in found.items()}
            perplexity = self._base_perplexity(trainer, base, update.learned)
        measurement = {
            "stage": trainer.current_epoch + 1,
            "step": update.step,
            "lr": update.lr,
            "gradient_squared": update.gradient_squared,
            "base_perplexity": perplexity,
            "on": found,
        }
        self.measurements = [*self.measurements, measurement]
        self._shown = {f"influence/{name}/{key}": v[key] for name, v in found.items() for key in SHOWN if key in v}
        self._shown |= {f"influence/{task}/base_perplexity": value for task, value in perplexity.items()}
        self._shown["time/influence_s"] = self._seconds - update.seconds
        self.save(trainer)

    def _prior(self, trainer: Trainer) -> dict[str, Asked]:
        """What is no part of the stage: the tasks before it, and the probes."""
        stream, stage = trainer.datamodule, trainer.current_epoch
        earlier = {name for tasks in stream.stages[:stage] for name in tasks}.difference(stream.stages[stage])
        names = [*(name for name in stream.task_names if name in earlier), *stream.probe_names]
        return {name: self._asked[name] for name in names}

    def _change(
        self, trainer: Trainer, module: LightningModule, update: Update, name: str, asked: Asked
    ) -> dict[str, float]:
        """The means over a task's or probe's answers on all ranks."""
        rows = torch.zeros(asked.num_rows, len(MEANS), dtype=torch.float64, device=module.device)
        before = update.before[name]
        after = scores_of(trainer, module, name, asked, output_weight(module.model))
        if before is not None and after is not None:
            rows[asked.mine] = change_of(before, after, update.gradient_squared)
        # A row is one rank's, so that sums do not depend on their number.
        means = trainer.strategy.reduce(rows, reduce_op="sum").mean(dim=0).tolist()
        return {**dict(zip(MEANS, means, strict=True)), "num_rows": asked.num_rows}

    def _base_perplexity(self, trainer: Trainer, base: BaseModel, learned: Learned) -> dict[str, float]:
        """By task, over all ranks."""
        names = trainer.datamodule.task_names
        with base.model() as model:
            mine = learned.surprise(model)
            table = torch.tensor([mine.get(name, (0.0, 0)) for name in names], dtype=torch.float64, device=model.device)
        nats, tokens = trainer.strategy.reduce(table, reduce_op="sum").unbind(dim=1)
        return {name: math.exp(nats[i] / tokens[i]) for i, name in enumerate(names) if tokens[i]}
