"""Is E[R(g_RFT)] = Var[r] R(g_SFT), as paper A says?

    python benchmarks/gradient_risk.py                                                         the embedded base
    python benchmarks/gradient_risk.py --ckpt_path runs/demo_grpo/2_bars2.ckpt --learned 2     after two tasks

R(g) = g'Fg is the forgetting risk of an update, F the Fisher information of what is known already, the probes and the
tasks learned so far, from the model's own answers: ``full``, the mean over answers of (g . grad log p)^2, or its
``diagonal``, which is what callbacks can afford. Of each of many training prompts this takes the gradient of SFT (bare
answer, answer in the base's own style, an own answer) and those of the G completions of a group, from which follow the
gradients of RLOO, Dr. GRPO and GRPO; and regresses R(g_RFT) over prompts on Var[r] R(g_SFT), with bootstrap intervals.

Of R(g_RFT) there are two: of a ``completion``, mean_i R(A_i grad log p_i), which is the paper's expectation over one
sample, and of the ``group``'s mean gradient, R(mean_i A_i grad log p_i), which is what an update is made of. If
completions were independent and as risky as the SFT text, the first would be c Var[r] R(g_SFT) with c = 8/7 (RLOO) or
7/8 (Dr. GRPO) for G = 8, and the second G times less. Log-probabilities of a text are ``sum``s over its tokens, or
``mean``s as losses commonly have them.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser
from record import write_record
from regression import Values, regression, with_intervals
from torch import Tensor

from cpt_lightning.data import TaskStream
from cpt_lightning.functional import group_normalized_advantages, leave_one_out_advantages
from cpt_lightning.models import Backbone
from cpt_lightning.modules import RFT
from cpt_lightning.rollouts import Sampling
from cpt_lightning.types import Batch, Completions

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"bare": "{answer}", "house": "<think>{thought}</think><answer>{answer}</answer>"}
ADVANTAGES = {
    "rloo": leave_one_out_advantages,
    "dr_grpo": lambda rewards: group_normalized_advantages(rewards, "none"),
    "grpo": group_normalized_advantages,
}


class Risks:
    """Gradients of one policy, and their risk.

    Args:
        module: The policy.
        at_risk: Rows with own answers as their targets, which the Fisher information is estimated from.
    """

    def __init__(self, module: RFT, at_risk: Iterable[Batch]) -> None:
        self.module = module
        self.parameters = [weight for weight in module.parameters() if weight.requires_grad]
        rows = [batch.select([row]) for batch in at_risk for row in range(len(batch))]
        self.scores = torch.cat([self.gradients(row, row.targets) for row in rows])  # [answers, weights]
        self.diagonal = self.scores.square().mean(dim=0)

    def __call__(self, gradients: Tensor) -> dict[str, Tensor]:
        """R of each row, with the diagonal of F and with all of it."""
        full = (self.scores @ gradients.T).square().mean(dim=0)
        return {"diagonal": gradients.square() @ self.diagonal, "full": full}

    def gradients(self, prompt: Batch, completions: Completions) -> Tensor:
        """``[N, weights]``: of the log-likelihood of each of N completions of a prompt."""
        rows = []
        for number in range(len(completions)):
            value = self.module.log_likelihoods(Batch(prompt.prompts, completions.select([number]))).sum()
            found = torch.autograd.grad(value, self.parameters, materialize_grads=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        return torch.stack(rows)

    def of_prompt(self, prompt: Batch, targets: dict[str, Batch]) -> dict:
        """What is measured of one training prompt; names of risks are ``<gradient>.<kind of F>.<sum or mean>``."""
        completions, _, scores = self.module.attempt(prompt.prompts, self.module.group_size, self.module.sampling)
        rewards = torch.tensor([[score["total"] for score in scores]])
        found = {"task": prompt.prompts.examples[0].task, "reward": rewards.mean().item(),
                 "variance": rewards.var().item()}  # fmt: skip
        texts = {style: batch.targets for style, batch in targets.items()} | {"own": completions}
        for style, text in texts.items():
            gradients = self.gradients(prompt, text)
            lengths = text.lengths.float()
            found[f"{style}.length"] = lengths.mean().item()
            found[f"{style}.squared_norm"] = gradients.square().sum(dim=1).mean().item()
            risks = self(gradients)
            for kind, each in risks.items():
                found |= {f"{style}.{kind}.sum": each.mean().item()}
                found |= {f"{style}.{kind}.mean": (each / lengths.square()).mean().item()}
        advantages = torch.cat([advantages_of(rewards) for advantages_of in ADVANTAGES.values()])
        for scale, divisors in (("sum", torch.ones_like(lengths)), ("mean", lengths)):
            groups = self(advantages / divisors @ gradients / len(gradients))
            for kind, each in risks.items():
                of_completions = (advantages.square() * each / divisors.square()).mean(dim=1)
                for name, one, group in zip(ADVANTAGES, of_completions, groups[kind], strict=True):
                    found |= {
                        f"{name}_completion.{kind}.{scale}": one.item(),
                        f"{name}_group.{kind}.{scale}": group.item(),
                    }
        return found


def stream_of(file: str, target: str, module: RFT) -> TaskStream:
    """The stream of a file, its tasks learned from such targets."""
    parser = ArgumentParser()
    parser.add_class_arguments(TaskStream, "data")
    stream = parser.instantiate_classes(parser.parse_args([f"--data={file}", f"--data.target={target}"])).data
    stream.processor = module.processor
    return stream


def module_of(checkpoint: Path | None, group_size: int) -> RFT:
    """The policy: the embedded base, or what a run of it had become."""
    module = RFT(backbone=Backbone(), group_size=group_size, sampling=Sampling(max_new_tokens=32))
    module.configure_model()
    if checkpoint is not None:
        module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    return module.eval()


def rows_at_risk(module: RFT, stream: TaskStream, learned: int, num_rows: int) -> Iterator[Batch]:
    """Held-out rows of the tasks learned so far and of the probes, answered by the policy."""
    for name in [*stream.task_names[:learned], *stream.probe_names]:
        number = list(stream.everything).index(name)
        yield module.drawn(stream.rows_of_evaluation(name, num_rows), module.sampling, number)


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each training prompt of the tasks that are not learned yet."""
    module = module_of(options.ckpt_path, options.group_size)
    streams = {style: stream_of(str(options.stream), target, module) for style, target in TARGETS.items()}
    first = streams["bare"]
    risks = Risks(module, rows_at_risk(module, first, options.learned, options.fisher_rows))
    found = []
    for stage in range(options.learned, first.num_stages):
        start = time.perf_counter()
        batches = {style: stream.rows_of_stage(stage, options.prompts) for style, stream in streams.items()}
        for row in range(options.prompts):
            targets = {style: batch.select([row]) for style, batch in batches.items()}
            found.append(risks.of_prompt(targets["bare"], targets))
        print(f"{first.stage_names[stage]}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def column(rows: list[dict], name: str) -> Values:
    return np.array([row[name] for row in rows])


def tests(rows: list[dict]) -> list[dict]:
    """The proposition, for each Fisher information, normalisation, kind of gradient and text of SFT."""
    variance = column(rows, "variance")
    found = []
    for kind, scale, level in product(("full", "diagonal"), ("sum", "mean"), ("completion", "group")):
        for advantage, style in product(ADVANTAGES, (*TARGETS, "own")):
            y, sft = column(rows, f"{advantage}_{level}.{kind}.{scale}"), column(rows, f"{style}.{kind}.{scale}")
            case = {"fisher": kind, "log_likelihood": scale, "of": level, "advantage": advantage, "sft": style}
            others = {"variance": variance, "sft": sft, "gate_sft": (variance > 0) * sft}
            r2 = {name: regression(x, y)["r2"] for name, x in others.items()}
            found.append({**case, **with_intervals(variance * sft, y), "r2_of_others": r2})
    return found


def table(found: list[dict]) -> str:
    """In Markdown."""
    lines = ["| F | log-likelihood | R of | advantage | SFT text | ratio of means | slope | R² | log slope | log R² | "
             "R² of Var alone | of R(g_SFT) alone | of gate R(g_SFT) |", "|---" * 13 + "|"]  # fmt: skip
    for case in found:
        cells = [case[name] for name in ("fisher", "log_likelihood", "of", "advantage", "sft")]
        for name in ("ratio", "slope", "r2", "log_slope", "log_r2"):
            cells.append("{:.3g} ({:.3g} to {:.3g})".format(*case[name]))
        cells += [f"{value:.2f}" for value in case["r2_of_others"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[dict]) -> dict[str, float]:
    """Of the prompts as a whole."""
    silent = column(rows, "variance") == 0
    largest = max(column(rows, f"{name}_group.full.sum")[silent].max(initial=0.0) for name in ADVANTAGES)
    means = {f"mean {name}": float(column(rows, name).mean()) for name in rows[0] if name != "task"}
    return {"num_prompts": len(rows), "silent_groups": float(silent.mean()),
            "largest_risk_of_silent_groups": float(largest), **means}  # fmt: skip


def main() -> None:
    """Measures, tests, and writes the record, and beside it a table of all prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, help="of a run of the demo with full tuning; the base by default")
    parser.add_argument("--learned", type=int, default=0, help="tasks that it has learned; the others are asked")
    parser.add_argument("--stream", type=Path, default=ROOT / "configs" / "streams" / "toy_five.yaml")
    parser.add_argument("--prompts", type=int, default=60, help="of each task")
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--fisher_rows", type=int, default=12, help="of each task and probe at risk")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gradient_risk" / "base.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = measure(options)
    found = tests(rows)
    print(table(found))
    write_record(options.out, {"summary": summary(rows), "tests": found})
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows(
            [f"{value:.5g}" if isinstance(value, float) else value for value in row.values()] for row in rows
        )


if __name__ == "__main__":
    main()
