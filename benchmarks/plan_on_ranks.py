"""What ``cpt plan`` says of a rank's memory under ddp and fsdp2, and what a rank takes, on the CPU.

    python benchmarks/plan_on_ranks.py [--ranks 2] [--strategy ddp fsdp2] [--preset cpu-100m]

Every rank is a process of its own that takes three steps on its share of the worst batch. Its peak is what it holds in
main memory beyond what Python and the libraries held before there was a model: all of it, weights, shards, what is
exchanged and what the allocator has not given back. So the model is not a small one.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import socket
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import lightning as L
import torch
from plan_vs_measured import Case, worst_batch
from presets import PRESETS
from record import write_record
from torch.utils.data import DataLoader, Dataset
from transformers.utils.logging import disable_progress_bar

from cpt_lightning.cli.plan.devices import Devices
from cpt_lightning.cli.plan.memory import make_plan
from cpt_lightning.cli.plan.phases import Workload
from cpt_lightning.modules import PostTraining
from cpt_lightning.types import Batch

QUIET = {
    "logger": False, "enable_checkpointing": False, "limit_val_batches": 0, "enable_progress_bar": False,
    "enable_model_summary": False, "inference_mode": False, "use_distributed_sampler": False,
}  # fmt: skip
OBJECTIVES = ["sft", "rft", "rft in parts"]
TUNINGS = ["full", "lora"]
NUM_STEPS = 3
"""In the second ddp makes its buckets anew, so that they stand beside a whole step in the third for the first time."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Has glibc give memory of freed tensors back at once."""


def planned(case: Case, strategy: str, ranks: int) -> dict[str, int]:
    """Bytes of each phase, by the plan."""
    workload = Workload(case.prompt_tokens, case.new_tokens, 1, case.num_prompts, case.num_prompts)
    plan = make_plan(case.module(), workload, Devices(strategy, ranks, foreach=False))
    return {phase.name: phase.total for phase in plan.phases if phase.name != "evaluation"}


def measured(case: Case, strategy: str, ranks: int) -> int:
    """The most bytes that any rank held."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    inherited = mock.patch.dict(os.environ, {**ALLOCATOR, **place})
    with inherited, ProcessPoolExecutor(ranks, mp_context=get_context("spawn")) as pool:
        return max(pool.map(peak_of_rank, *zip(*[(case, strategy, rank, ranks) for rank in range(ranks)], strict=True)))


def peak_of_rank(case: Case, strategy: str, rank: int, ranks: int) -> int:
    """Three steps of one rank; the most bytes that it held, beyond those before there was a model."""
    quiet()
    torch.set_num_threads(1)
    share = replace(case, num_prompts=case.num_prompts // ranks)
    # What kernels and libraries take for themselves when they are first used is no part of a step.
    small = replace(share, preset="tiny")
    run(small.module(), small, L.Trainer(**QUIET, max_epochs=1, accelerator="cpu", devices=1))
    os.environ["LOCAL_RANK"] = str(rank)
    before = held("VmRSS")
    peak = Peak()
    run(case.module(), share, L.Trainer(
        **QUIET, max_epochs=1, accelerator="cpu", devices=ranks, strategy=strategy, callbacks=[peak]
    ))  # fmt: skip
    return peak.held - before


class Peak(L.Callback):
    """The most bytes that the process held during its steps."""

    held = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: object, number: int) -> None:
        """Forgets what setting up took."""
        if number == 0:
            tidy()
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_batch_end(self, *_: object) -> None:
        """Reads the high-water mark."""
        self.held = held("VmHWM", tidied=False)


class WorstBatch(Dataset):
    """The same batch at every step, made once there is a model."""

    def __init__(self, module: PostTraining, case: Case) -> None:
        self.module, self.case = module, case

    def __len__(self) -> int:
        return NUM_STEPS

    def __getitem__(self, step: int) -> Batch:
        return worst_batch(self.module, self.case)


def run(module: PostTraining, case: Case, trainer: L.Trainer) -> None:
    """Three steps."""
    trainer.fit(module, train_dataloaders=DataLoader(WorstBatch(module, case), batch_size=None))


def tidy() -> None:
    """Gives back what nobody holds."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def held(what: str, tidied: bool = True) -> int:
    """Bytes of main memory that this process holds (``VmRSS``), or held at most (``VmHWM``)."""
    if tidied:
        tidy()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def quiet() -> None:
    """Leaves the terminal to the table."""
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def main() -> None:
    """Compares all cases and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", nargs="+", choices=["ddp", "fsdp2"], default=["ddp", "fsdp2"])
    parser.add_argument("--preset", choices=PRESETS, default="cpu-100m")
    parser.add_argument("--objective", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--tuning", nargs="+", choices=TUNINGS, default=TUNINGS)
    parser.add_argument("--prompt_tokens", type=int, default=315)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan_on_ranks.json")
    options = parser.parse_args()
    quiet()
    results = []
    for strategy in options.strategy:
        for objective in options.objective:
            for tuning in options.tuning:
                case = Case(objective, options.preset, tuning, prompt_tokens=options.prompt_tokens)
                phases = planned(case, strategy, options.ranks)
                most, took = max(phases.values()), measured(case, strategy, options.ranks)
                results.append({**asdict(case), "strategy": strategy, "planned": phases, "measured_bytes": took,
                                "ratio": most / took})  # fmt: skip
                print(f"{strategy:6}{objective:13}{tuning:5}{most / 1e6:8,.0f} MB planned{took / 1e6:8,.0f} MB "
                      f"measured  {most / took:.3f}", flush=True)  # fmt: skip
    write_record(options.out, {"ranks": options.ranks, "results": results})


if __name__ == "__main__":
    main()
