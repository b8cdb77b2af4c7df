"""cpt_lightning's own steps: the modules that users train, under a Lightning Trainer that shows and saves nothing."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from measure import StepMeter
from torch.utils.data import DataLoader
from workload import CLIP_HIGH, CLIP_LOW, MAX_GRAD_NORM, Setup, Workload, make_optimizer

from cpt_lightning.data.collate import Collate
from cpt_lightning.modules import RFT, SFT, PostTraining
from cpt_lightning.rollouts import Sampling
from cpt_lightning.types import Example


class Metered(PostTraining):
    """A module with a meter, which keeps how many operations a step has."""

    meter: StepMeter
    step_flops: dict[str, float]

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        """The optimizer has made its step."""
        self.meter.end("update")
        flops = self.account.flops
        self.step_flops = {
            "executed_flops": float(flops.executed),
            "equivalent_flops": float(flops.equivalent),
        }
        self.account.end(self.device)

    @property
    def results(self) -> dict[str, float]:
        """What was measured."""
        return {**self.meter.results(), **self.step_flops}


class MeteredRFT(Metered, RFT):
    """GRPO with a meter."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(
            backbone=workload.backbone,
            group_size=workload.group_size,
            sampling=Sampling(max_new_tokens=workload.new_tokens),
            micro_batch_prompts=workload.micro_prompts,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            max_grad_norm=MAX_GRAD_NORM,
            optimizer=make_optimizer,
        )
        self.workload = workload

    def collect(self, prompts, batch_idx):
        """A rollout, measured and checked."""
        rollout = super().collect(prompts, batch_idx)
        self.workload.check_lengths(rollout.completions.lengths.tolist())
        self.meter.end("rollout")
        return rollout


class MeteredSFT(Metered, SFT):
    """SFT with a meter, which also keeps the loss of the first step."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(
            backbone=setup.backbone,
            reduction="token_mean",
            max_grad_norm=MAX_GRAD_NORM,
            optimizer=make_optimizer,
        )

    def training_step(self, batch, batch_idx):
        """The loss."""
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 0:
            self.first_loss = loss.item()
        return loss


def grpo(workload: Workload) -> dict[str, float]:
    """Measures GRPO steps."""
    module = MeteredRFT(workload)
    fit(module, workload, workload.examples(module.processor))
    return module.results


def sft(setup: Setup, rows: Sequence[Example]) -> dict[str, float]:
    """Measures SFT steps on a batch of all rows."""
    module = MeteredSFT(setup)
    fit(module, setup, rows)
    return {**module.results, "first_loss": module.first_loss}


def fit(module: Metered, setup: Setup, rows: Sequence[Example]) -> None:
    """Trains on the same batch at every step."""
    module.configure_model()
    loader = DataLoader([*rows] * setup.num_steps, batch_size=len(rows), collate_fn=Collate(module.processor))
    trainer = L.Trainer(
        accelerator="gpu" if setup.device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.meter = StepMeter(setup.device, setup.warm_up)
    trainer.fit(module, loader, loader)  # the second is not used: without one Lightning 2.6 warns
