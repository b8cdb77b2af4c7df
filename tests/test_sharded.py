"""Two ranks that share the weights, or hold them twice, learn what one process does."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cpt_lightning.checkpoint_io import read_checkpoint
from tests import sharded_runs
from tests.ranks import run_ranks
from tests.sharded_runs import FLOAT32, OFFLOADED, runs_by

pytestmark = pytest.mark.timeout(1200)  # the first test waits for three launches
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
        for strategy, devices in DEVICES.items():
            run_ranks(sharded_runs.main, prepared, strategy, devices, ranks=devices, time_limit_s=600)
        CACHE["runs"] = prepared
    return CACHE["runs"]


def seen(runs: Path, name: str, strategy: str, rank: int = 0) -> dict:
    return torch.load(runs / f"{name}_{strategy}_{rank}.pt")


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        (name, strategy)
        for strategy in ("ddp", "fsdp2")
        for name in runs_by(strategy)
        if not name.startswith(("mixed", "shared"))
    ],
)
def test_two_ranks_learn_what_one_process_does(runs, name, strategy):
    """Accumulated or in micro-batches, clipped, resumed with Adam; unequal completions, and on one rank text alone,
    more rows, or rows of another objective."""
    one, two = seen(runs, name, "auto"), seen(runs, name, strategy)
    assert one["weights"].keys() == two["weights"].keys()
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_that_share_an_engine_learn_what_one_process_does(runs, strategy):
    one, two = (seen(runs, *run)["weights"] for run in (("engine_full", "auto"), ("shared_full", strategy)))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, atol=1e-5, rtol=1e-5)


OF_REWARDS = ["reward", "reward/accuracy"]
OF_ROLLOUTS = [*OF_REWARDS, "reward_variance", "entropy", "zero_signal_groups", "clip_fraction", "ratio"]
OF_MISMATCH = ["mismatch/mean", "mismatch/max", "mismatch/kl_k1", "mismatch/kl_k3"]
LOGGED = {
    "sft_full": ["completion_length"],
    "rft_full": [*OF_ROLLOUTS, "kl_k3", "reward/own"],
    "rft_lora": [*OF_ROLLOUTS, "kl_k3"],
    "on_policy_full": [*OF_REWARDS, "kept_fraction", "left_out/incorrect"],
    "multitask_full": OF_ROLLOUTS,
    "engine_full": [*OF_ROLLOUTS, "kl_k3", *OF_MISMATCH],
}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", LOGGED)
def test_two_ranks_log_means_over_the_rows_of_both(runs, name, strategy):
    """Of every batch; in every other one rank has three rows and the other one. In the first of several objectives one
    rank has no rollout to tell of. Mismatch is rounding, so that only what was exchanged is the same on both."""
    shown = [f"train/{each}" for each in ("loss", *LOGGED[name])]
    one, *two = (
        [[step[key] for key in shown] for step in seen(runs, name, strategy, rank)["logged"]]
        for strategy, rank in (("auto", 0), (strategy, 0), (strategy, 1))
    )
    assert len(one) == 4
    for ours, theirs in zip(two[0], one, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert two[1] == two[0]


@pytest.mark.parametrize("name", ["sft_qlora", "rft_qlora"])
def test_four_bit_weights_and_all_else_that_is_frozen_stay_bit_identical_on_two_ranks(runs, name):
    """The packed bytes and their scales are those of a fresh load on either rank; the adapters alone have moved."""
    from cpt_lightning.models import Backbone
    from cpt_lightning.models.adapters import Lora

    torch.manual_seed(0)
    fresh = Backbone(str(runs / "backbone"), tuning="qlora", lora=Lora(rank=4), quantization=FLOAT32).load_model()
    start = fresh.state_dict()
    assert sum(weight.dtype == torch.uint8 and key.endswith("weight") for key, weight in start.items()) == 2 * 7
    for rank in (0, 1):
        weights = seen(runs, name, "ddp", rank)["weights"]
        changed = {key for key, weight in start.items() if not torch.equal(weights[f"model.{key}"], weight)}
        assert changed and all("lora_" in key for key in changed)


@pytest.mark.parametrize("name", OFFLOADED)
def test_shards_in_main_memory_learn_the_same_bit_for_bit(runs, name):
    kept, offloaded = (seen(runs, name, strategy)["weights"] for strategy in ("fsdp2", "fsdp2_offload"))
    assert kept.keys() == offloaded.keys()
    assert [key for key, weight in kept.items() if not torch.equal(offloaded[key], weight)] == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_mixed_precision_on_two_ranks_is_near_that_of_one_process(runs, strategy):
    """Text alone on one rank, accumulated: rounding is a small part of what is learned, and weights stay float32."""
    start = start_of(runs)
    one, two = (seen(runs, "mixed_sft_full", each)["weights"] for each in ("auto", strategy))
    assert {weight.dtype for weight in two.values()} == {torch.float32}
    assert distance(two, one) < 0.05 * distance(one, start)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_rft_in_mixed_precision_learns_on_two_ranks(runs, strategy):
    """Other tokens are sampled where rounding differs, so that only the size of what is learned compares."""
    start = start_of(runs)
    one, two = (distance(seen(runs, "mixed_rft_full", each)["weights"], start) for each in ("auto", strategy))
    assert two == pytest.approx(one, rel=0.5)


def start_of(runs: Path) -> dict:
    from cpt_lightning.models.qwen_vl import QwenVL

    return {f"model.{key}": weight for key, weight in QwenVL.from_pretrained(runs / "backbone").state_dict().items()}


def distance(one: dict, other: dict) -> float:
    """Length of the difference of all weights."""
    return sum((one[key] - other[key]).square().sum().item() for key in other) ** 0.5


def test_the_runs_that_are_compared_learn_something(runs):
    """Weights move by far more than the tolerance, and completions differ in length between the ranks."""
    from cpt_lightning.models.qwen_vl import QwenVL

    start = QwenVL.from_pretrained(runs / "backbone").state_dict()
    for name in ("sft_full", "rft_full", "engine_full", "on_policy_full", "resumed_full", "multitask_full"):
        weights = seen(runs, name, "auto")["weights"]
        assert max((weights[f"model.{key}"] - start[key]).abs().max() for key in start) > 1e-3, name
    for name in ("sft_lora", "rft_lora", "engine_lora"):
        weights = seen(runs, name, "auto")["weights"]
        assert max(weight.abs().max() for key, weight in weights.items() if "lora_B" in key) > 1e-4, name
    lengths = [seen(runs, "rft_full", "fsdp2", rank)["lengths"] for rank in (0, 1)]
    assert lengths[0] != lengths[1]
    assert lengths[0][0] + lengths[1][0] == seen(runs, "rft_full", "auto")["lengths"][0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_rollouts_of_two_ranks_are_those_of_one_process(runs, strategy):
    """Each row once, in the same order; five rows in batches of four leave a rank with filler."""
    one, two = (
        [json.loads(line) for line in (runs / name / "rollouts.jsonl").read_text().splitlines()]
        for name in ("auto", strategy)
    )
    assert len({row["row_id"] for row in one}) == 8
    for row, other in zip(one, two, strict=True):
        for name in ("logprob_sum", "logprob_mean"):
            assert other.pop(name) == pytest.approx(row.pop(name), abs=1e-5)
        assert other == row


def test_a_rank_that_kept_nothing_waits_for_one_that_did(runs):
    """Of the steps that the runs above compare; together the ranks keep what one process does."""
    first, second = (seen(runs, "on_policy_full", "fsdp2", rank)["kept"] for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == seen(runs, "on_policy_full", "auto")["kept"]
    assert any(bool(a) != bool(b) for a, b in zip(first, second, strict=True)), (first, second)


def test_nothing_is_gathered_while_completions_are_sampled(runs):
    for rank in (0, 1):
        for name in ("rft_full", "rft_lora"):
            run = seen(runs, name, "fsdp2", rank)
            assert run["gathers_while_sampling"] == [0] * 4
        assert run["gathers"] > 0, "the counter counts nothing"


def test_decoder_layers_exchange_gradients_as_they_come(runs):
    """Only an update that goes back through the rollout's pass holds those of all layers."""
    for rank in (0, 1):
        for name in ("sft_full", "sft_lora", "rft_full"):
            assert set(seen(runs, name, "fsdp2", rank)["waiting_gradients"]) == {0}, name
        assert all(seen(runs, "rft_lora", "fsdp2", rank)["waiting_gradients"])


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
