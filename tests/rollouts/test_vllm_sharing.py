"""Ranks that share an engine: how they find it, whose turn it is, and what each hears of it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cpt_lightning.rollouts.vllm import group as groups
from cpt_lightning.rollouts.vllm.group import EngineGroup, Meeting
from cpt_lightning.rollouts.vllm.process import Address, Begun, EngineProcess
from tests import fake_engine
from tests.rollouts.test_vllm import is_gone

CPU = torch.device("cpu")
A_WHILE_S = 0.3


@pytest.fixture(scope="module")
def engine():
    begun = Begun(fake_engine.Counting, {}, {}, is_shared=True)
    ranks = [EngineProcess(begun.address, 120, begun), EngineProcess(begun.address, 120)]
    yield ranks
    ranks[1].close()
    ranks[0].close()
    assert is_gone(begun.address.pid)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def waits(future) -> bool:
    """Whether nothing comes of it within a while."""
    try:
        future.result(A_WHILE_S)
    except TimeoutError:
        return True
    return False


# -- whose turn it is --------------------------------------------------------------------------------------------------


def test_nobody_draws_by_weights_that_are_not_there_and_none_come_before_all_have_drawn(engine, pool):
    a, b = engine
    assert a.call("use", [1]) is False  # hands them over
    second = pool.submit(b.call, "use", [1])
    assert waits(second)
    a.call("has", [1])
    assert second.result(60) is True
    a.call("end")
    others = pool.submit(a.call, "use", [2])
    assert waits(others)
    b.call("end")
    assert others.result(60) is False
    a.call("end")  # without having handed them over
    assert b.call("use", [1]) is False
    b.call("end")


def test_completions_are_drawn_together_but_at_one_temperature(engine, pool):
    """Of three tokens each, the second request from the first one's second token on."""
    a, b = engine
    for temperature, together in ((1.0, [2, 1]), (0.5, [1, 1])):
        first = pool.submit(a.call, "generate", ["one"], 1.0)
        assert waits(first)
        second = pool.submit(b.call, "generate", ["other"], temperature)
        assert [*first.result(60), *second.result(60)] == together


def test_it_sleeps_when_all_who_used_it_say_so_and_forgets_its_weights_at_level_2(engine, pool):
    a, b = engine
    for level, has_them in ((1, True), (2, False)):
        for rank in (a, b):
            if not rank.call("use", [3]):
                rank.call("has", [3])
            rank.call("end")
        first = pool.submit(a.call, "sleep", level)
        assert waits(first)
        assert b.call("sleep", level) == first.result(60) == 7
        assert b.call("use", [3]) is has_them
        b.call("end")
        b.call("sleep", 1)


@pytest.mark.parametrize("is_first", [True, False])
def test_an_error_is_told_to_every_rank_and_nothing_is_left(pool, is_first):
    """To one that waits for its completions, and to one that calls later."""
    begun = Begun(fake_engine.Counting, {}, {}, is_shared=True)
    a, b = EngineProcess(begun.address, 120, begun), EngineProcess(begun.address, 120)
    waiting, guilty = (a, b) if is_first else (b, a)
    future = pool.submit(waiting.call, "generate", ["one"], 1.0)
    for call in (lambda: guilty.call("generate", ["never"], 1.0), lambda: future.result(60)):
        with pytest.raises(RuntimeError, match="generate: ValueError: no such request(.|\n)*Traceback"):
            call()
    assert is_gone(begun.address.pid)
    with pytest.raises(RuntimeError, match="it has ended before this rank called it"):
        EngineProcess(begun.address, 120)


# -- how they find it --------------------------------------------------------------------------------------------------


@pytest.fixture
def of_rank(monkeypatch):
    """Groups as ranks of a world of four make them."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def of_rank(rank: int, size: int = 2, device: torch.device = CPU) -> EngineGroup:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        return EngineGroup(size, device)

    return of_rank


MEETING = Meeting(Address("/folder", 12, groups.platform.node()), "/buffer", [])


def test_whichever_rank_of_a_group_comes_first_begins_its_engine(of_rank):
    """Ranks 0 and 1, 2 and 3; and the next engine, when there is no such any more."""
    for number in range(2):
        late, early, other = of_rank(0), of_rank(1), of_rank(2)
        assert [early.comes_first(), late.comes_first(), other.comes_first()] == [True, False, True]
        meeting = replace(MEETING, buffer=f"/{number}")
        early.publish(meeting)
        assert late.look_up(10) == meeting


def test_an_engine_that_nobody_begins_or_that_is_elsewhere_is_reported(of_rank):
    with pytest.raises(RuntimeError, match=r"none was begun within time_limit_s=0\.1"):
        of_rank(0).look_up(0.1)
    for meeting, said in (
        (replace(MEETING, address=Address("/folder", 12, "elsewhere")), "are on the machines elsewhere and"),
        (replace(MEETING, devices=["0", "1"]), r"whose GPUs would be \['0', '1'\] by one of them and \[\] by another"),
    ):
        group, other = of_rank(2), of_rank(3)
        group.publish(meeting)
        with pytest.raises(ValueError, match=f"tensor_parallel_size=2: the 2 ranks from 2 share an engine, .*{said}"):
            other.look_up(10)


def test_ranks_that_do_not_make_up_groups_are_refused(of_rank):
    with pytest.raises(ValueError, match="tensor_parallel_size=3: .* the number of ranks, 4, is no multiple of it"):
        of_rank(0, size=3)


def test_one_process_has_an_engine_for_itself_alone():
    assert EngineGroup(1, CPU).comes_first()
    with pytest.raises(ValueError, match="tensor_parallel_size=2: .* the number of ranks, 1, is no multiple of it"):
        EngineGroup(2, CPU)


@pytest.mark.parametrize(
    "visible, rank, index, devices",
    [("4,5,6,7", 3, 3, ["6", "7"]), ("4,5,6,7", 2, 2, ["6", "7"]), ("a,b", 1, 1, ["a", "b"])],
)
def test_an_engine_has_the_gpus_of_its_ranks(of_rank, monkeypatch, visible, rank, index, devices):
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", visible)
    assert of_rank(rank, device=torch.device("cuda", index)).devices == devices
    assert groups.environment(devices)["CUDA_VISIBLE_DEVICES"] == ",".join(devices)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_sees_its_own_gpu_alone_is_refused(of_rank, monkeypatch, rank):
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(ValueError, match=r"needs to see the GPUs of all 2 ranks .* and this one sees \['5'\]"):
        of_rank(rank, device=torch.device("cuda", 0))
