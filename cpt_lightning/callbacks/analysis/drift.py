"""Drift: how far the model has gone from the base, on prompts that it is not trained on."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from cpt_lightning.callbacks.analysis.base_model import BaseModel
from cpt_lightning.callbacks.analysis.measuring import Measuring
from cpt_lightning.functional import divergences
from cpt_lightning.models.qwen_vl import output_weight
from cpt_lightning.records.run import DRIFT
from cpt_lightning.rollouts import completion_hidden, run_prompts
from cpt_lightning.rollouts.sampling import sampling_mode
from cpt_lightning.types import Completions, Prompts

SHOWN = ("forward_kl", "reverse_kl", "total_variation", "top1_agreement")
"""What is logged of a measurement; the file has all of it."""


class Drift(Measuring):
    """Measures the divergence between the base and the current model, after every task and every ``n`` steps.

    On fixed prompts of the current task, of the tasks before it and of the probes, all from the split that is evaluated
    (``data.evaluate_on``), evenly spaced, with ``evaluation.prefix`` behind them if there is one. At each token of an
    answer the divergence is that of the whole vocabulary:

    - ``forward_kl``: KL(base || current) on answers that the base gave, which are drawn once (temperature 1);
    - ``reverse_kl``: KL(current || base) on answers that the current model gives;
    - ``total_variation`` and ``top1_agreement``: on the base's answers.

    They are means over tokens, in nats per token. Summed over an answer and averaged over answers, the divergences are
    estimates of those of whole answers, cut off at ``max_new_tokens``: ``forward_kl_per_answer`` and
    ``reverse_kl_per_answer``, in nats. A row draws with the same random numbers whenever it is asked, so that figures
    of different steps differ by what was learned and little by luck.

    Writes ``drift.json`` beside ``config.yaml``: an entry for each measurement, with ``stage`` (1 is the first) and
    ``step`` (batches of that stage so far). Logs ``drift/<task>/forward_kl`` and so on, and ``time/drift_s``, which is
    no part of ``time/step_s``. Ranks share the rows. Nothing that training draws or computes is changed. What a run
    took is printed at its end; at the defaults 3.6 % of ``cpt fit -c configs/demo/grpo.yaml`` (CPU, 2026-11-24).

    The base is the backbone as ``backbone.path`` has it, without an adapter. With LoRA it is the model with its adapter
    switched off and costs no memory; with full tuning, and with ``along_stream: renewed``, a frozen second copy of the
    weights is held in their dtype, one for all callbacks; under ``fsdp2`` in shards, and gathered to measure.

    Args:
        num_rows: Prompts of each task and probe. They are one batch: as many images and answers must fit.
        max_new_tokens: Longest answer.
        every_n_steps: Also measure after so many batches within a task; at its end alone by default.

    Raises:
        ValueError: A count below 1, or a checkpoint that was measured otherwise.
    """

    filename = DRIFT

    def __init__(self, num_rows: int = 8, max_new_tokens: int = 64, every_n_steps: int | None = None) -> None:
        super().__init__(num_rows, max_new_tokens, every_n_steps)

    # -- when --------------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, *_
    ) -> None:
        """Measures within a task; its end follows the validation."""
        if self.every_n_steps and (batch_idx + 1) % self.every_n_steps == 0 and not trainer.is_last_batch:
            self.measure(trainer, pl_module, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures what the task did; before its checkpoint is saved."""
        self.measure(trainer, pl_module, int(trainer.num_training_batches))

    # -- measuring ---------------------------------------------------------------------------------------------------

    def measure(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Adds a measurement of each task so far and of each probe to the record; all ranks must ask.

        Args:
            trainer: Whose stream and stage it is.
            module: Whose model.
            step: Batches of the stage so far.
        """
        stream, stage = trainer.datamodule, trainer.current_epoch
        names = [name for name in stream.task_names if any(name in tasks for tasks in stream.stages[: stage + 1])]
        start = time.perf_counter()
        with self.aside(trainer, module) as base:
            found = {name: self._measure(trainer, module, base, name) for name in [*names, *stream.probe_names]}
        seconds = time.perf_counter() - start
        self.measurements = [
            *self.measurements,
            *({"stage": stage + 1, "step": step, "name": name, **values} for name, values in found.items()),
        ]
        shown = {f"drift/{name}/{key}": values[key] for name, values in found.items() for key in SHOWN}
        self.log_dict({**shown, "time/drift_s": seconds}, batch_size=1, sync_dist=True)
        self.save(trainer)

    @torch.no_grad()
    def _measure(self, trainer: Trainer, module: LightningModule, base: BaseModel, name: str) -> dict[str, float]:
        """One task or probe, over all ranks."""
        asked = self._asked[name]
        rows = torch.zeros(asked.num_rows, 6, dtype=torch.float64, device=module.device)
        if asked.prompts is not None and asked.answers is not None:
            prompts, answers = (trainer.strategy.batch_to_device(each) for each in (asked.prompts, asked.answers))
            rows[asked.mine] = self._rows(module, base, name, prompts, answers)
        # A row is one rank's, so that sums do not depend on their number.
        sums = trainer.strategy.reduce(rows, reduce_op="sum").sum(dim=0).tolist()
        forward, variation, agreement, base_tokens, reverse, own_tokens = sums
        return {
            "forward_kl": forward / base_tokens,
            "reverse_kl": reverse / own_tokens,
            "forward_kl_per_answer": forward / asked.num_rows,
            "reverse_kl_per_answer": reverse / asked.num_rows,
            "total_variation": variation / base_tokens,
            "top1_agreement": agreement / base_tokens,
            "num_rows": asked.num_rows,
        }

    def _rows(
        self, module: LightningModule, base: BaseModel, name: str, prompts: Prompts, answers: Completions
    ) -> Tensor:
        """``[B, 6]`` sums over each row's tokens: of the base's answer, of the model's own, and how many there are."""
        model = module.model
        with sampling_mode(model), module.adapters_of(name):
            known = replace(prompts, state=run_prompts(model, prompts))
            own = self.answers(model, module, known)
            both = _in_turn(answers, own, module.processor.pad_token_id)
            hidden = completion_hidden(model, known, both)
        with base.model() as reference:
            ref_hidden, ref_weight = completion_hidden(reference, prompts, both), output_weight(reference)
        found = divergences(hidden, output_weight(model), ref_hidden, ref_weight)
        forward, reverse, variation, agreement = (both.unpacked(each).double().sum(dim=1) for each in found)
        of_base = torch.stack([forward, variation, agreement, both.lengths], dim=1)[0::2]
        of_model = torch.stack([reverse, both.lengths], dim=1)[1::2]
        return torch.cat([of_base, of_model], dim=1)


def _in_turn(one: Completions, other: Completions, pad_id: int) -> Completions:
    """``[2 B]`` completions: a prompt's first, then its second."""
    size = len(one)
    return Completions.cat([one, other], pad_id).select([row for pair in range(size) for row in (pair, size + pair)])
