"""The penalty for length."""

import pytest

from cpt_lightning.rewards import OverlongPenalty, Reward, score
from cpt_lightning.types import Example


@pytest.mark.parametrize("num_tokens, penalty", [(0, 0), (768, 0), (896, -0.5), (1024, -1), (5000, -1)])
def test_the_penalty_grows_over_the_margin(num_tokens, penalty):
    """DAPO, eq. 13: (max - margin - length) / margin between 768 and 1,024."""
    assert OverlongPenalty(max_tokens=1024, margin=256)(num_tokens) == penalty


def test_without_a_margin_only_what_exceeds_the_limit_is_punished():
    assert [OverlongPenalty(10, 0)(length) for length in (9, 10, 11)] == [0, 0, -1]


@pytest.mark.parametrize(
    "max_tokens, margin, message", [(0, 0, "max_tokens is 0"), (10, 11, "margin is 11"), (10, -1, "is -1")]
)
def test_a_penalty_that_makes_no_sense_is_refused(max_tokens, margin, message):
    with pytest.raises(ValueError, match=message):
        OverlongPenalty(max_tokens, margin)


def test_the_penalty_is_a_named_part_of_the_total():
    examples = [Example("colours", "rows.json:7", [], "red", Reward())]
    parts = score(["red", "red", "blue"], examples, OverlongPenalty(100, 20), [10, 90, 100])
    assert parts == [
        {"total": 1.0, "accuracy": 1.0, "overlong": 0.0},
        {"total": 0.5, "accuracy": 1.0, "overlong": -0.5},
        {"total": -1.0, "accuracy": 0.0, "overlong": -1.0},
    ]
    with pytest.raises(ValueError, match="0 lengths for 1 completions"):
        score(["red"], examples, OverlongPenalty(100, 20))
