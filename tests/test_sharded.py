"""Two ranks that share the weights, or hold them twice, learn what one process does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpt_lightning.checkpoint_io import read_checkpoint
from tests.sharded_runs import RUNS

ROOT = Path(__file__).parents[1]
DEVICES = {"auto": 1, "ddp": 2, "fsdp2": 2}


@pytest.fixture
def prepared(small_folder, mixed_prompts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    shutil.copytree(small_folder, folder / "backbone")
    torch.save(mixed_prompts, folder / "prompts.pt")
    return folder


CACHE: dict[str, Path] = {}


@pytest.fixture
def runs(prepared) -> Path:
    """The folder of all runs by all strategies; made once."""
    if "runs" not in CACHE:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for strategy, devices in DEVICES.items():
            command = [sys.executable, "-m", "tests.sharded_runs", str(prepared), strategy, str(devices)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr[-3000:]
        CACHE["runs"] = prepared
    return CACHE["runs"]


def seen(runs: Path, name: str, strategy: str, rank: int = 0) -> dict:
    return torch.load(runs / f"{name}_{strategy}_{rank}.pt")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_learn_what_one_process_does(runs, name, strategy):
    """Accumulated or in micro-batches, clipped, with text alone on one rank, unequal completions, resumed with Adam."""
    one, two = seen(runs, name, "auto"), seen(runs, name, strategy)
    assert one["weights"].keys() == two["weights"].keys()
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], weight, atol=1e-5, rtol=1e-5)


def test_the_runs_that_are_compared_learn_something(runs):
    """Weights move by far more than the tolerance, and completions differ in length between the ranks."""
    from cpt_lightning.models.qwen_vl import QwenVL

    start = QwenVL.from_pretrained(runs / "backbone").state_dict()
    for name in ("sft_full", "rft_full", "resumed_full"):
        weights = seen(runs, name, "auto")["weights"]
        assert max((weights[f"model.{key}"] - start[key]).abs().max() for key in start) > 1e-3, name
    for name in ("sft_lora", "rft_lora"):
        weights = seen(runs, name, "auto")["weights"]
        assert max(weight.abs().max() for key, weight in weights.items() if "lora_B" in key) > 1e-4, name
    lengths = [seen(runs, "rft_full", "fsdp2", rank)["lengths"] for rank in (0, 1)]
    assert lengths[0] != lengths[1]
    assert lengths[0][0] + lengths[1][0] == seen(runs, "rft_full", "auto")["lengths"][0]


def test_nothing_is_gathered_while_completions_are_sampled(runs):
    for rank in (0, 1):
        for name in ("rft_full", "rft_lora"):
            run = seen(runs, name, "fsdp2", rank)
            assert run["gathers_while_sampling"] == [0] * 4
        assert run["gathers"] > 0, "the counter counts nothing"


def test_only_rank_0_reads_weights_and_each_keeps_its_share(runs):
    """Rank 1 has loaded no weight; both keep half, up to rows that do not divide."""
    total = seen(runs, "sft_full", "auto")["local"]
    first, second = (seen(runs, "sft_full", "fsdp2", rank) for rank in (0, 1))
    assert (first["loaded"], second["loaded"]) == (total, 0)
    assert first["local"] + second["local"] == total
    assert second["local"] == pytest.approx(total / 2, rel=0.05)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_shards_of_two_ranks_are_the_one_file_and_are_resumed_to_the_same_bits(runs, tuning):
    """Both ranks have written; one process reads the whole of it."""
    folder = runs / f"resumed_{tuning}_fsdp2_shards.ckpt"
    assert sorted(file.name for file in folder.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    shards, file = (read_checkpoint(path) for path in (folder, runs / f"resumed_{tuning}_fsdp2.ckpt"))
    assert len(file["optimizer_states"][0]["state"]) == len(file["optimizer_states"][0]["param_groups"][0]["params"])
    torch.testing.assert_close(shards["state_dict"], file["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(shards["optimizer_states"], file["optimizer_states"], rtol=0, atol=0)
    resumed = [seen(runs, f"resumed_{tuning}", label)["weights"] for label in ("shards", "fsdp2")]
    torch.testing.assert_close(*resumed, rtol=0, atol=0)
    assert any(
        not torch.equal(weight, shards["state_dict"][name])
        for name, weight in resumed[0].items()
        if name in shards["state_dict"]
    )
