"""The side of vLLM that training sees, with our own model in vLLM's place; tests/vllm/ has the real one."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest
import torch

from cpt_lightning.models import Lora, Quantization, load_backbone
from cpt_lightning.models.adapted_layers import merge_into_base, plain_weights
from cpt_lightning.models.adapters import adapter_weights, adapters_replaced
from cpt_lightning.rollouts import VLLM, Sampling, completion_logprobs, sample_groups
from cpt_lightning.rollouts.vllm import sampler as vllm_sampler
from cpt_lightning.rollouts.vllm.probe import Probe
from cpt_lightning.rollouts.vllm.process import Begun, EngineProcess
from cpt_lightning.rollouts.vllm.requests import Answer, completions_of
from cpt_lightning.rollouts.vllm.weights import Part, buckets, checksum, differing, edges, fingerprint, unpack
from tests import fake_engine
from tests.naive import random_completions
from tests.ranks import forked

GREEDY = Sampling(6, temperature=0)


@pytest.fixture(scope="module")
def server():
    """Starts engines in a tenth of the time."""
    with fake_engine.engines_from_a_server():
        yield


@pytest.fixture
def make(monkeypatch, server):
    """Makes samplers that believe vLLM to be there, and ends them."""
    monkeypatch.setattr(vllm_sampler, "find_spec", lambda name: name)
    made = []

    def make(engine: type = fake_engine.FakeEngine, **options) -> VLLM:
        made.append(VLLM(**{"time_limit_s": 120, "tolerance": 1e-4, **options}))
        made[-1].make_engine = engine
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


def move(model) -> None:
    """An update of every weight that is trained."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# -- options -----------------------------------------------------------------------------------------------------------


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(vllm_sampler, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'cpt-lightning\[vllm\]'"):
        VLLM()


@pytest.mark.parametrize(
    "options", [{"gpu_memory_utilization": 1.5}, {"max_model_len": 1}, {"tolerance": 0.0}, {"time_limit_s": -1.0}]
)
def test_an_option_out_of_range_is_named(make, options):
    with pytest.raises(ValueError, match=f"sampler.{next(iter(options))}={next(iter(options.values()))} must"):
        make(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_sleep_without_a_gpu_is_refused(make):
    with pytest.raises(ValueError, match="sleep_level=1: vLLM sleeps on GPUs only; set it to 0"):
        make(sleep_level=1)


def test_a_prompt_without_room_for_a_completion_is_refused(make, small_model, processor, mixed_prompts):
    with pytest.raises(ValueError, match="0 of them of sampling.prefix, but sampler.max_model_len is 20"):
        make(max_model_len=20).sample(small_model, processor, mixed_prompts, 1, GREEDY)


# -- completions -------------------------------------------------------------------------------------------------------


def test_completions_have_the_form_of_our_own(make, small_model, processor, mixed_prompts):
    """Text, one image and two; greedy the very same, with a prefix too; sampled ones scored as the policy scores."""
    sampler = make()
    for sampling in (GREEDY, Sampling(6, temperature=0, prefix="<think>let")):
        theirs, ours = (
            sample(small_model, processor, mixed_prompts, 2, sampling) for sample in (sampler.sample, sample_groups)
        )
        assert torch.equal(theirs.ids, ours.ids) and torch.equal(theirs.mask, ours.mask)
        torch.testing.assert_close(theirs.logps, ours.logps, atol=1e-5, rtol=0)
    sampling = Sampling(6, temperature=1.4, top_p=0.9, top_k=50)
    drawn = sampler.sample(small_model, processor, mixed_prompts, 3, sampling, with_greedy=True)
    assert len(drawn) == 4 * (3 + 1)
    policy = completion_logprobs(small_model, mixed_prompts, drawn, temperature=1.4)
    torch.testing.assert_close(drawn.logps, policy, atol=1e-5, rtol=0)
    last = drawn.select(range(3, 16, 4))
    assert torch.equal(last.ids, sample_groups(small_model, processor, mixed_prompts, 1, GREEDY).ids)


def test_a_row_s_draws_depend_on_its_generator_alone(make, small_model, processor, mixed_prompts):
    sampler = make()

    def draw(rows: list[int], seed: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed + row) for row in rows]
        return sampler.sample(small_model, processor, mixed_prompts.select(rows), 2, Sampling(6), generators).ids

    together = draw([0, 1, 2, 3], 0)
    assert torch.equal(together[4:6], draw([2], 0))
    assert not torch.equal(together, draw([0, 1, 2, 3], 100))


def test_a_completion_that_ended_for_no_reason_or_is_banned_is_refused(processor):
    for answer in (Answer([5, 6], [-1.0, -1.0], "abort"), Answer([processor.image_token_id], [-1.0], "stop")):
        with pytest.raises(RuntimeError, match="has a banned token, or is neither ended"):
            completions_of([[answer]], [], processor, 8, torch.device("cpu"))


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_handed_over_when_they_moved_and_only_then(make, small_model, processor, mixed_prompts):
    sampler = make()
    for count in (1, 1, 2, 3):
        if count > 1:
            move(small_model)
        theirs, ours = (
            sample(small_model, processor, mixed_prompts, 1, GREEDY) for sample in (sampler.sample, sample_groups)
        )
        assert torch.equal(theirs.ids, ours.ids)
        assert sampler._num_handovers == count


def test_adapters_are_merged_on_the_way_and_other_adapters_are_noticed(make, small_folder, processor, mixed_prompts):
    model, _ = load_backbone(small_folder, tuning="lora", lora=Lora(rank=2))
    move(model)
    others = [0.3 * torch.randn_like(weight) for weight in adapter_weights(model)]
    sampler = make()
    for number, context in enumerate((torch.no_grad(), adapters_replaced(model, others)), start=1):
        with context, torch.no_grad():
            drawn = sampler.sample(model, processor, mixed_prompts, 2, Sampling(6))
            policy = completion_logprobs(model, mixed_prompts, drawn)
        torch.testing.assert_close(drawn.logps, policy, atol=1e-5, rtol=0)
        assert sampler._num_handovers == number


@pytest.mark.parametrize("lora", [Lora(rank=2), Lora(rank=2, use_dora=True)], ids=["lora", "dora"])
def test_plain_weights_are_what_peft_merges(small_folder, lora):
    model, _ = load_backbone(small_folder, tuning="lora", lora=lora)
    move(model)
    plain = {name: weight.clone() for name, weight in plain_weights(model)}
    bare, _ = load_backbone(small_folder)
    assert plain.keys() == dict(bare.named_parameters()).keys()
    merge_into_base(model)
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            torch.testing.assert_close(plain[name.replace(".base_layer.", ".")], weight)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_a_plain_model_computes_what_the_adapted_one_does(small_folder, mixed_prompts, tuning, use_dora):
    """Four-bit weights unpacked."""
    lora = Lora(rank=2, use_dora=use_dora)
    model, _ = load_backbone(small_folder, tuning=tuning, lora=lora, quantization=Quantization(compute_dtype="float32"))
    move(model)
    bare, _ = load_backbone(small_folder)
    completions = random_completions(4, 3, 100, torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted, before = (completion_logprobs(each, mixed_prompts, completions) for each in (model, bare))
        bare.load_state_dict(dict(plain_weights(model)), strict=False)
        plain = completion_logprobs(bare, mixed_prompts, completions)
    torch.testing.assert_close(plain, adapted, atol=1e-5, rtol=0)
    assert float((plain - before).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "engine, said",
    [
        (fake_engine.Stale, "weights are not those that were sent"),
        (fake_engine.Blind, "log-probabilities differ from the policy's"),
    ],
)
def test_an_engine_with_the_weights_of_before_is_found_out(make, small_model, processor, mixed_prompts, engine, said):
    sampler = make(engine)
    sampler.sample(small_model, processor, mixed_prompts, 1, GREEDY)
    pid = sampler.engine.pid
    move(small_model)
    with pytest.raises(RuntimeError, match=said):
        sampler.sample(small_model, processor, mixed_prompts, 1, GREEDY)
    assert is_gone(pid)


def test_a_corrupted_hand_over_is_caught(make, small_model, processor, mixed_prompts):
    with pytest.raises(RuntimeError, match="what came of .* is not what was sent; it would sample from another model"):
        make(fake_engine.Garbling).sample(small_model, processor, mixed_prompts, 1, GREEDY)


def test_a_fingerprint_sees_any_change(small_model):
    """One bit, two rows in each other's place, and what ``weight.data`` writes past autograd's counters."""
    before = fingerprint(small_model)
    assert before == fingerprint(small_model)
    weight = small_model.model.language_model.layers[0].mlp.up_proj.weight
    saved = weight.detach().clone()
    for change in (
        lambda: weight.data[3].add_(weight.data[3], alpha=2**-20),
        lambda: weight.data.copy_(saved[torch.tensor([1, 0, *range(2, len(saved))])]),
        lambda: weight.data.copy_(saved.flip(1)),
    ):
        change()
        assert fingerprint(small_model) != before
        weight.data.copy_(saved)
    assert fingerprint(small_model) == before


def test_buckets_hold_all_weights_in_order_and_end_where_the_next_would_not_fit():
    """Of 40, 12 and 64 bytes, each beginning at a multiple of 16, the first two end at 48 + 12 = 60 of 64 bytes."""
    weights = {"a": torch.arange(10.0), "b": torch.arange(6, dtype=torch.bfloat16), "c": torch.ones(4, 4)}
    buffer = torch.full((64,), 7, dtype=torch.uint8)
    seen = []
    for places in buckets(weights.items(), buffer):
        assert all(torch.equal(unpack(buffer, place), weights[place.name]) for place in places)
        seen.append([(place.name, place.start, place.end) for place in places])
    assert seen == [[("a", 0, 40), ("b", 48, 60)], [("c", 0, 64)]]


def test_a_checksum_sees_a_byte_and_its_place():
    data = torch.arange(40, dtype=torch.uint8)
    other, swapped = data.clone(), data.clone()
    other[39] += 1
    swapped[:8], swapped[8:16] = data[8:16].clone(), data[:8].clone()
    assert len({checksum(each) for each in (data, other, swapped)}) == 3


def test_weights_that_are_missing_or_differ_are_named():
    sent = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    found = [Part("a", 0, 0, torch.ones(2)), Part("b", 0, 0, torch.tensor([1.0, 1.1]))]
    assert differing(sent, found) == ["b", "c"]


def test_shares_make_up_a_weight_together_and_each_is_compared():
    """Rows 0-1 and 2-3 of a matrix divided by rows, its columns by columns; a share twice is compared twice."""
    assert edges(8, 2) == [0, 3, 4, 7] and edges(9, 2) == [0, 3, 4, 7] and edges(5, 1) == [0, 4]
    sent = torch.arange(16.0).view(4, 4)
    halves = [Part("a", 0, 0, sent[:2]), Part("a", 2, 0, sent[2:])]
    for parts in (halves, [Part("a", 0, 0, sent[:, :2]), Part("a", 0, 2, sent[:, 2:])], [*halves, halves[0]]):
        assert differing({"a": sent}, parts) == []
        wrong = Part("a", parts[-1].row, parts[-1].column, parts[-1].values + 1)
        for others in (parts[:1], [*parts[:-1], wrong], [wrong, *parts]):
            assert differing({"a": sent}, others) == ["a"]


def test_a_probe_complains_of_distance_of_nan_and_of_standing_still(mixed_prompts):
    logps = torch.tensor([-1.0, -2.0])
    make_probe = partial(Probe, mixed_prompts, None, tolerance=0.1)
    assert make_probe().complaint(logps + 0.05, logps) is None
    assert "differ from the policy's by up to 0.2 nats" in make_probe().complaint(logps + 0.2, logps)
    assert "differ" in make_probe().complaint(logps * torch.nan, logps)
    probe = make_probe()
    probe.complaint(logps, logps)
    assert "moved the policy's log-probabilities on a probe by 0.01" in probe.complaint(logps, logps + 0.01)


# -- the process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine, limit_s, said",
    [
        (fake_engine.Unready, 120, "start: ValueError: no memory for keys and values(.|\n)*looking for a device"),
        (fake_engine.Dying, 120, "generate: it died, exit code 3(.|\n)*out of memory"),
        (fake_engine.Hanging, 2, "generate: no answer within time_limit_s=2(.|\n)*waiting for the others"),
    ],
)
def test_an_engine_that_fails_is_reported_with_its_last_words_and_leaves_nothing(
    make, small_model, processor, mixed_prompts, engine, limit_s, said, monkeypatch
):
    sampler = make(engine)
    pids = []
    call = EngineProcess.call

    def noted(self, method, *arguments):
        pids.append(self.pid)
        self.time_limit_s = limit_s if method == "generate" else 120
        return call(self, method, *arguments)

    monkeypatch.setattr(EngineProcess, "call", noted)
    with pytest.raises(RuntimeError, match=said):
        sampler.sample(small_model, processor, mixed_prompts, 1, GREEDY)
    assert pids and is_gone(pids[0])


def begin_littering(found) -> None:
    begun = Begun(fake_engine.Littering, {}, {}, is_shared=False)
    engine = EngineProcess(begun.address, 120, begun)
    litter = engine.call("sleep", 1)
    assert all(map(os.path.exists, litter))
    found.put([engine.pid, begun.address.folder, *litter])
    kept.append(engine)
    time.sleep(600)


def test_nothing_is_left_of_an_engine_whose_training_is_killed():
    """Its temporary files lie in its folder; shared memory is removed by a process that outlives both."""
    context = forked()
    found = context.Queue()
    process = context.Process(target=begin_littering, args=(found,))
    process.start()
    pid, *left = found.get(timeout=120)
    process.kill()
    process.join()
    wait_until_gone(pid, left)


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_nothing_is_left_of_an_engine_that_ends_while_the_training_goes_on(server, ends):
    begun = Begun(fake_engine.Littering, {}, {}, is_shared=False)
    engine = EngineProcess(begun.address, 120, begun)
    left = [begun.address.folder, *engine.call("sleep", 1)]
    assert all(map(os.path.exists, left))
    if ends == "killed":
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="it died, exit code -9"):
            engine.call("sleep", 1)
    else:
        engine.close()
    wait_until_gone(engine.pid, left)


def wait_until_gone(pid: int, paths: list[str], seconds: float = 20) -> None:
    """Of a process and what it left."""
    end = time.monotonic() + seconds
    while (not is_gone(pid) or any(map(os.path.exists, paths))) and time.monotonic() < end:
        time.sleep(0.05)
    assert is_gone(pid) and not [path for path in paths if os.path.exists(path)]


def begin_and_leave(pids) -> None:
    begun = Begun(fake_engine.Idle, {}, {}, is_shared=False)
    engine = EngineProcess(begun.address, 120, begun)
    pids.put(engine.pid)
    kept.append(engine)  # until the process ends


kept: list[EngineProcess] = []


def test_a_process_of_multiprocessing_ends_with_its_engine():
    """It waits for its children, whom SIGTERM does not end."""
    context = forked()
    pids = context.Queue()
    process = context.Process(target=begin_and_leave, args=(pids,))
    process.start()
    pid = pids.get(timeout=120)
    process.join(20)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0
    assert is_gone(pid)
