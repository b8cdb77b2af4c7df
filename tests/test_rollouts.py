"""The whole way by commands: RFT, rollouts of its checkpoint, SFT on what was right."""

import json
from pathlib import Path

import torch

from cpt_lightning.cli import main

ROOT = Path(__file__).parents[1]


def test_rft_then_rollouts_then_sft_on_them(tmp_path, monkeypatch):
    """The tuned model's fingerprint stands in the file; SFT learns each kept row, and is evaluated on the own rows."""
    monkeypatch.chdir(ROOT)
    small = ["--data.stages=[bars2]", "--data.probes=null", "--data.num_workers=0"]
    small += [f"--data.tasks.{name}.num_test=2" for name in ("word2", "bars2", "polygon2", "single", "digit2")]
    small += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    rft, steps = tmp_path / "rft", ["--data.prompts_per_step=4", "--data.steps=1"]
    grpo = ["-c", "configs/demo/grpo.yaml", "--model.init_args.optimizer.init_args.lr=0.001", f"--run_dir={rft}"]
    main(["fit", *grpo, *small, *steps])

    few = [*small, "--data.tasks.bars2.num_train=4"]
    main(["predict", *grpo, "-c", "configs/rollouts/collect.yaml", *few, f"--ckpt_path={rft / '1_bars2.ckpt'}"])
    rows = [json.loads(line) for line in (rft / "rollouts.jsonl").read_text().splitlines()]
    assert rows and all(row["accuracy"] == 1 and row["task"] == "bars2" for row in rows)
    assert {row["model"] for row in rows} != {fingerprint_of_the_base()}

    sft, options = tmp_path / "sft", [f"--data.rollouts={rft / 'rollouts.jsonl'}", "--data.passes=1"]
    options += ["--data.steps=null", f"--data.prompts_per_step={len(rows)}"]
    main(
        [
            "fit",
            "-c",
            "configs/demo/sft.yaml",
            "-c",
            "configs/demo/rollout_sft.yaml",
            *small,
            *options,
            f"--run_dir={sft}",
        ]
    )
    matrices = [json.loads((folder / "accuracy_matrix.json").read_text()) for folder in (rft, sft)]
    assert [row["scores"]["bars2"]["num_samples"] for row in matrices[1]["rows"]] == [2, 2]
    assert matrices[0]["rows"][0] == matrices[1]["rows"][0], "the same base on the same rows"
    assert torch.load(sft / "last.ckpt", weights_only=True)["global_step"] == 1


def fingerprint_of_the_base() -> str | None:
    from cpt_lightning.models import load_backbone
    from cpt_lightning.models.fingerprint import model_fingerprint

    return model_fingerprint(load_backbone("tiny")[0])
