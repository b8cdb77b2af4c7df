"""How many tokens a second sampling alone gives: ours, transformers' ``generate``, and vLLM where it is installed.

On a GPU ours is also measured without CUDA graphs.

    python benchmarks/decode.py [--prompts 4] [--group_size 8] [--prompt_tokens 315] [--new_tokens 32] [--ragged] ...

The time of one token (image, prompt and first draw) is measured apart, so that a decoding step is known by itself. On a
GPU whose memory bandwidth is known it is compared with the least that a step can take: reading the weights once.
``--ragged`` lets completions stop at different steps: a random share of the vocabulary ends a turn, so that lengths are
geometric and about 0.43 of ``--new_tokens`` on average; it takes random weights, whose draws are nearly uniform.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from statistics import mean

import naive
import torch
from measure import StepMeter, compare, in_fresh_process, in_turn, show_ratio
from presets import EndlessProcessor
from record import write_record
from workload import Workload, rollout_parser

from cpt_lightning.data.collate import Collate
from cpt_lightning.models.qwen_vl import QwenVL, use_cuda_graphs
from cpt_lightning.rollouts import VLLM, Sampling, sample_groups
from cpt_lightning.types import Prompts

BANDWIDTHS_GB_S = {"H200": 4800, "H100 PCIe": 2039, "H100": 3350, "A100": 2039, "L40S": 864, "RTX 4090": 1008}
"""Published peaks, by a part of the device's name; the first that fits counts."""
STOPS_PER_COMPLETION = 2
"""``--ragged``: stops that a completion of full length would draw on average."""


class RaggedProcessor(EndlessProcessor):
    """Under which a random share of the vocabulary ends a completion."""

    stops: tuple[int, ...] = ()

    @property
    def stop_token_ids(self) -> list[int]:
        """That share, set after loading."""
        return list(self.stops)


Sampler = Callable[[QwenVL, EndlessProcessor, Prompts, int, int], tuple[int, int]]
"""Samples groups of a size and a largest length; gives the number of tokens and the length of the longest."""


def ours(
    model: QwenVL, processor: EndlessProcessor, prompts: Prompts, group_size: int, new_tokens: int
) -> tuple[int, int]:
    """Prompt and image once per group."""
    generator = torch.Generator(prompts.device).manual_seed(0)
    completions = sample_groups(model, processor, prompts, group_size, Sampling(max_new_tokens=new_tokens), generator)
    return int(completions.mask.sum()), int(completions.lengths.max())


def unrecorded(
    model: QwenVL, processor: EndlessProcessor, prompts: Prompts, group_size: int, new_tokens: int
) -> tuple[int, int]:
    """Ours without CUDA graphs."""
    use_cuda_graphs(model, False)
    return ours(model, processor, prompts, group_size, new_tokens)


def generate(
    model: QwenVL, processor: EndlessProcessor, prompts: Prompts, group_size: int, new_tokens: int
) -> tuple[int, int]:
    """Prompt and image once per completion."""
    stops = processor.stop_token_ids
    options = {"eos_token_id": stops} if stops else {}
    ids = naive.generate(model, processor, prompts, new_tokens, num_return_sequences=group_size, **options)
    completions = ids[:, prompts.input_ids.shape[1] :]
    is_stop = torch.isin(completions, completions.new_tensor(stops))
    mask = is_stop.cumsum(dim=1) - is_stop.long() == 0
    return int(mask.sum()), int(mask.sum(dim=1).max())


@cache
def engine() -> VLLM:
    """One for all rollouts of a process; its memory is its own, and no part of the figures."""
    return VLLM(enforce_eager=not torch.cuda.is_available())


def vllm(
    model: QwenVL, processor: EndlessProcessor, prompts: Prompts, group_size: int, new_tokens: int
) -> tuple[int, int]:
    """By another engine in a process of its own; image features and the look at the weights are part of the time."""
    generator = torch.Generator(prompts.device).manual_seed(0)
    sampling = Sampling(max_new_tokens=new_tokens)
    completions = engine().sample(model, processor, prompts, group_size, sampling, generator)
    return int(completions.mask.sum()), int(completions.lengths.max())


def measure(sampler: Sampler, workload: Workload, ragged: bool) -> dict[str, float]:
    """Figures of one arm: rollouts of one token, and of all."""
    torch.manual_seed(0)
    model, processor = workload.backbone.load_model(), RaggedProcessor.load("tiny", 28 * 28, 2**24)
    if ragged:
        vocabulary = model.config.text_config.vocab_size
        num_stops = round(STOPS_PER_COMPLETION / workload.new_tokens * vocabulary)
        processor.stops = tuple(torch.randperm(vocabulary)[:num_stops].tolist())
    prompts = Collate(processor)(workload.examples(processor)).prompts.to(workload.device)
    meter = StepMeter(workload.device, workload.warm_up)
    sampled = []
    for _ in range(workload.num_steps):
        sampler(model, processor, prompts, workload.group_size, 1)
        meter.end("first_token")
        sampled.append(sampler(model, processor, prompts, workload.group_size, workload.new_tokens))
        meter.end("rollout")
    num_tokens, longest = (mean(numbers) for numbers in zip(*sampled[workload.warm_up :], strict=True))
    figures = meter.results()
    return {
        "tokens_per_s": num_tokens / figures["rollout_s"],
        "mean_length": num_tokens / (workload.prompts * workload.group_size),
        "first_token_s": figures["first_token_s"],
        "rollout_s": figures["rollout_s"],
        "decoding_step_s": (figures["rollout_s"] - figures["first_token_s"]) / max(1, longest - 1),
        "cpu_s": figures["cpu_s"],
        "peak_bytes": figures["peak_bytes"],
        "weight_bytes": weight_bytes_per_step(model),
    }


def weight_bytes_per_step(model: QwenVL) -> int:
    """What a decoding step reads of the weights at least: the language model's blocks and the output matrix."""
    blocks = [*model.model.language_model.layers.parameters(), model.get_output_embeddings().weight]
    return sum(weight.nbytes for weight in blocks)


def known_bandwidth(device: str) -> float | None:
    """GB/s of the device's memory, if it is known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((bandwidth for part, bandwidth in BANDWIDTHS_GB_S.items() if part in name), None)


def main() -> None:
    """Measures every prompt length, prints the tables, writes the record."""
    options = rollout_parser(__doc__, __file__)
    options.add_argument("--ragged", action="store_true", help="completions stop at different steps")
    options.add_argument("--bandwidth_gb_s", type=float, help="of the device's memory; known for some GPUs")
    options = options.parse_args()
    if options.ragged and options.preset == "tiny":
        raise SystemExit("--ragged needs a preset of random weights: the embedded base's draws are not uniform")
    bandwidth = options.bandwidth_gb_s or known_bandwidth(options.device)
    results = []
    for prompt_tokens in options.prompt_tokens:
        workload = Workload.of(options, prompt_tokens=prompt_tokens)
        samplers = [ours, generate, *([unrecorded] if options.device == "cuda" else [])]
        samplers += [vllm] if find_spec("vllm") else []
        arms = {
            sampler.__name__: partial(
                in_fresh_process, measure, sampler, workload, options.ragged, threads=options.threads
            )
            for sampler in samplers
        }
        compared = compare(in_turn(arms, options.repeats))
        results.append({"workload": vars(workload), "ragged": options.ragged, **compared})
        print_table(workload.title, results[-1], bandwidth)
    write_record(options.out, {"bandwidth_gb_s": bandwidth, "results": results})


def print_table(title: str, results: dict, bandwidth: float | None) -> None:
    """A line per arm, and how many times ours the other's times are."""
    print(title)
    print("              tokens/s   mean length   first token   decoding step   peak above model   of bandwidth")
    for arm, figures in results["medians"].items():
        print(f"  {arm:10}{figures['tokens_per_s']:10,.0f}{figures['mean_length']:14.1f}", end="")
        print(f"{figures['first_token_s'] * 1e3:11.1f} ms{figures['decoding_step_s'] * 1e3:13.2f} ms", end="")
        share = figures["weight_bytes"] / figures["decoding_step_s"] / 1e9 / bandwidth if bandwidth else None
        print(f"{figures['peak_bytes'] / 1e6:16,.0f} MB{f'{share:.1%}' if share else 'unknown':>15}")
    shown = {"first token": "first_token_s", "rollout": "rollout_s", "CPU": "cpu_s", "memory": "peak_bytes"}
    for pair, ratios in results["ratios"].items():
        print(f"  {pair}: " + ", ".join(f"{name} {show_ratio(ratios[key])}" for name, key in shown.items()), flush=True)


if __name__ == "__main__":
    main()
