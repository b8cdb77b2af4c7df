"""Where a GRPO step on the tiny model spends its time.

    OMP_NUM_THREADS=1 python benchmarks/profile_step.py [--num_steps 30] [--out benchmarks/results/profile_step.json]

A real Trainer with its progress bar, TensorBoard logger and the toy stream. A step is measured from the end of the one
before, so it holds data loading, hooks and logging; "rest" is what is neither rollout nor reward nor update.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from record import write_record
from step_timer import StepTimer

from cpt_lightning.data import TaskStream
from cpt_lightning.modules import RFT
from cpt_lightning.rollouts import Sampling
from cpt_lightning.tasks import Reward, Task, ToyWorld

PHASES = ("rollout", "reward", "update")
NUM_WARM_UP = 3
LIMIT_REST = 0.05


def main() -> None:
    """Runs the steps, prints the table, writes the record."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        measured = run(options, Path(folder))
    results = summarize(measured["steps"][NUM_WARM_UP:], measured["around"])
    print_table(results)
    write_record(options.out, {"options": {**vars(options), "out": str(options.out)}, **results})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="word2", help="task of the toy world")
    parser.add_argument("--num_steps", type=int, default=30, help=f"steps to time, after {NUM_WARM_UP + 1} to warm up")
    parser.add_argument("--prompts_per_step", type=int, default=24)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "profile_step.json")
    return parser.parse_args()


def run(options: argparse.Namespace, folder: Path) -> dict:
    """Trains, and gives what :class:`StepTimer` wrote."""
    task = Task(source=ToyWorld(options.family), reward=Reward(format="think_answer"))
    num_steps = options.num_steps + NUM_WARM_UP + 1  # the first has no predecessor to be measured from
    stream = TaskStream(
        {options.family: task},
        steps=num_steps,
        prompts_per_step=options.prompts_per_step,
        num_workers=options.num_workers,
    )
    module = RFT(
        group_size=options.group_size,
        sampling=Sampling(max_new_tokens=options.max_new_tokens),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-5),
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # not the profiler's own hundred lines
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        limit_val_batches=0,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        inference_mode=False,
        enable_checkpointing=False,
        logger=TensorBoardLogger(folder),
        callbacks=[StepTimer(str(folder / "steps.json"))],
        profiler="simple",
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=stream)
    return json.loads((folder / "steps.json").read_text(encoding="utf-8"))


def summarize(steps: Sequence[dict[str, float]], around: dict[str, float]) -> dict:
    """Medians in seconds; shares of the summed time, so that a slow step counts with its weight."""
    for step in steps:
        step["rest"] = step["step"] - sum(step[phase] for phase in PHASES)
    total = sum(step["step"] for step in steps)
    names = ("step", *PHASES, "rest")
    largest = sorted(around.items(), key=lambda item: -item[1])[:8]
    return {
        "num_steps": len(steps),
        "median_s": {name: median(step[name] for step in steps) for name in names},
        "share": {name: sum(step[name] for step in steps) / total for name in names},
        "around_the_step_s": dict(largest),
    }


def print_table(results: dict) -> None:
    """The phases, then the Trainer's own actions, which lie within the rest (or before the first step)."""
    print(f"{results['num_steps']} steps   median      share")
    for name, share in results["share"].items():
        print(f"  {name:8} {results['median_s'][name] * 1e3:9.1f} ms  {share:8.1%}")
    print("what the Trainer did around the step, mean per step:")
    for name, seconds in results["around_the_step_s"].items():
        print(f"  {seconds * 1e3:9.1f} ms  {name}")
    rest = results["share"]["rest"]
    print(f"rest: {rest:.1%} of the step, {'within' if rest < LIMIT_REST else 'ABOVE'} the limit of {LIMIT_REST:.0%}")


if __name__ == "__main__":
    main()
