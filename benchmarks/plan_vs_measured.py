"""What ``cpt plan`` says of a step's memory, and what the step takes.

    python benchmarks/plan_vs_measured.py                                           tiny and cpu-6m, on the CPU
    python benchmarks/plan_vs_measured.py --device cuda --preset qwen2.5-vl-3b --dtype bfloat16 --gradient_checkpointing

A real Trainer takes two steps on the worst batch of the plan. On the CPU its peak is that of the bytes of tensors that
live at once, which the allocator's habits do not blur; on a GPU that of allocated memory. Neither counts the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import torch
from presets import PRESETS, PresetBackbone
from torch.utils.data import DataLoader

from cpt_lightning.cli.plan.devices import Devices
from cpt_lightning.cli.plan.memory import make_plan
from cpt_lightning.cli.plan.phases import Workload
from cpt_lightning.cli.plan.worst_batch import full_completions, longest_prompts
from cpt_lightning.models.memory import LiveBytes
from cpt_lightning.modules import RFT, SFT, PostTraining
from cpt_lightning.rollouts import Sampling
from cpt_lightning.types import Batch, Example

NUM_STEPS = 2


@dataclass
class Case:
    """A step to plan and to take.

    Args:
        objective: ``sft``; ``rft``; ``rft in parts`` with several updates, micro-batches and a reference.
        preset: The model.
        tuning: ``full`` or ``lora``.
        checkpointing: Whether activations are computed again in backward.
        prompt_tokens: P.
        new_tokens: T.
        num_prompts: B.
        dtype: Of the weights.
        precision: The Trainer's.
        device: ``cpu`` or ``cuda``.
    """

    objective: str
    preset: str = "tiny"
    tuning: str = "full"
    checkpointing: bool = False
    prompt_tokens: int = 75
    new_tokens: int = 32
    num_prompts: int = 4
    dtype: str = "float32"
    precision: str = "32-true"
    device: str = "cpu"

    def module(self) -> PostTraining:
        """The module that learns."""
        parts = ["vision_tower", "language_model"] if self.checkpointing else []
        backbone = PresetBackbone(
            self.preset, tuning=self.tuning, gradient_checkpointing=parts, dtype=self.dtype, device=self.device
        )
        if self.objective == "sft":
            return SFT(backbone=backbone)
        options = {"updates_per_rollout": 2, "micro_batch_prompts": 1, "rollout_batch_prompts": 2, "kl_coef": 0.01}
        sampling = Sampling(max_new_tokens=self.new_tokens)
        return RFT(
            backbone=backbone, group_size=4, sampling=sampling, **(options if self.objective == "rft in parts" else {})
        )


def compare(case: Case) -> dict:
    """Planned and measured peak of a case, in bytes."""
    module = case.module()
    workload = Workload(case.prompt_tokens, case.new_tokens, 1, case.num_prompts, case.num_prompts)
    plan = make_plan(module, workload, Devices(precision=case.precision, foreach=case.device == "cuda"))
    phases = [phase for phase in plan.phases if phase.name != "evaluation"]
    planned = {phase.name: phase.total - phase.kinds["weights"] - phase.kinds.get("batch", 0) for phase in phases}
    module.configure_model()
    batch = worst_batch(module, case)
    measured = measure(module, batch, case)
    largest = max(planned.values())
    return {**asdict(case), "planned": planned, "planned_bytes": largest, "measured_bytes": measured,
            "ratio": largest / measured}  # fmt: skip


def worst_batch(module: PostTraining, case: Case) -> Batch:
    """The batch that the plan thinks of, with pixels."""
    prompts = longest_prompts(module.model, case.num_prompts, case.prompt_tokens, None)
    prompts.pixel_values = torch.rand(prompts.pixel_values.shape)
    prompts.examples = [Example("plan", f"row {row}", [], "", reward, target="") for row in range(len(prompts))]
    return Batch(prompts, full_completions(module.model, len(prompts), case.new_tokens))


def reward(completion: str, gold: str | list[str]) -> dict[str, float]:
    """Something that differs within every group."""
    score = float(sum(completion.encode()) % 7)
    return {"total": score, "accuracy": score}


def measure(module: PostTraining, batch: Batch, case: Case) -> int:
    """The most bytes of two steps, above those of weights and batch."""
    trainer = L.Trainer(
        max_epochs=1, accelerator=case.device, devices=1, precision=case.precision, logger=False,
        enable_checkpointing=False, limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
        inference_mode=False,
    )  # fmt: skip
    loader = DataLoader([batch] * NUM_STEPS, batch_size=None)
    gc.collect()
    if case.device == "cpu":
        with LiveBytes() as live:
            trainer.fit(module, train_dataloaders=loader)
        return live.peak
    batch_bytes = batch.prompts.pixel_values.nbytes
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, train_dataloaders=loader)
    return torch.cuda.max_memory_allocated() - start - batch_bytes


def cases(options: argparse.Namespace) -> list[Case]:
    """All that is asked for."""
    checkpointing = [True] if options.gradient_checkpointing else [False, True]
    return [
        Case(objective, preset, tuning, again, tokens, dtype=options.dtype, precision=options.precision,
             device=options.device)
        for preset in options.preset
        for tokens in options.prompt_tokens
        for objective in ("sft", "rft", "rft in parts")
        for tuning in ("full", "lora")
        for again in checkpointing
    ]  # fmt: skip


def main() -> None:
    """Compares all cases and writes the record."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--preset", nargs="+", choices=PRESETS, default=["tiny", "cpu-6m"])
    options.add_argument("--prompt_tokens", nargs="+", type=int, default=[75, 315])
    options.add_argument("--gradient_checkpointing", action="store_true", help="only cases with it")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed", "bf16-true"])
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan_vs_measured.json")
    chosen = options.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = []
    for case in cases(chosen):
        results.append(compare(case))
        line = "{preset} {objective} {tuning} checkpointing={checkpointing} P={prompt_tokens}: "
        line += "{planned_bytes:,} planned, {measured_bytes:,} measured, {ratio:.3f}"
        print(line.format(**results[-1]), flush=True)
    ratios = [result["ratio"] for result in results]
    device = torch.cuda.get_device_name() if chosen.device == "cuda" else "CPU"
    record = {"device": device, "torch": torch.__version__, "lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
    chosen.out.write_text(json.dumps(record | {"cases": results}, indent=1) + "\n")
    print(f"planned over measured: {min(ratios):.3f} to {max(ratios):.3f}; {chosen.out}")


if __name__ == "__main__":
    main()
