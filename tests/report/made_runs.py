"""Folders as runs leave them, by hand: two tasks and a probe, a few rows each, every score known."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter

from cpt_lightning.records.matrix import AccuracyMatrix

# By task or probe, the scores of its rows before training, after a and after b.
SCORES = {
    "a": [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]],
    "b": [[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]],
    "p": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]],
}
CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "SFT", "init_args": {"lr": 0.1, "backbone": {"path": "tiny", "max_pixels": None}}},
    "data": {"evaluate_on": "test"},
}


def made_run(
    folder: Path, scores: dict = SCORES, seed: int = 0, num_stages: int = 2, says: str = "", **options
) -> Path:
    """A run of the stream a, b with the probe p.

    Args:
        folder: Where to.
        scores: As :data:`SCORES`.
        seed: Its seed.
        num_stages: How far it came.
        says: What it always answers, before the verdict.
        options: ``fingerprints``, ``lr``, ``max_pixels``.
    """
    folder.mkdir(parents=True)
    means = [{name: {"accuracy": sum(rows[at]) / len(rows[at]), "num_samples": len(rows[at])}
              for name, rows in scores.items()} for at in range(num_stages + 1)]  # fmt: skip
    prints = options.get("fingerprints", {name: name * 12 for name in scores})
    matrix = AccuracyMatrix(["a", "b"], ["p"], [["a"], ["b"]], means[0], means[1:], prints)
    matrix.save(folder / "accuracy_matrix.json")
    config = json.loads(json.dumps(CONFIG)) | {"seed_everything": seed, "run_dir": str(folder)}
    config["model"]["init_args"]["lr"] = options.get("lr", 0.1)
    config["model"]["init_args"]["backbone"]["max_pixels"] = options.get("max_pixels")
    (folder / "config.yaml").write_text("# lightning.pytorch==2.6.6\n" + yaml.safe_dump(config))
    with (folder / "samples.jsonl").open("w") as file:
        for at in range(num_stages + 1):
            for name, rows in scores.items():
                for number, score in enumerate(rows[at]):
                    row = {"row_id": f"{name}/{number}", "task": name, "stage": at, "after": [None, "a", "b"][at]}
                    row |= {"prompt": f"question {number}", "gold": "yes", "completion": f"{says}{score}"}
                    file.write(json.dumps(row | {"accuracy": score, "parts": {"accuracy": score}}) + "\n")
    return folder


def log(folder: Path, **series: list[float]) -> None:
    """Event files: ``perf_rows=[16, 16]`` logs ``perf/rows`` at two steps."""
    with SummaryWriter(str(folder)) as writer:
        for name, values in series.items():
            for step, value in enumerate(values):
                writer.add_scalar(name.replace("_", "/", 1), value, step, walltime=1000.0 + 60 * step)


def write_updates(run: Path) -> None:
    """Two measured updates, of which the second one knows a task that was learned before; three steps; two stages."""
    influence = [
        {"stage": 1, "step": 1, "base_perplexity": {"a": 2.0}, "on": {"p": {"log_prob_change": -0.004}}},
        {"stage": 2, "step": 1, "base_perplexity": {"a": 8.0, "b": 4.0},
         "on": {"a": {"log_prob_change": 0.003}, "p": {"log_prob_change": -0.002}}},
    ]  # fmt: skip
    risks = [
        {"stage": 1, "step": 1, "grad_norm": 2.0, "probes": 0.5, "probes_per_weight": 3.0},
        {"stage": 1, "step": 2, "grad_norm": 0.0, "probes": 0.0},  # without a signal
        {"stage": 2, "step": 1, "grad_norm": 1.0, "probes_per_weight": 2.0, "earlier_per_weight": 6.0},
    ]
    changes = [
        {"stage": 1, "relative_norm": 0.002, "changed_fraction": 0.1},
        {"stage": 2, "relative_norm": 0.004, "changed_fraction": 0.2},
    ]
    for name, measurements in (("influence", influence), ("gradient_risk", risks), ("weight_change", changes)):
        (run / f"{name}.json").write_text(json.dumps({"version": 1, "measurements": measurements}))
