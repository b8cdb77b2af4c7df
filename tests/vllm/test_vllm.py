"""vLLM on the CPU against our own engine: ``make test-vllm``, in an environment of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpt_lightning.models import Backbone, Lora, Quantization, load_backbone
from cpt_lightning.modules import RFT
from cpt_lightning.rollouts import VLLM, Sampling, completion_logprobs, sample_groups
from cpt_lightning.rollouts.vllm.process import EngineProcess
from cpt_lightning.types import Completions
from tests.ranks import ROOT
from tests.rollouts.test_vllm import is_gone, move
from tests.test_sharded import DEVICES, seen
from tests.training import fit, with_examples
from tests.vllm import shared_engine

GREEDY = Sampling(24, temperature=0)
CLOSE = 1e-4
"""Nats between the log-probabilities of both engines, in float32."""
OPTIONS = {"max_model_len": 512, "enforce_eager": True, "tolerance": 1e-3, "time_limit_s": 600}
LEARNED = {
    "auto": ["engine_full", "engine_lora"],
    "ddp": ["engine_full", "shared_full"],
    "fsdp2": ["engine_full", "engine_lora"],
}
"""By strategy what is learned with vLLM: by one process, and by two."""
pytestmark = pytest.mark.timeout(900)  # a start on a busy machine can take minutes


@pytest.fixture(scope="module")
def sampler():
    """One engine for all tests that do not break it: a start takes a quarter of a minute and more."""
    sampler = VLLM(**OPTIONS)
    yield sampler
    sampler.close()


@pytest.fixture
def tiny():
    model, _ = load_backbone("tiny")
    return model


def difference(model, prompts, drawn, temperature: float = 1.0) -> float:
    """The largest one between what the sampler says of its tokens and what the policy says of them."""
    with torch.no_grad():
        logps = completion_logprobs(model, prompts, drawn, temperature=temperature)
    return float((logps - drawn.logps).abs().max())


def test_greedy_completions_are_ours_token_for_token(sampler, tiny, processor, mixed_prompts):
    """Text alone, one image, two images; with a prefix, and cut off after four tokens."""
    for sampling in (GREEDY, Sampling(24, temperature=0, prefix="<think>let me"), Sampling(4, temperature=0)):
        theirs, ours = (
            sample(tiny, processor, mixed_prompts, 2, sampling) for sample in (sampler.sample, sample_groups)
        )
        assert torch.equal(theirs.ids, ours.ids) and torch.equal(theirs.mask, ours.mask)
        torch.testing.assert_close(theirs.logps, ours.logps, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("sampling", [Sampling(24), Sampling(24, temperature=1.5, top_p=0.9, top_k=40)])
def test_sampled_log_probabilities_are_those_of_the_policy(sampler, tiny, processor, mixed_prompts, sampling):
    """Before bans, top-k and top-p, at the temperature; the greedy completion that ReMax wants among them."""
    generator = torch.Generator().manual_seed(0)
    drawn = sampler.sample(tiny, processor, mixed_prompts, 8, sampling, generator, with_greedy=True)
    assert len(drawn) == 4 * (8 + 1)
    assert len({tuple(ids) for ids in drawn.ids.tolist()}) > 8
    assert difference(tiny, mixed_prompts, drawn, sampling.temperature) < CLOSE
    best = drawn.select(range(8, 36, 9))
    assert torch.equal(best.ids, sample_groups(tiny, processor, mixed_prompts, 1, GREEDY).ids)


def test_seeds_decide_and_other_rows_do_not(sampler, tiny, processor, mixed_prompts):
    def draw(rows: list[int], seed: int) -> list[str]:
        generators = [torch.Generator().manual_seed(seed + row) for row in rows]
        prompts = mixed_prompts.select(rows)
        return processor.decode(sampler.sample(tiny, processor, prompts, 4, Sampling(24), generators))

    together = draw([0, 1, 2, 3], 0)
    assert together[8:12] == draw([2], 0)
    assert together != draw([0, 1, 2, 3], 100)


def test_frequencies_of_a_token_are_its_probabilities(sampler, tiny, processor, mixed_prompts):
    """800 first tokens of one prompt at temperature 2: within four standard errors, and a token to spare.

    800 prompts are more tokens than a batch has, which vLLM 0.32 would break off within a prompt, and fail.
    """
    prompt, sampling = mixed_prompts.select([1]), Sampling(1, temperature=2.0)
    drawn = sampler.sample(tiny, processor, prompt, 800, sampling, torch.Generator().manual_seed(0))
    for token in drawn.ids.unique().tolist():
        share = float((drawn.ids == token).float().mean())
        probability = float(drawn.logps[drawn.ids == token][0].exp())
        assert abs(share - probability) < 4 * (probability * (1 - probability) / 800) ** 0.5 + 1e-3


def test_vision_tokens_are_never_drawn_however_probable(sampler, tiny, processor, mixed_prompts):
    """The output row of a placeholder becomes five times that of the token that is the most probable one."""
    prompt = mixed_prompts.select([1])
    first = int(sample_groups(tiny, processor, prompt, 1, GREEDY).ids[0, 0])
    with torch.no_grad():
        rows = tiny.get_output_embeddings().weight
        rows[processor.image_token_id] = 5 * rows[first]
    theirs, ours = (sample(tiny, processor, prompt, 1, GREEDY) for sample in (sampler.sample, sample_groups))
    assert torch.equal(theirs.ids, ours.ids)
    assert float(theirs.logps[0, 0]) < -1  # what is banned has its share of the probability nevertheless


@pytest.mark.parametrize(("tuning", "use_dora"), [("full", False), ("lora", False), ("lora", True), ("qlora", False)])
def test_updates_are_handed_over(sampler, processor, mixed_prompts, tuning, use_dora):
    options = {"lora": Lora(rank=4, use_dora=use_dora), "quantization": Quantization(compute_dtype="float32")}
    model, _ = load_backbone("tiny", tuning=tuning, **options)
    for _ in range(2):
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.02 * torch.randn_like(weight)
        count = sampler._num_handovers
        drawn = sampler.sample(model, processor, mixed_prompts, 4, Sampling(24))
        assert difference(model, mixed_prompts, drawn) < CLOSE
        assert sampler._num_handovers == count + 1
    sampler.sample(model, processor, mixed_prompts, 4, Sampling(24))
    assert sampler._num_handovers == count + 1


def test_an_engine_in_bfloat16_is_near_the_policy(tiny, processor, mixed_prompts):
    """What is handed over is what it computes in, and its log-probabilities differ by what that rounds."""
    sampler = VLLM(**{**OPTIONS, "dtype": "bfloat16", "tolerance": 0.1})
    try:
        for _ in range(2):
            drawn = sampler.sample(tiny, processor, mixed_prompts, 8, Sampling(24))
            with torch.no_grad():
                logps = completion_logprobs(tiny, mixed_prompts, drawn)
            gaps = (drawn.logps - logps)[drawn.mask].abs()
            assert 1e-4 < float(gaps.mean()) < 0.05 and float(gaps.max()) < 0.5
            move(tiny)
    finally:
        sampler.close()


def test_ranks_that_share_an_engine_see_what_one_sees(sampler, tiny, processor, mixed_prompts, tmp_path):
    """Two rows each, of the same draws; then with weights of their own, unequally often.

    A hand-over that goes wrong in one worker's share is caught, and the next is right. When a worker is killed both
    ranks hear of it, and nothing is left.
    """
    torch.save(mixed_prompts, tmp_path / "prompts.pt")
    first, second = together(tmp_path)
    ours = sample_groups(tiny, processor, mixed_prompts, 2, GREEDY)
    alone = sampler.sample(
        tiny, processor, mixed_prompts, 8, shared_engine.SAMPLING, shared_engine.generators([*range(4)])
    )
    for name, wanted in {"greedy": ours, "sampled": alone}.items():
        found = Completions.cat([first[name], second[name]], processor.pad_token_id)
        assert torch.equal(found.ids, wanted.ids) and torch.equal(found.mask, wanted.mask), name
        torch.testing.assert_close(found.logps, wanted.logps, atol=CLOSE, rtol=0)
    for rank, count in zip((first, second), shared_engine.NUM_CALLS, strict=True):
        assert len(rank["differences"]) == count and max(rank["differences"]) < CLOSE
        assert rank["error"].startswith("sampling engine, ") and "died unexpectedly" in rank["error"], rank["error"]
        assert rank["seconds"] < 60 and rank["left"] == []
    wrong, right = second["complaints"]
    assert wrong.endswith("such as model.language_model.layers.0.mlp.down_proj.weight") and right is None


def together(folder: Path) -> list[dict]:
    """What both ranks have seen."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.vllm.shared_engine", str(folder)]
    with (folder / "log").open("w+") as log:
        options = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log}
        ranks = [subprocess.Popen([*command, str(rank)], **options) for rank in (0, 1)]
        try:
            codes = [rank.wait(600) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        log.seek(0)
        assert codes == [0, 0], log.read()[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def says_look(completion: str, gold: str | list[str]) -> dict[str, float]:
    """1 for one of the two ways in which the base begins to think."""
    right = float("look" in completion)
    return {"total": right, "accuracy": right}


def test_ten_steps_learn_as_with_our_engine(sampler, processor, mixed_prompts):
    """Both raise the same reward as far; the mismatch is logged at every step, and is that of rounding."""
    means = {}
    for name, engine in {"ours": None, "vllm": sampler}.items():
        rewards, mismatches = [], []
        module = RFT(
            backbone=Backbone("tiny"), sampler=engine, group_size=8, sampling=Sampling(24), max_grad_norm=1.0,
            importance_sampling=None if engine is None else "token",
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        )  # fmt: skip
        collect, log = module.collect, module.log_updates

        def noted(*args, collect=collect, rewards=rewards):
            rollout = collect(*args)
            rewards.append(float(rollout.rewards.mean()))
            return rollout

        def logged(stats, num_updates, log=log, mismatches=mismatches):
            mismatches += [float(part.mismatch.max) for part in stats if part.mismatch is not None]
            return log(stats, num_updates)

        module.collect, module.log_updates = noted, logged
        fit(module, [with_examples(mixed_prompts, processor, reward=says_look)] * 10)
        means[name] = (sum(rewards[:2]) / 2, sum(rewards[-3:]) / 3)
        assert (len(mismatches) > 0) == (engine is not None)
        assert all(each < 1e-3 for each in mismatches)
    assert all(end - start > 0.2 for start, end in means.values()), means
    assert abs(means["ours"][1] - means["vllm"][1]) < 0.25, means


def launch(folder: Path, strategy: str, devices: int, *names: str) -> None:
    """The runs of those names in processes of their own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.sharded_runs", str(folder), strategy, str(devices), *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_with_an_engine_each_or_one_learn_what_one_process_does(tiny, processor, mixed_prompts, tmp_path):
    """All weights in copies, by an engine each and by one; in shards that are gathered for the hand-over, and LoRA."""
    for part in (tiny, processor):
        part.save_pretrained(tmp_path / "backbone")
    torch.save(mixed_prompts, tmp_path / "prompts.pt")
    for strategy, names in LEARNED.items():
        launch(tmp_path, strategy, DEVICES[strategy], *names)
    start = tiny.state_dict()
    for strategy, names in LEARNED.items():
        for name in names:
            one = seen(tmp_path, name.replace("shared", "engine"), "auto")["weights"]
            moved = [(weight - start.get(key.removeprefix("model."), 0.0)).abs().max() for key, weight in one.items()]
            assert max(moved) > 1e-3
            torch.testing.assert_close(seen(tmp_path, name, strategy)["weights"], one, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize(
    "method, said",
    [("receive", "is not what was sent"), ("load", "weights are not those that were sent, such as")],
)
def test_a_hand_over_that_goes_wrong_is_caught(tiny, processor, mixed_prompts, monkeypatch, sampler, method, said):
    """A byte that changes on its way; and weights that came, and were not put in the place of the old ones."""
    sampler.sample(tiny, processor, mixed_prompts, 1, GREEDY)
    pid, call = sampler.engine.pid, EngineProcess.call

    def spoiled(engine, name, *arguments):
        if name == "load" == method:
            return None
        if name == "receive" == method:
            sampler._buffer[arguments[0][0].start + 1] ^= 1
        return call(engine, name, *arguments)

    monkeypatch.setattr(EngineProcess, "call", spoiled)
    move(tiny)
    with pytest.raises(RuntimeError, match=said):
        sampler.sample(tiny, processor, mixed_prompts, 1, GREEDY)
    assert is_gone(pid)


@pytest.mark.parametrize(
    "number, said", [(signal.SIGKILL, "it died, exit code -9"), (signal.SIGSTOP, "no answer within time_limit_s=3")]
)
def test_an_engine_that_is_killed_or_hangs_is_reported(tiny, processor, mixed_prompts, sampler, number, said):
    sampler.sample(tiny, processor, mixed_prompts, 1, GREEDY)
    pid, folder = sampler.engine.pid, Path(sampler.engine._begun.address.folder)
    assert list(folder.glob("vllm_dist_*"))
    os.kill(pid, number)
    sampler.engine.time_limit_s = 3
    with pytest.raises(RuntimeError, match=f"{said}(.|\n)*last lines of its log:(.|\n)*vllm|INFO"):
        sampler.sample(tiny, processor, mixed_prompts, 1, GREEDY)
    assert is_gone(pid) and not folder.exists()
    assert not sampler.engine.is_open
