"""Rows of earlier tasks in the batches of later ones: how many, which, and the same on any number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_lightning.data import Replay, Share, StageSampler
from cpt_lightning.data.replay import ReplaySampler
from tests.fakes import KillAt, Killed, LinearModule, make_trainer, number_stream

EARLIER = {"a": 10, "b": 6}


def sampler(replay=Replay(0.25), share=Share(), **options):  # noqa: B008 tuples and a dataclass never changed
    options = {"sizes": {"c": 12}, "batch_size": 4, "num_steps": 12, "key": (0, 2), "share": share, **options}
    return ReplaySampler(replay, EARLIER, {"a": 0, "b": 1}, **options)


def test_a_share_of_every_batch_is_old_and_drawn_equally_from_earlier_tasks():
    """A quarter of 4 rows is one a batch, in 16 batches 8 of a and 8 of b: eight of 10 rows, and all 6 before a second.

    The own 48 rows are 4 passes over 12.
    """
    batches = list(sampler(num_steps=16))
    assert [sum(ref.task != "c" for ref in batch) for batch in batches] == [1] * 16
    rows = {task: Counter(ref.row for batch in batches for ref in batch if ref.task == task) for task in "abc"}
    assert sorted(rows["a"].values()) == [1] * 8
    assert sorted(rows["b"].values()) == [1] * 4 + [2] * 2
    assert rows["c"] == dict.fromkeys(range(12), 4)


def test_a_share_that_a_batch_cannot_have_is_kept_over_several():
    """.1 of 4 rows is .4 a batch: after 1, 2, ... batches floor(.4, .8, 1.2, 1.6, 2.0) = 0, 0, 1, 1, 2 in all."""
    numbers = [sum(ref.task != "c" for ref in batch) for batch in sampler(Replay(0.1), num_steps=5)]
    assert numbers == [0, 0, 1, 0, 1]


def test_only_the_kept_rows_come_back_and_all_of_them():
    old = {ref for batch in sampler(Replay(0.5, rows_per_task=3), num_steps=20) for ref in batch if ref.task != "c"}
    assert Counter(ref.task for ref in old) == {"a": 3, "b": 3}
    later = sampler(Replay(0.5, rows_per_task=3), num_steps=20, key=(0, 3))
    assert {ref for batch in later for ref in batch if ref.task != "c"} == old, "kept rows do not depend on the stage"
    other = sampler(Replay(0.5, rows_per_task=3), num_steps=20, key=(1, 2))
    assert {ref for batch in other for ref in batch if ref.task != "c"} != old


@given(st.integers(0, 12), st.sampled_from([1, 2, 3, 6]), st.floats(0.01, 0.95))
@settings(max_examples=30, deadline=None)
def test_ranks_split_every_batch_and_a_sampler_starts_at_any_step(step, world_size, ratio):
    replay = Replay(ratio)
    alone = list(sampler(replay, batch_size=6))
    ranks = [sampler(replay, Share(rank, world_size), batch_size=6) for rank in range(world_size)]
    for rank in ranks:
        rank.first_step = step
    assert [[ref for part in parts for ref in part] for parts in zip(*ranks, strict=True)] == alone[step:]
    assert sum(ref.task != "c" for batch in alone for ref in batch) == pytest.approx(12 * 6 * ratio, abs=1)


def test_the_first_stage_and_ratio_0_are_those_of_a_stream_without_replay():
    for replay, stage in ((Replay(0.5), 0), (Replay(0.0), 2)):
        stream, plain = number_stream(replay=replay), number_stream()
        stream.setup("fit")
        plain.setup("fit")
        assert type(stream._stage_sampler(stage)) is StageSampler
        assert list(stream._stage_sampler(stage)) == list(plain._stage_sampler(stage))


def test_a_stage_lasts_until_its_own_rows_were_seen():
    """10 rows in batches of 4: 3 batches, of which half is old 5; a task that comes back is not its own past."""
    stream = number_stream(replay=Replay(0.5), stages=["a", "b", "a"])
    stream.setup("fit")
    assert [stream.num_steps(stage) for stage in range(3)] == [3, 5, 5]
    assert [stream.earlier(stage) for stage in range(3)] == [[], ["a"], ["b"]]
    seen = {ref.row for batch in stream._stage_sampler(1) for ref in batch if ref.task == "b"}
    assert seen == set(range(10))


def run(folder, replay, kill=(), resume=False):
    module, stream = LinearModule(), number_stream(replay=replay)
    trainer = make_trainer(folder, stream, callbacks=kill)
    if not resume:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=folder / "last.ckpt" if resume else None)
    return module


def test_a_killed_run_sees_the_same_rows_and_ends_with_the_same_weights(tmp_path):
    replay = Replay(0.4, rows_per_task=3)
    whole = run(tmp_path / "whole", replay)
    assert {row.split("/")[0] for batch in whole.seen[-4:] for row in batch} == {"a", "b", "c"}
    with pytest.raises(Killed):
        run(tmp_path, replay, [KillAt(2, batch=2)])
    rest = run(tmp_path, replay, resume=True)
    assert rest.seen == whole.seen[-len(rest.seen) :]
    assert torch.equal(rest.layer.weight, whole.layer.weight)


def test_another_replay_does_not_go_on_within_a_task(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, Replay(0.4), [KillAt(1, batch=2)])
    with pytest.raises(ValueError, match="middle of a stage with replay=.*'ratio': 0.4.*now it is None"):
        run(tmp_path, None, resume=True)


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": -0.1}, {"rows_per_task": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"data.replay.{next(iter(options))}="):
        Replay(**options)
