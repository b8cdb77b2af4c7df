"""Which rows are kept, by hand."""

import pytest

from cpt_lightning.callbacks.filter.choice import Choice, kept_rows, shortage
from cpt_lightning.callbacks.filter.verdicts import Verdict

COUNTS = [0, 4, 2, 1, 0, 3, 4, 0]
"""Passes of eight rows, K = 4; a ninth was refused."""


def verdicts(counts=COUNTS) -> list[Verdict]:
    rows = [Verdict("a", row, f"a/{row}", count, count / 4, "x", None) for row, count in enumerate(counts)]
    return [*rows, Verdict("a", len(rows), f"a/{len(rows)}", 0, 0.0, None, "image refused")]


def kept(choice: Choice, counts=COUNTS, seed=0, stage=0) -> list[int]:
    return [each.row for each in choice.of(verdicts(counts), seed, stage) if each.kept]


@pytest.mark.parametrize(
    ("lowest", "highest", "rows"),
    [(1, 4, [1, 2, 3, 5, 6]), (1, 3, [2, 3, 5]), (2, 2, [2]), (0, 4, [0, 1, 2, 3, 4, 5, 6, 7]), (4, 4, [1, 6])],
)
def test_the_window_keeps_what_lies_inside_bounds_included_and_no_refused_row(lowest, highest, rows):
    assert kept(Choice("solvable", lowest, highest)) == rows


def test_every_row_says_why():
    found = [each.reason for each in Choice("solvable", 1, 3).of(verdicts(), 0, 0)]
    below, above = "fewer than 1 passes", "more than 3 passes"
    assert found == [below, above, "solvable", "solvable", below, "solvable", above, below, "image refused"]
    found = [each.reason for each in Choice("unsolvable", 1, 3).of(verdicts(), 0, 0)]
    ours, solvable = "unsolvable", "solvable"
    assert found == [ours, above, solvable, solvable, ours, solvable, above, ours, "image refused"]


def test_controls_keep_as_many_rows_as_the_window_would():
    """Three rows lie in [1, 3], three below it (of which a refused one is none), and eight may be drawn."""
    assert kept(Choice("unsolvable", 1, 3)) == [0, 4, 7]
    random = kept(Choice("random", 1, 3))
    assert len(random) == 3 and set(random) <= set(range(8))
    assert {tuple(kept(Choice("random", 1, 3), seed=seed)) for seed in range(5)} != {tuple(random)}
    assert {tuple(kept(Choice("random", 1, 3), stage=stage)) for stage in range(5)} != {tuple(random)}
    assert kept(Choice("random", 1, 3)) == random


def test_a_cap_draws_from_the_pool_and_holds_for_all_modes():
    for mode in ("solvable", "unsolvable", "random"):
        assert len(kept(Choice(mode, 1, 3, cap=2))) == 2
        assert len(kept(Choice(mode, 1, 3, cap=99))) == 3
    drawn = {tuple(kept(Choice("solvable", 1, 3, cap=2), seed=seed)) for seed in range(20)}
    assert drawn == {(2, 3), (2, 5), (3, 5)}
    assert "not drawn" in {each.reason for each in Choice("solvable", 1, 3, cap=2).of(verdicts(), 0, 0)}


def test_too_few_unsolvable_rows_are_refused_with_the_cap_that_makes_arms_equal():
    """Five rows are solvable in [1, 4], three are not."""
    with pytest.raises(ValueError, match=r"only 3 rows .* keeps 5; set filter.cap=3 for all modes"):
        kept(Choice("unsolvable", 1, 4))
    assert kept(Choice("unsolvable", 1, 4, cap=3)) == [0, 4, 7]


def test_what_is_missing_is_said_with_counts():
    """Of the nine rows three are kept, three have too few passes, two too many, and one was refused."""
    chosen = Choice("solvable", 1, 3).of(verdicts(), 0, 0)
    assert kept_rows(chosen, ["a", "b"]) == {"a": [2, 3, 5], "b": []}
    assert shortage(chosen, ["a"], fewest=3) is None
    left_out = "left out: 3 fewer than 1 passes, 2 more than 3 passes, 1 image refused"
    assert shortage(chosen, ["a"], 4) == f"3 of 9 rows are kept, and filter.min_rows=4 are needed; {left_out}"
    assert "kept, none of task 'b', and" in (shortage(chosen, ["a", "b"], 1) or "")
