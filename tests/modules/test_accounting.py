"""What a step cost is counted by hand, and host memory stays flat."""

from __future__ import annotations

import time

import pytest
import torch

from cpt_lightning.models import Backbone
from cpt_lightning.models.flops import Flops
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.modules.accounting import StepAccount, host_rss, peak_flops_of
from cpt_lightning.rollouts import Sampling
from tests.training import fit, largest_difference, sgd, weights, with_examples


def test_shares_of_the_peak_are_operations_by_time(monkeypatch: pytest.MonkeyPatch):
    """6e9 executed and 24e9 equivalent operations in 2 s at 30e9 a second: 10 % and 40 %."""
    clock = iter([100.0, 102.0])
    monkeypatch.setattr("cpt_lightning.modules.accounting.time.perf_counter", lambda: next(clock))
    account = StepAccount(peak_flops=30e9)
    account.start()
    account.add_flops(Flops(5e9, 20e9))
    account.add_flops(Flops(1e9, 4e9))
    measured = account.end(torch.device("cpu"))
    assert measured["time/step_s"] == 2.0
    assert measured["perf/mfu"] == pytest.approx(0.1)
    assert measured["perf/mfu_equivalent"] == pytest.approx(0.4)


def test_a_step_goes_from_the_end_of_the_last_one_unless_training_paused(monkeypatch: pytest.MonkeyPatch):
    """Ends at 2 and 5, so the second took 3, loading included; after a pause one from 9 to 10 takes 1."""
    clock = iter([0.0, 2.0, 5.0, 9.0, 10.0])
    monkeypatch.setattr("cpt_lightning.modules.accounting.time.perf_counter", lambda: next(clock))
    account, seconds = StepAccount(), []
    for pauses in (False, False, True):
        if pauses:
            account.pause()
        account.start()
        seconds.append(account.end(torch.device("cpu"))["time/step_s"])
    assert seconds == [2.0, 3.0, 1.0]


def test_what_is_done_aside_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch):
    """A step from 8 to 14, of which 9 to 12 went aside, took 3, and a phase of it from before that to 13 took 2; what
    went aside of no step at all counts nowhere."""
    clock = iter([6.0, 7.0, 8.0, 8.0, 9.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr("cpt_lightning.modules.accounting.time.perf_counter", lambda: next(clock))
    account = StepAccount()
    with account.aside():
        pass
    account.start()
    phase = account.clock()
    with account.aside():
        pass
    assert account.clock() - phase == 2.0
    assert account.end(torch.device("cpu"))["time/step_s"] == 3.0


def test_an_unknown_device_has_no_peak_and_an_impossible_one_is_refused():
    assert peak_flops_of(torch.device("cpu")) is None
    with pytest.raises(ValueError, match="peak_flops=0 must be positive"):
        StepAccount(peak_flops=0)


@pytest.mark.parametrize("objective", [SFT, RFT])
def test_a_step_logs_its_cost(small_folder, processor, mixed_prompts, objective):
    """Tokens by hand: the prompts' and, for SFT, targets of 1 to 4 digits with their end: 2 + 3 + 4 + 5."""
    batch = with_examples(mixed_prompts, processor)
    module = objective(backbone=Backbone(small_folder), optimizer=sgd, peak_flops=1e12)
    metrics = fit(module, [batch] * 2).callback_metrics
    for name in ("time/step_s", "perf/tokens_per_s", "perf/mfu", "perf/mfu_equivalent", "perf/host_rss_gb"):
        assert metrics[name] > 0, name
    assert metrics["perf/mfu"] <= metrics["perf/mfu_equivalent"] * 1.5
    if objective is SFT:
        tokens = int(mixed_prompts.lengths.sum()) + 2 + 3 + 4 + 5
        assert metrics["perf/tokens_per_s"] * metrics["time/step_s"] == pytest.approx(tokens, rel=1e-3)


def test_an_evaluation_between_two_steps_has_a_time_of_its_own(small_folder, processor, mixed_prompts, monkeypatch):
    """Each evaluation sleeps 1.5 s, which is no part of the step after it."""
    module = SFT(backbone=Backbone(small_folder), optimizer=sgd)
    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda batch: (time.sleep(1.5), evaluate(batch))[1])
    batch = with_examples(mixed_prompts, processor)
    metrics = fit(module, [batch] * 2, limit_val_batches=1, val_check_interval=1).callback_metrics
    assert metrics["time/evaluation_s"] > 1.5 > metrics["time/step_s"]


@pytest.mark.timeout(600)
def test_host_memory_is_flat_over_300_steps(small_folder, processor, mixed_prompts):
    """After 100 steps all buffers exist; 200 more GRPO steps may add 8 MB, where the pixels alone would be 100 MB."""
    from lightning import Callback

    class Memory(Callback):
        def __init__(self) -> None:
            self.rss: list[int] = []

        def on_train_batch_end(self, *args) -> None:
            self.rss.append(host_rss())

    memory = Memory()
    batch = with_examples(mixed_prompts.select([0, 1]), processor)
    module = RFT(backbone=Backbone(small_folder), optimizer=sgd, group_size=2, sampling=Sampling(max_new_tokens=4))
    fit(module, [batch] * 300, callbacks=[memory])
    assert len(memory.rss) == 300
    assert memory.rss[-1] - memory.rss[99] < 8e6, [round(rss / 1e6) for rss in memory.rss[::25]]


def test_a_step_says_what_it_is_at_and_draws_the_same_whether_or_not_one_listens(
    mixed_prompts, processor, small_folder
):
    """Four prompts, two at a time, three tokens each: what a person at a terminal sees beside the bar."""

    def trained(listener) -> dict[str, torch.Tensor]:
        sampling = Sampling(max_new_tokens=3)
        module = RFT(backbone=Backbone(small_folder), optimizer=sgd, group_size=2, sampling=sampling,
                     rollout_batch_prompts=2)  # fmt: skip
        module.on_phase = listener
        fit(module, [with_examples(mixed_prompts, processor)])
        return weights(module)

    heard: list[str] = []
    assert largest_difference(trained(heard.append), trained(None)) == 0
    sampled = [f"rollout {rows}/4: {token}/3 tokens" for rows in ("1-2", "3-4") for token in range(3)]
    assert [phase for phase in heard if "tokens" in phase] == sampled
    assert [phase for phase in heard if "tokens" not in phase] == ["rollout", *["rollout", "reward"] * 2, "update"]
