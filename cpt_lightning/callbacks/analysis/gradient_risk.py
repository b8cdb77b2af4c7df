"""Gradient risk: how much of each update points to where earlier tasks and prior knowledge are sensitive."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cpt_lightning.callbacks.analysis.recorder import Recorder
from cpt_lightning.callbacks.methods.fisher import fisher_of_answers, gradient_risk, squared_norm, sum_of
from cpt_lightning.callbacks.methods.kept_weights import KeptWeights
from cpt_lightning.records.run import GRADIENT_RISK
from cpt_lightning.rollouts import Sampling
from cpt_lightning.types import Batch


class GradientRisk(Recorder, KeptWeights):
    """Measures the forgetting risk ``R(g) = g'Fg`` of the updates (paper A, arXiv 2507.05386, theory).

    F is the diagonal of the Fisher information, estimated when a task begins, at the weights of that moment, from the
    policy's own answers to held-out rows (``data.evaluate_on``, evenly spaced); the mean over the tasks learned before
    is ``earlier``, that over the probes ``probes``. g is the gradient as the optimizer gets it: of all micro-batches
    and ranks, with penalties, clipped. Logged, as means over a batch's optimizer steps:

    - ``risk/earlier``, ``risk/probes``: R(g), which grows with the square of the gradient's norm;
    - ``risk/earlier_per_weight``, ``risk/probes_per_weight``: ``R(g) / (|g|^2 mean(F))``. 1 is the risk of a gradient
      of the same norm that points anywhere, more means that it points to where F is large;
    - ``risk/grad_norm``: |g|.

    Objectives that sample groups log ``train/reward_variance`` beside it, the mean variance of a group's rewards, which
    by the paper's proposition scales the risk (``benchmarks/gradient_risk.py`` tests it).

    Writes ``gradient_risk.json`` beside ``config.yaml`` after every task: of each F its names and mean, and of each
    batch ``stage`` (1 is the first), ``step`` (batches of that stage so far) and the figures above. Nothing that
    training draws or computes is changed. F is kept in memory and in the checkpoint, as :class:`KeptWeights` says. All
    ranks look at the same rows. What a run took is printed at its end.

    Args:
        num_rows: Rows of each task and probe that F is estimated from, one backward pass each. A few answers that the
            policy itself finds unlikely weigh most, so the risk of text unlike its own needs many.
        max_new_tokens: Longest answer.
        with_probes: Also measure the risk to the probes, which stand for prior knowledge.
        every_n_steps: Optimizer steps from one that is measured to the next.

    Raises:
        ValueError: A count below 1; a run with nothing before its tasks to be forgotten, or in which every task has an
            adapter of its own; a checkpoint that was measured otherwise.
    """

    filename = GRADIENT_RISK

    def __init__(
        self, num_rows: int = 8, max_new_tokens: int = 64, with_probes: bool = True, every_n_steps: int = 1
    ) -> None:
        super().__init__()
        counts = {"num_rows": num_rows, "max_new_tokens": max_new_tokens, "every_n_steps": every_n_steps}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"GradientRisk: {name}={count} must be at least 1")
        self.num_rows = num_rows
        self.sampling = Sampling(max_new_tokens)
        self.with_probes = with_probes
        self.every_n_steps = every_n_steps
        self.fishers: list[dict] = []
        self._steps: list[dict[str, Tensor]] = []  # of the batch, not logged yet
        self._is_due = False
        self._hook: RemovableHandle | None = None
        self._hooked: Optimizer | None = None

    @property
    def sets(self) -> list[torch.dtype | None]:
        """F of earlier tasks, and of the probes."""
        return [torch.float32] * (1 + self.with_probes)

    # -- when --------------------------------------------------------------------------------------------------------

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run in which there is nothing to measure."""
        stream = trainer.datamodule
        if stream is None:
            raise ValueError("GradientRisk needs a stream of tasks: call trainer.fit(module, datamodule=stream)")
        if pl_module.along_stream == "per_task":
            raise ValueError(
                "GradientRisk: backbone.lora.along_stream=per_task gives each task an adapter that no later update "
                "changes, so none is at risk; set it to shared or renewed"
            )
        before = [name for stage in range(stream.num_stages) for name in stream.earlier(stage)]
        if not before and not (self.with_probes and stream.probe_names):
            raise ValueError(
                "GradientRisk: no stage comes after a task that it does not learn itself, and there are no probes, so "
                "nothing could be forgotten; add data.probes (and leave with_probes at true)"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        """Looks at what came before when a task begins; one that is resumed half-way has it in its checkpoint."""
        # Not in on_train_epoch_start: an adapter that is renewed comes after that of callbacks.
        if batch_idx == 0:
            self.estimate(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Arranges to see the gradient behind the step, when penalties have been added and it has been clipped."""
        self._is_due = bool(self.kept) and trainer.global_step % self.every_n_steps == 0
        if self._is_due and optimizer is not self._hooked:
            self._unhook()
            self._hook = optimizer.register_step_post_hook(lambda *_: self._look(pl_module))
            self._hooked = optimizer

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, *_
    ) -> None:
        """Logs the batch's optimizer steps."""
        if not self._steps:
            return
        names = dict.fromkeys(name for step in self._steps for name in step)
        means = {name: torch.stack([step[name] for step in self._steps if name in step]).mean() for name in names}
        self._steps = []
        self.log_dict({f"risk/{name}": value for name, value in means.items()}, batch_size=1)
        found = {name: value.item() for name, value in means.items()}
        if (variance := trainer.callback_metrics.get("train/reward_variance")) is not None:
            found["reward_variance"] = variance.item()
        here = {"stage": trainer.current_epoch + 1, "step": batch_idx + 1}
        self.measurements = [*self.measurements, here | found]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record of a task."""
        self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks no more, and says what all of it cost."""
        self._unhook()
        super().on_train_end(trainer, pl_module)

    # -- measuring ---------------------------------------------------------------------------------------------------

    def estimate(self, trainer: Trainer, module: LightningModule) -> None:
        """Estimates F of what was learned before the current stage; all ranks must ask."""
        stream, stage = trainer.datamodule, trainer.current_epoch
        of = {"earlier": stream.earlier(stage), "probes": stream.probe_names if self.with_probes else []}
        self.kept = {}  # gives its memory back first
        with self.timed():
            with module.account.aside(), trainer.precision_plugin.forward_context():
                for whose, names in of.items():
                    if names:
                        self.kept[whose] = fisher_of_answers(module, self._rows(trainer, names), self.sampling)
            for whose, fisher in self.kept.items():
                mean = sum_of(fisher.values(), module.device).item() / sum(value.numel() for value in fisher.values())
                found = {"stage": stage + 1, "of": whose, "names": list(of[whose]), "mean": mean}
                self.fishers = [*self.fishers, found]

    def _rows(self, trainer: Trainer, names: list[str]) -> Iterator[tuple[int, Batch]]:
        """Of each task or probe, with its number: a row draws alike in every stage, and figures differ by learning."""
        stream = trainer.datamodule
        for name in names:
            batch = stream.rows_of_evaluation(name, self.num_rows)
            yield list(stream.everything).index(name), trainer.strategy.batch_to_device(batch)

    @torch.no_grad()
    def _look(self, module: LightningModule) -> None:
        """Measures the gradient that a step has just been made with."""
        if not self._is_due:
            return
        self._is_due = False
        with self.timed(), module.account.aside():
            norm = squared_norm(module)
            step = {"grad_norm": norm.sqrt()}
            for whose, fisher in self.kept.items():
                step[whose] = gradient_risk(module, fisher)
                anywhere = norm * self._means[whose]
                if anywhere > 0:  # not of a step without signal, or whose gradient was not finite and was dropped
                    step[f"{whose}_per_weight"] = step[whose] / anywhere
        self._steps.append(step)

    @property
    def _means(self) -> dict[str, float]:
        """The mean of each F that is kept: the latest of its kind."""
        return {found["of"]: found["mean"] for found in self.fishers}

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._hooked = None

    # -- the record --------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, int]:
        """What F is estimated from, and when updates are looked at."""
        return {
            "num_rows": self.num_rows,
            "max_new_tokens": self.sampling.max_new_tokens,
            "with_probes": self.with_probes,
            "every_n_steps": self.every_n_steps,
        }

    @property
    def record(self) -> dict:
        """The figures of batches, behind those of each F."""
        return {**self.settings, "fishers": self.fishers, "measurements": self.measurements}

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on with what a checkpoint held."""
        super().load_state_dict(state_dict)
        self.fishers = list(state_dict["fishers"])
