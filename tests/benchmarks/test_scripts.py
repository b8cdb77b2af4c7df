"""The benchmarks do not rot: each runs at a very small size, within this process."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import decode
import grpo_step
import logprob_memory
import naive
import plan_on_ranks
import pytest
import sft_step
import startup
import torch
import workload
from presets import PresetBackbone
from workload import Workload

from cpt_lightning.rollouts import completion_logprobs
from cpt_lightning.types import Completions

SMALL = ["--preset", "tiny", "--prompts", "2", "--group_size", "2", "--new_tokens", "2", "--prompt_tokens", "60"]
SHORT = ["--steps", "1", "--warm_up", "1", "--repeats", "1", "--threads", "1"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script's ``main`` with options, and gives what it wrote."""

    def run(script, *options: str) -> dict:
        if hasattr(script, "in_fresh_process"):
            monkeypatch.setattr(script, "in_fresh_process", lambda function, *args, threads: function(*args))
        monkeypatch.setattr(sys, "argv", [script.__name__, *options, "--out", str(tmp_path / "record.json")])
        script.main()
        return json.loads((tmp_path / "record.json").read_text())

    return run


def test_grpo_step_compares_ours_with_the_naive_way(run, capsys):
    record = run(grpo_step, *SMALL, *SHORT, "--arms", "ours", "naive", "--micro_prompts", "1",
                 "--peak_tflops", "2")  # fmt: skip

    (result,) = record["results"]
    figures = {"rollout_s", "update_s", "step_s", "cpu_s", "peak_bytes"}
    assert set(result["medians"]["naive"]) == figures
    assert set(result["medians"]["ours"]) == figures | {"executed_flops", "equivalent_flops"}
    ours, naive = (result["rounds"][arm][0]["step_s"] for arm in ("ours", "naive"))
    assert result["ratios"]["naive/ours"]["step_s"]["median"] == pytest.approx(naive / ours)
    printed = capsys.readouterr().out
    assert "naive/ours: step" in printed
    rate = result["medians"]["ours"]["equivalent_flops"] / result["medians"]["naive"]["step_s"] / 1e12
    assert f"naive {rate:.3g} TFLOP/s ({rate / 2:.1%} of the peak)" in printed
    assert record["commit"] is not None and record["versions"]["torch"] == version("torch")


def test_every_token_of_a_large_vocabulary_has_a_text_for_rewards_to_tell_apart():
    processor = PresetBackbone("qwen2.5-vl-7b").load_processor()
    texts = processor.tokenizer.batch_decode([[812], [152_063], [812, 152_063]])
    assert texts == ["<812>", "<152063>", "<812><152063>"]
    assert len(processor.tokenizer) == 152_064


@pytest.mark.filterwarnings("ignore")
def test_trl_takes_the_same_steps(run):
    pytest.importorskip("trl")

    (grpo,) = run(grpo_step, *SMALL, *SHORT, "--arms", "trl", "--micro_prompts", "1")["results"]
    sft = run(sft_step, "--preset", "tiny", "--prompts", "3", *SHORT)

    assert grpo["medians"]["trl"]["step_s"] > 0
    losses = {arm: figures["first_loss"] for arm, figures in sft["medians"].items()}
    assert losses["trl"] == pytest.approx(losses["ours"], rel=1e-5)


def test_sft_step_learns_from_rows_that_vary_eightfold_in_length_without_real_text_too(run, monkeypatch, tmp_path):
    monkeypatch.setattr(workload, "find_spec", lambda name: None)

    record = run(sft_step, "--preset", "tiny", "--prompts", "4", *SHORT, "--data", str(tmp_path / "none"))

    assert max(record["row_tokens"]) / min(record["row_tokens"]) == pytest.approx(8, rel=0.15)
    assert list(record["medians"]) == ["ours"]
    with pytest.raises(SystemExit, match="TRL is not installed, and --arms names no other"):
        run(sft_step, "--arms", "trl")


def test_logprob_memory_gives_both_ways_the_same_loss(run):
    record = run(logprob_memory, "--tokens", "8", "--vocabulary", "50", "--hidden_size", "4", "--repeats", "1")

    for matrix in ("trained", "frozen"):
        losses = [figures["loss"] for figures in record["output_matrix"][matrix]["medians"].values()]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_decode_counts_the_tokens_of_even_and_of_ragged_completions(run):
    (even,) = run(decode, *SMALL, *SHORT)["results"]
    (ragged,) = run(decode, *SMALL, *SHORT, "--preset", "cpu-6m", "--new_tokens", "12", "--ragged")["results"]

    assert all(figures["mean_length"] == 2 for figures in even["medians"].values())
    assert all(1 <= figures["mean_length"] < 12 for figures in ragged["medians"].values())


def test_startup_times_commands(run, monkeypatch):
    monkeypatch.setattr(startup, "COMMANDS", {"python": [sys.executable, "-c", "pass"]})

    assert 0 < run(startup, "--repeats", "1")["median_s"]["python"] < 10


def test_two_ranks_hold_about_what_is_planned(run, monkeypatch):
    """Of a small model: what the libraries hold is much of it."""
    monkeypatch.setattr(plan_on_ranks, "quiet", lambda: None)
    small = ["--preset", "cpu-6m", "--prompt_tokens", "75", "--objective", "sft", "--tuning", "full"]
    record = run(plan_on_ranks, *small, "--strategy", "fsdp2")
    (result,) = record["results"]
    assert result["strategy"] == "fsdp2" and 0.5 < result["ratio"] < 1.5


def test_a_workload_has_prompts_of_exactly_the_length_asked_for():
    for length in (75, 315, 1020):
        asked = Workload(prompts=2, prompt_tokens=length)
        processor = asked.backbone.load_processor()
        examples = asked.examples(processor)
        prompts = processor.encode([row.messages for row in examples], [row.images for row in examples])

        assert prompts.lengths.tolist() == [length, length]
        num_image_tokens = (prompts.input_ids == processor.image_token_id).sum(dim=1)
        assert (num_image_tokens / length).tolist() == pytest.approx([0.8, 0.8], abs=0.06)


def test_the_naive_arm_scores_completions_as_ours_does():
    asked = Workload(preset="tiny", prompts=2, prompt_tokens=60, group_size=2)
    model, processor = asked.backbone.load_model().eval(), asked.backbone.load_processor()
    rows = asked.examples(processor)
    prompts = processor.encode([row.messages for row in rows], [row.images for row in rows])
    ids = torch.randint(0, 500, (4, 5))
    completions = Completions(ids, torch.ones_like(ids, dtype=torch.bool))
    repeated = naive.repeated(prompts, 2)

    scored = naive.logprobs(model, repeated, torch.cat([repeated.input_ids, ids], dim=1))[:, -5:]

    torch.testing.assert_close(scored, completion_logprobs(model, prompts, completions), rtol=1e-4, atol=1e-4)
