"""What log-probabilities of tokens cost, forward and backward: ours in chunks, and from the logits of all positions.

    python benchmarks/logprob_memory.py [--tokens 2048] [--vocabulary 151936] [--preset cpu-6m | --hidden_size 256] ...

With the output matrix trained (full tuning) and frozen (LoRA). Memory is the peak above hidden states and matrix, the
gradients included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import PeakMemory, Stopwatch, compare, in_fresh_process, in_turn
from presets import HIDDEN_SIZES
from record import write_record
from torch import Tensor

from cpt_lightning.functional.logprobs import token_logprobs

NUM_PASSES = 3


@dataclass(frozen=True)
class Problem:
    """One setting.

    Args:
        tokens: Positions M.
        vocabulary: V.
        hidden_size: H.
        dtype: Of hidden states and matrix.
        device: ``cpu`` or ``cuda``.
    """

    tokens: int
    vocabulary: int
    hidden_size: int
    dtype: str
    device: str


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours."""
    return token_logprobs(hidden, weight, targets)


def unchunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Autograd over all logits, in float32 as everywhere."""
    return (hidden @ weight.T).float().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def cost(problem: Problem, logprobs: Callable[..., Tensor], trains_weight: bool) -> dict[str, float]:
    """Peak memory and the best time of a few passes."""
    options = {"device": problem.device, "dtype": getattr(torch, problem.dtype)}
    torch.manual_seed(0)
    hidden = torch.randn(problem.tokens, problem.hidden_size, **options, requires_grad=True)
    weight = torch.randn(problem.vocabulary, problem.hidden_size, **options).mul_(0.02).requires_grad_(trains_weight)
    targets = torch.randint(problem.vocabulary, (problem.tokens,), device=problem.device)
    memory, watch = PeakMemory(problem.device), Stopwatch(problem.device)
    seconds = []
    for _ in range(NUM_PASSES):
        hidden.grad = weight.grad = None
        watch.lap()
        loss = -logprobs(hidden, weight, targets).mean()
        loss.backward()
        seconds.append(watch.lap())
    return {"peak_bytes": memory.bytes, "forward_backward_s": min(seconds), "loss": loss.item()}


def main() -> None:
    """Measures both ways with a trained and with a frozen matrix, prints the table, writes the record."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--vocabulary", type=int, default=151936)
    options.add_argument("--preset", choices=list(HIDDEN_SIZES), default="cpu-6m", help="whose hidden size is taken")
    options.add_argument("--hidden_size", type=int, help="another hidden size")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=3, help="rounds; in each every way has a fresh process")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "logprob_memory.json")
    options = options.parse_args()
    hidden_size = options.hidden_size or HIDDEN_SIZES[options.preset]
    problem = Problem(options.tokens, options.vocabulary, hidden_size, options.dtype, options.device)
    print(f"{problem.tokens} tokens, vocabulary {problem.vocabulary}, hidden size {problem.hidden_size}")
    results = {}
    for name, trains_weight in {"trained": True, "frozen": False}.items():
        ways = {
            way.__name__: partial(in_fresh_process, cost, problem, way, trains_weight, threads=options.threads)
            for way in (chunked, unchunked)
        }
        results[name] = compare(in_turn(ways, options.repeats))
        print_table(name, results[name])
    write_record(options.out, {"problem": vars(problem), "output_matrix": results})


def print_table(name: str, results: dict) -> None:
    """A line per way, and what chunks save."""
    for way, figures in results["medians"].items():
        peak, seconds = figures["peak_bytes"] / 1e6, figures["forward_backward_s"]
        print(f"  matrix {name:7} {way:9} {peak:9,.0f} MB {seconds:8.3f} s")
    ratios = results["ratios"]["unchunked/chunked"]
    print(
        "    unchunked/chunked: memory {:.1f}, time {:.2f}".format(
            ratios["peak_bytes"]["median"], ratios["forward_backward_s"]["median"]
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
