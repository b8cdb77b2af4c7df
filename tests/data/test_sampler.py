"""Which rows stand in which batch."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_lightning.data.sampler import (
    EvaluationSampler,
    RowRef,
    Share,
    StageSampler,
    num_steps,
    rows_per_pass,
)


def flat(sampler) -> list[RowRef]:
    return [ref for batch in sampler for ref in batch]


@pytest.mark.parametrize(
    "num_rows, batch_size, passes, steps",
    [(100, 10, 1, 10), (100, 16, 1, 7), (100, 16, 3, 19), (100, 16, 0.5, 4), (10, 16, 1, 1), (30, 3, 1.1, 11)],
)
def test_steps_are_enough_for_every_row_and_no_more(num_rows, batch_size, passes, steps):
    """ceil(passes * rows / batch): 3 * 100 / 16 = 18.75 -> 19; 1.1 * 30 is 33.000000000000004 in floats, still 11."""
    assert num_steps(num_rows, batch_size, passes) == steps


def test_every_pass_shows_every_row_once_and_batches_run_across_its_end():
    """10 rows in batches of 4, two passes: 5 full batches, each pass a permutation, the third batch from both."""
    batches = list(StageSampler({"a": 10}, 4, num_steps(10, 4, 2), key=(0, 0)))
    assert [len(batch) for batch in batches] == [4] * 5
    rows = [ref.row for batch in batches for ref in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


def test_the_last_batch_is_filled_from_the_next_pass():
    rows = [ref.row for ref in flat(StageSampler({"a": 10}, 4, num_steps(10, 4, 1), key=(0, 0)))]
    longer = [ref.row for ref in flat(StageSampler({"a": 10}, 4, 5, key=(0, 0)))]
    assert len(rows) == 12 and set(rows) == set(range(10))
    assert rows == longer[:12]


def test_the_order_depends_on_seed_and_stage_and_on_nothing_else():
    orders = [tuple(flat(StageSampler({"a": 50}, 5, 10, key=key))) for key in [(0, 0), (0, 0), (1, 0), (0, 1)]]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_sampler_starts_at_any_step(step, batch_size, size):
    options = {"sizes": {"a": size, "b": 3}, "batch_size": batch_size, "num_steps": 30, "key": (3, 1)}
    later = StageSampler(**options, mixing="uniform")
    later.first_step = step
    assert list(later) == list(StageSampler(**options, mixing="uniform"))[step:]
    assert len(later) == 30


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_split_every_batch_without_repeats(world_size):
    """The ranks' shares of a batch, side by side, are the batch of a single process."""
    options = {"sizes": {"a": 20, "b": 9}, "batch_size": 6, "num_steps": 9, "key": (0, 0)}
    alone = list(StageSampler(**options))
    shares = [list(StageSampler(**options, share=Share(rank, world_size))) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert [ref for share in shares for ref in share[step]] == batch
        assert {len(share[step]) for share in shares} == {6 // world_size}


def test_a_batch_that_ranks_cannot_split_is_refused():
    with pytest.raises(ValueError, match="prompts_per_step=6 cannot be split evenly over 4 ranks.*multiple of 4"):
        StageSampler({"a": 20}, 6, 3, key=(0, 0), share=Share(0, 4))


@pytest.mark.parametrize(
    "mixing, expected",
    [("size", [80, 15, 5]), (1.0, [80, 15, 5]), ("uniform", [34, 33, 33]), (2.0, [59, 26, 15])],
)
def test_mixing_shares(mixing, expected):
    """Temperature 2: sqrt(80), sqrt(15), sqrt(5) = 8.944, 3.873, 2.236 of 15.053 -> 59.4, 25.7, 14.9 of 100."""
    assert rows_per_pass([80, 15, 5], mixing) == expected


def test_a_mixed_pass_by_size_shows_every_row_of_every_task_once():
    assert Counter(flat(StageSampler({"a": 7, "b": 5}, 4, 3, key=(0, 0)))) == Counter(
        [*(RowRef("a", i) for i in range(7)), *(RowRef("b", i) for i in range(5))]
    )


def test_a_task_drawn_less_than_its_size_still_shows_all_rows_before_it_repeats_one():
    """Uniform over 30 and 6 rows: 18 of each per pass, so 5 passes show the large one 3 times, the small 15 times."""
    counts = Counter(flat(StageSampler({"large": 30, "small": 6}, 36, 5, key=(0, 0), mixing="uniform")))
    assert {counts[RowRef("large", i)] for i in range(30)} == {3}
    assert {counts[RowRef("small", i)] for i in range(6)} == {15}
    half = Counter(flat(StageSampler({"large": 30, "small": 6}, 36, 1, key=(0, 0), mixing="uniform")))
    assert max(half[RowRef("large", i)] for i in range(30)) == 1


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 13), min_size=1), st.integers(1, 9), st.integers(1, 4))
@settings(deadline=None)
def test_evaluation_counts_every_row_once_however_many_ranks(sizes, batch_size, world_size):
    ranks = [list(EvaluationSampler(sizes, batch_size, Share(rank, world_size))) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for batches in zip(*ranks, strict=True):
        assert len({len(batch) for batch in batches}) == 1  # all ranks do the same work
        assert len({ref.task for batch in batches for ref in batch}) == 1  # on the same task
    counted = Counter((ref.task, ref.row) for batches in ranks for batch in batches for ref in batch if ref.valid)
    assert counted == {(task, index): 1 for task, size in sizes.items() for index in range(size)}
    assert len(ranks[0]) == len(EvaluationSampler(sizes, batch_size, Share(0, world_size)))


def test_evaluation_pads_only_what_does_not_divide():
    """5 rows, batches of 4 over 2 ranks: [0 1 | 2 3], then [4 | 4 as filler]."""
    ranks = [list(EvaluationSampler({"a": 5}, 4, Share(rank, 2))) for rank in (0, 1)]
    assert ranks[0] == [[RowRef("a", 0), RowRef("a", 1)], [RowRef("a", 4)]]
    assert ranks[1] == [[RowRef("a", 2), RowRef("a", 3)], [RowRef("a", 4, valid=False)]]
