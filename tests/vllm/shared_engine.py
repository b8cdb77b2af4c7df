"""What two ranks see of the engine that they share: ``python -m tests.vllm.shared_engine FOLDER RANK``, for each."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from cpt_lightning.models import load_backbone
from cpt_lightning.rollouts import VLLM, Sampling, completion_logprobs
from cpt_lightning.rollouts.vllm.handover import hand_over
from cpt_lightning.rollouts.vllm.served import Engine

SAMPLING = Sampling(24)
NUM_CALLS = (1, 3)
"""By each rank, of weights of its own."""


def generators(rows: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in rows]


class Spoilable(Engine):
    """Has other weights in the second worker's share than were sent, when told to."""

    is_spoiled = False

    def spoil(self) -> None:
        self.is_spoiled = True

    def load(self) -> None:
        if self.is_spoiled:
            self.llm.collective_rpc(spoil_second)
        self.is_spoiled = False
        super().load()


def spoil_second(worker) -> None:
    if worker.rank == 1:
        dict(worker.weights_taken)["model.language_model.layers.0.mlp.down_proj.weight"][:, -1] += 1e-3


def alive_in_group(leader: int) -> list[int]:
    """Processes of a group that are not only waiting to be forgotten."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # has ended meanwhile
            continue
        if int(group) == leader and state not in "ZX":
            found.append(int(folder.name))
    return found


def shared_memory(leader: int) -> list[Path]:
    """Files in memory that an engine and its workers share."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in alive_in_group(leader))
    return sorted({Path(path) for path in re.findall(r"/dev/shm/psm_\w+$", maps, flags=re.MULTILINE)})


def main(folder: Path, rank: int) -> None:
    torch.manual_seed(rank)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    model, processor = load_backbone("tiny")
    rows = [2 * rank, 2 * rank + 1]
    prompts = torch.load(folder / "prompts.pt", weights_only=False).select(rows)
    sampler = VLLM(tensor_parallel_size=2, max_model_len=512, enforce_eager=True, tolerance=1e-3)
    sampler.make_engine = Spoilable
    sample = partial(sampler.sample, model, processor, prompts)
    seen = {"greedy": sample(2, Sampling(24, temperature=0)), "sampled": sample(8, SAMPLING, generators(rows))}

    seen["differences"] = []
    for _ in range(NUM_CALLS[rank]):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn_like(weight)
            drawn = sample(4, SAMPLING)
            logps = completion_logprobs(model, prompts, drawn)
        seen["differences"].append(float((drawn.logps - logps).abs().max()))

    distributed.barrier()
    engine = sampler.engine
    memory = shared_memory(engine.pid)
    assert memory
    distributed.barrier()
    if rank == 1:
        engine.call("spoil")
        seen["complaints"] = [hand_over(engine, model, sampler._buffer, torch.float32, 2) for _ in range(2)]
        worker = next(pid for pid in alive_in_group(engine.pid) if pid != engine.pid)
        os.kill(worker, signal.SIGKILL)
    distributed.barrier()
    engine.time_limit_s, start = 60, time.monotonic()
    try:
        sample(4, SAMPLING)
    except RuntimeError as error:
        seen["error"] = str(error)
    seen["seconds"] = time.monotonic() - start
    distributed.barrier()

    def left() -> list:
        return [*alive_in_group(engine.pid), *(path for path in memory if path.exists())]

    while left() and time.monotonic() < start + 60:
        time.sleep(0.1)  # what was killed takes a moment to go
    seen["left"] = left()
    torch.save(seen, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
