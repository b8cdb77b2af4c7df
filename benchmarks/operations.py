"""How many floating-point operations an arm is through with per second, and what share of the device's peak that is."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import torch

from cpt_lightning.modules.accounting import peak_flops_of


def add_peak_option(options: ArgumentParser) -> None:
    """``--peak_tflops``."""
    options.add_argument("--peak_tflops", type=float, help="of the device in this precision; known for common GPUs")


def peak_tflops(options: Namespace) -> float | None:
    """What the option says, or the table of GPUs in bfloat16; ``None`` if neither knows."""
    known = peak_flops_of(torch.device(options.device)) if options.dtype == "bfloat16" else None
    return options.peak_tflops or (known and known / 1e12)


def print_operations(results: dict, peak: float | None) -> None:
    """A line of the step as a naive one would compute it, by which arms compare, and one of what ours executes.

    The naive step has every completion as a sequence of its own and nothing computed twice; its operations per second
    are the usual model FLOPs utilisation (MFU) where the peak is known.
    """
    medians = results["medians"]
    if "equivalent_flops" not in medians.get("ours", {}):
        return
    ours = medians["ours"]
    naive = ", ".join(
        f"{arm} {_rate(ours['equivalent_flops'], figures['step_s'], peak)}" for arm, figures in medians.items()
    )
    print(f"  operations of a naive step: {ours['equivalent_flops'] / 1e12:.3g} TFLOP; {naive}")
    executed = ours["executed_flops"]
    print(f"  executed by ours: {executed / 1e12:.3g} TFLOP; {_rate(executed, ours['step_s'], peak)}", flush=True)


def _rate(flops: float, seconds: float, peak: float | None) -> str:
    rate = flops / seconds / 1e12
    return f"{rate:.3g} TFLOP/s" + (f" ({rate / peak:.1%} of the peak)" if peak else "")
