"""Does a run that is killed (SIGKILL) anywhere and resumed end like one that was not, bit for bit?

    python benchmarks/kill_and_resume.py --kills 20 --ranks 1      # benchmarks/results/kill_and_resume_1.json
    python benchmarks/kill_and_resume.py --kills 20 --ranks 2 --strategy fsdp2_sharded

The embedded base learns three tasks by GRPO with LoRA, dropout and a KL term, on the rows that it is right about, and
saves after every step. Kills come at random times, or in the phases below; each kills all ranks, and the run goes on
with ``--ckpt_path last``. Weights, optimizer, matrix, samples and verdicts are compared. Processes are forked from one
that has imported everything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from lightning import Callback
from record import write_record

from cpt_lightning import checkpoint_io, sharded_checkpoints
from cpt_lightning.callbacks import continual, samples
from cpt_lightning.callbacks.filter import judge
from cpt_lightning.checkpoint_files import ASIDE, PART
from cpt_lightning.cli.lightning_cli import CPTCLI
from cpt_lightning.modules import group_rollouts

TASK = "{source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: %s}}, num_train: 16, num_test: 4}"
STREAM = f"""
tasks: {{word2: {TASK % "word2"}, bars2: {TASK % "bars2"}, digit2: {TASK % "digit2"}}}
probes: {{facts: {TASK % "facts"}}}
prompts_per_step: 4
steps: 3
eval_prompts_per_step: 4
"""
COMMAND = [
    "fit", "--model=RFT", "--model.backbone.tuning=lora", "--model.backbone.lora.dropout=0.1", "--model.group_size=4",
    "--model.kl_coef=0.05", "--model.updates_per_rollout=2", "--model.sampling.max_new_tokens=8",
    "--model.evaluation.max_new_tokens=8", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3",
    "--filter.mode=solvable", "--filter.completions_per_row=4", "--filter.min_rows=1",
    "--filter.sampling.temperature=0.5", "--filter.sampling.prefix=<think>let me think</think><answer>",
    "--checkpoint.every_n_steps=1", "--continual.print_table=false", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
STRATEGIES = {
    "ddp": ["--trainer.strategy=ddp"],
    "fsdp2": ["--trainer.strategy=fsdp2"],
    "fsdp2_sharded": [
        "--trainer.strategy=cpt_lightning.strategy.FSDP2", "--trainer.strategy.save_distributed_checkpoint=true",
    ],
}  # fmt: skip
"""Of several ranks."""
STEPS, EVALUATIONS = 9, 4 * 4  # of the whole run: steps, and batches of the four evaluations
PHASES = {
    "rollout": 2 * STEPS,
    "update": 2 * STEPS,
    "evaluation": EVALUATIONS,
    "judging": 2 * 3 * 4,
    "saving": 3 * STEPS,
    "recording": 6,
    "between tasks": 3,
}
"""Where to kill, and how often a whole run passes there."""


class Kill(Callback):
    """Kills all ranks when this rank passes a phase for the n-th time.

    Args:
        phase: One of ``PHASES``.
        passes: How often it may be passed before.
    """

    def __init__(self, phase: str, passes: int) -> None:
        self.phase, self.left = phase, passes

    def passing(self, phase: str) -> None:
        if phase == self.phase:
            self.left -= 1
            if self.left < 0:
                os.killpg(0, signal.SIGKILL)

    def on_validation_batch_start(self, *_: Any) -> None:
        self.passing("evaluation")

    def on_train_epoch_start(self, *_: Any) -> None:
        self.passing("between tasks")

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Kills before the function, or after it."""
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.passing(phase)
            result = function(*args, **kwargs)
            self.passing(phase)
            return result

        setattr(owner, name, wrapped)

    def half_save(self, checkpoint: dict, file: Any) -> None:
        """Writes half of a checkpoint, then perhaps kills, else the whole."""
        torch.save(checkpoint, file)
        size = file.tell()
        file.truncate(size // 2)
        file.flush()
        self.passing("saving")
        file.seek(0)
        torch.save(checkpoint, file)

    def install(self) -> None:
        self.wrap(group_rollouts, "sample_groups", "rollout")
        self.wrap(judge.Judge, "_judge", "judging")
        self.wrap(torch.optim.AdamW, "step", "update")
        self.wrap(continual.AccuracyMatrix, "save", "recording")
        self.wrap(samples, "append_lines", "recording")
        self.wrap(os, "replace", "saving")
        self.wrap(shutil, "rmtree", "saving")
        self.wrap(sharded_checkpoints.dcp.FileSystemWriter, "write_data", "saving")
        if self.phase == "saving":
            checkpoint_io.torch = sharded_checkpoints.torch = _TorchWith(self.half_save)


class _TorchWith:
    """torch, but for ``save``."""

    def __init__(self, save: Any) -> None:
        self.save = save

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def start(folder: Path, ranks: int, kill: Kill | None, strategy: str = "ddp") -> list[int]:
    """Forks the ranks of a run, or of the rest of one, into a process group of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    killer = random.randrange(ranks)
    pids: list[int] = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            os.setpgid(pid, pids[0])
            continue
        status = 1
        try:
            os.setpgid(0, pids[0] if pids else 0)
            be_rank(folder, rank, ranks, port, kill if rank == killer else None, strategy)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pids


def be_rank(folder: Path, rank: int, ranks: int, port: str, kill: Kill | None, strategy: str) -> None:
    """Runs the command."""
    # Here, where there is one thread: after a fork torch (2.13) makes its thread pool anew, and threads that load
    # weights could meet it half made ("Invalid thread pool!").
    torch.set_num_threads(1)
    log = (folder.parent / f"{folder.name}_{rank}.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    # Under pytest warnings would be errors, or collected by it.
    warnings.resetwarnings()
    warnings.showwarning = lambda message, *_: print(message, file=log)
    command = [*COMMAND, f"--data={folder.parent / 'stream.yaml'}", f"--run_dir={folder}", "--ckpt_path=last"]
    if ranks > 1:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command += [*STRATEGIES[strategy], f"--trainer.devices={ranks}"]
    if kill is not None:
        kill.install()
    Killable.kill = kill
    Killable(command)


class Killable(CPTCLI):
    """The command line, with one more callback."""

    kill: Kill | None = None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        if self.kill is not None:
            trainer.callbacks.insert(0, self.kill)
        return trainer


def go(folder: Path, ranks: int, kill: Kill | None = None, after_s: float | None = None, strategy: str = "ddp") -> bool:
    """Runs until the end (true) or a kill (false).

    Raises:
        RuntimeError: The run failed of itself.
    """
    pids = start(folder, ranks, kill, strategy)
    if after_s is not None:
        time.sleep(after_s)
        os.killpg(pids[0], signal.SIGKILL)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(end not in (0, -signal.SIGKILL) for end in ends):
        logs = [folder.parent / f"{folder.name}_{rank}.log" for rank in range(ranks)]
        raise RuntimeError(f"exit codes {ends}\n" + "\n".join(log.read_text()[-3000:] for log in logs))
    return all(end == 0 for end in ends)


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same."""
    last = checkpoint_io.read_checkpoint(folder / "last.ckpt")
    files = {name: (folder / name).read_bytes() for name in ("accuracy_matrix.json", "samples.jsonl")}
    verdicts = {path.name: path.read_text().splitlines() for path in sorted((folder / "filter").iterdir())}
    untimed = {name: [{**json.loads(line), "time_s": None} for line in lines] for name, lines in verdicts.items()}
    return {"weights": last["state_dict"], "optimizer": last["optimizer_states"], **files, "verdicts": untimed}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two outcomes differ, tensors compared bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [line for key in one for line in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{where}/{index}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [where]


def kill_and_resume(
    folder: Path, ranks: int, kills: int, kills_per_run: int = 5, seed: int = 0, strategy: str = "ddp"
) -> dict[str, Any]:
    """Kills runs so often in all, lets each end, and compares it with a run that nobody killed.

    Returns:
        What was killed where, how often, and what differs: a record of plain values.
    """
    random.seed(seed)
    (folder / "stream.yaml").write_text(STREAM)
    begin = time.perf_counter()
    go(folder / "whole", ranks, strategy=strategy)
    whole_s = time.perf_counter() - begin
    whole = outcome(folder / "whole")
    places: Counter[str] = Counter()
    wrong: list[str] = []
    number = 0
    order = [*PHASES, "any time"]
    while places.total() < kills:
        number += 1
        run, ended = folder / f"run{number}", False
        target = min(places.total() + kills_per_run, kills)
        while not ended and places.total() < target:
            phase = order[places.total() % len(order)]
            if phase == "any time":
                ended = go(run, ranks, after_s=random.uniform(0.2, 1.0) * whole_s, strategy=strategy)
            else:
                kill = Kill(phase, random.randrange(max(1, PHASES[phase] // 2)))
                ended = go(run, ranks, kill, strategy=strategy)
            if not ended:
                places[phase] += 1
        if not ended:
            go(run, ranks, strategy=strategy)
        wrong += [f"run {number}: {where}" for where in differences(whole, outcome(run))]
        left = [path.name for ending in (PART, ASIDE) for path in run.glob(f"*{ending}")]
        wrong += [f"run {number}: {name} was left behind" for name in left]
    return {
        "ranks": ranks,
        "strategy": strategy if ranks > 1 else "auto",
        "kills": dict(places),
        "runs": number,
        "whole_run_s": round(whole_s, 1),
        "all_runs_s": round(time.perf_counter() - begin, 1),
        "differences": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of several ranks")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = kill_and_resume(
            Path(folder), arguments.ranks, arguments.kills, seed=arguments.seed, strategy=arguments.strategy
        )
    print(json.dumps(record, indent=2))
    suffix = "" if arguments.strategy == "ddp" else f"_{arguments.strategy}"
    path = Path(__file__).parent / "results" / f"kill_and_resume_{arguments.ranks}{suffix}.json"
    write_record(path, record)
    raise SystemExit(1 if record["differences"] else 0)


if __name__ == "__main__":
    main()
