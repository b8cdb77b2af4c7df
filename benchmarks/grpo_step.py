"""How long a whole GRPO step takes and how much memory it needs: ours, the naive way, and TRL's GRPOTrainer.

    python benchmarks/grpo_step.py [--prompt_tokens 75 315 1020] [--arms ours naive trl] [--repeats 3] ...

The same rows, weights, precision, loss and optimizer in all arms; one optimizer step per rollout, no KL term;
completions of exactly ``--new_tokens`` tokens, and a reward that leaves no group without a signal. A step is timed from
the end of the one before: the rollout holds image processing, tokenization and rewards, the update log-probabilities,
backward, clipping and optimizer. Memory is what is needed above the loaded model: gradients and optimizer states, which
are the same in all arms, and activations.
"""

from __future__ import annotations

from functools import partial

import naive
import ours
from measure import compare, in_fresh_process, in_turn, show_ratio
from operations import add_peak_option, peak_tflops, print_operations
from record import write_record
from workload import Workload, rollout_parser, without_missing_trl


def trl(workload: Workload) -> dict[str, float]:
    """TRL's step; imported only where it runs."""
    import peers

    return peers.grpo(workload)


ARMS = {"ours": ours.grpo, "naive": naive.grpo, "trl": trl}


def main() -> None:
    """Measures every prompt length, prints the tables, writes the record."""
    options = rollout_parser(__doc__, __file__)
    options.add_argument("--micro_prompts", type=int, help="prompts whose groups go through backward at once, not all")
    options.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    add_peak_option(options)
    options = options.parse_args()
    if options.micro_prompts and options.prompts % options.micro_prompts:
        raise SystemExit(f"--micro_prompts {options.micro_prompts} does not divide --prompts {options.prompts}")
    arms = without_missing_trl(options.arms)
    results = []
    for prompt_tokens in options.prompt_tokens:
        workload = Workload.of(options, prompt_tokens=prompt_tokens)
        runs = {arm: partial(in_fresh_process, ARMS[arm], workload, threads=options.threads) for arm in arms}
        results.append({"workload": vars(workload), **compare(in_turn(runs, options.repeats))})
        print_table(workload.title, results[-1])
        print_operations(results[-1], peak_tflops(options))
    write_record(options.out, {"peak_tflops": peak_tflops(options), "results": results})


def print_table(title: str, results: dict) -> None:
    """A line per arm, then how many times ours the others' steps and memory are."""
    print(title)
    print("         rollout     update       step    its CPU   peak above model")
    for arm, figures in results["medians"].items():
        seconds = "".join(f"{figures[f'{name}_s']:9.3f} s" for name in ("rollout", "update", "step", "cpu"))
        print(f"  {arm:5}{seconds}{figures['peak_bytes'] / 1e6:16,.0f} MB")
    for pair, ratios in results["ratios"].items():
        shown = {"step": "step_s", "its CPU": "cpu_s", "memory": "peak_bytes"}
        texts = (f"{name} {show_ratio(ratios[figure])}" for name, figure in shown.items())
        print(f"  {pair}: " + ", ".join(texts), flush=True)


if __name__ == "__main__":
    main()
