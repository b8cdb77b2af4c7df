"""The graders on real reference answers: right in every way to write them, wrong for one another.

The counts are those of the samples in ``../shared/data``; benchmarks/graders_on_real_text.py tries all pairs and other
libraries' graders as well, and says why each exception is one.
"""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COUNTS = {  # rows, ways to write their references, completions with another row's reference, right ones among those
    "real_text/scienceqa": (300, 6600, 1200, 0),
    "real_text/textvqa": (300, 3600, 1200, 0),
    "real_text/vizwiz": (300, 4269, 1200, 0),
    "real_text/gqa": (160, 2062, 640, 0),
    "real_text/geometry3k": (300, 4976, 1200, 0),
    "real_text/pathvqa": (300, 3915, 1200, 0),
    "real_text/super_clevr": (300, 3959, 1200, 1),
    "super_clevr/questions": (146, 2019, 584, 0),
    "geometry3k/problems": (6, 98, 24, 0),
    "mmlu_pro": (300, 6576, 1200, 0),
}


@pytest.fixture
def graders():
    """The benchmark's module, where it and the samples are."""
    if not (BENCHMARKS / "graders_on_real_text.py").is_file():
        pytest.skip("the benchmarks are not here")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import graders_on_real_text as module
    finally:
        sys.path.remove(str(BENCHMARKS))
    from graders_rows import DATA

    if not DATA.is_dir():
        pytest.skip("the samples of real text are not here")
    return module


@pytest.mark.parametrize("name", COUNTS)
def test_real_references_are_right_in_every_way_and_wrong_for_one_another(graders, name):
    counts = graders.count(name, all_pairs=False)
    assert counts.missed == []
    assert [why for _, _, why in counts.accepted_shuffled if why is None] == []
    found = (counts.num_rows, counts.num_ways, counts.num_shuffled, len(counts.accepted_shuffled))
    assert found == COUNTS[name]


@pytest.mark.parametrize("name, num_pairs, num_same", [("real_text/super_clevr", 10920, 60), ("mmlu_pro", 12584, 0)])
def test_every_pair_of_real_references_that_is_graded_as_the_same_means_the_same(graders, name, num_pairs, num_same):
    """MMLU-Pro: every wrong option of every row, by letter and by text."""
    counts = graders.count(name, all_pairs=True)
    assert (counts.num_pairs, len(counts.accepted_pairs)) == (num_pairs, num_same)
    assert [pair for pair in counts.accepted_pairs if pair[2] is None] == []


def test_every_file_is_counted(graders):
    assert set(COUNTS) == set(graders.KINDS)
