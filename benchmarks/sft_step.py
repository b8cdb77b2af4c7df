"""How many tokens a second SFT learns from, and in how much memory: ours and TRL's SFTTrainer, on ragged text.

    python benchmarks/sft_step.py [--data FOLDER] [--prompts 8] [--arms ours trl] [--repeats 3] ...

Whole steps, optimizer included. The rows of a batch vary 1:8 in length; their tokens are counted without padding. The
text is real if ``--data`` holds JSON files of chats, else the toy world's. TRL runs in its default setting, and once
more without padding (``padding_free``), its fastest way to learn from ragged rows. Every arm prints the loss of its
first step: where it differs, the arm computes something else. Under ``padding_free`` Qwen2.5-VL does so without
FlashAttention, because rows then see each other.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import ours
from measure import compare, in_fresh_process, in_turn, show_ratio
from operations import add_peak_option, peak_tflops, print_operations
from record import write_record
from sft_rows import lengths_of, ragged_rows
from workload import Setup, step_parser, without_missing_trl

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_text"
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
"""Relative; the random weights of most presets attend to everything alike, so that wrong attention shows little."""


def trl(setup: Setup, rows: list, **options) -> dict[str, float]:
    """TRL's step; imported only where it runs."""
    import peers

    return peers.sft(setup, rows, **options)


ARMS = {"ours": ours.sft, "trl": trl, "trl, padding_free": partial(trl, padding_free=True)}


def main() -> None:
    """Measures, prints the table, writes the record."""
    options = step_parser(__doc__, __file__, prompts=8)
    options.add_argument("--data", type=Path, default=DATA, help="folder of JSON files of chats")
    options.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    add_peak_option(options)
    options = options.parse_args()
    arms = without_missing_trl(options.arms)
    setup = Setup.of(options)
    processor = setup.backbone.load_processor()
    rows = ragged_rows(options.data, setup.prompts, processor)
    lengths = lengths_of(rows, processor)
    runs = {arm: partial(in_fresh_process, ARMS[arm], setup, rows, threads=options.threads) for arm in arms}
    results = {"setup": vars(setup), "row_tokens": lengths, **compare(in_turn(runs, options.repeats))}
    print_table(results)
    print_operations(results, peak_tflops(options))
    write_record(options.out, {"peak_tflops": peak_tflops(options), **results})


def print_table(results: dict) -> None:
    """A line per arm: tokens a second, the step, memory, the loss, and the ratios to ours."""
    setup, num_tokens = results["setup"], sum(results["row_tokens"])
    first = next(iter(results["medians"]))
    loss = results["medians"][first]["first_loss"]
    print(f"{setup['preset']}, rows of {results['row_tokens']} tokens")
    print("                       tokens/s       step   peak above model   first loss   step/first arm's")
    for arm, figures in results["medians"].items():
        print(f"  {arm:18}{num_tokens / figures['step_s']:11,.0f}{figures['step_s']:9.3f} s", end="")
        print(f"{figures['peak_bytes'] / 1e6:16,.0f} MB{figures['first_loss']:13.5f}", end="")
        ratios = results["ratios"].get(f"{arm}/{first}")
        print(f"   {show_ratio(ratios['step_s'])}, CPU {show_ratio(ratios['cpu_s'])}" if ratios else "")
        if abs(figures["first_loss"] / loss - 1) > LOSS_TOLERANCE[setup["dtype"]]:
            print("  ^ another loss than in the first line, so not the same computation")


if __name__ == "__main__":
    main()
