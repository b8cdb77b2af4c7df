"""Which completions are kept, and why the others are not."""

import pytest
import torch

from cpt_lightning.rollouts import Selection
from cpt_lightning.types import Completions

RIGHT, WRONG, HALF = {"accuracy": 1.0}, {"accuracy": 0.0}, {"accuracy": 0.5}


def judge(selection: Selection, texts: str, scores: list[dict], lengths=None, ends=None) -> list[str]:
    count = len(scores)
    return selection.judge(texts.split(), scores, lengths or [3] * count, ends or [True] * count)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["kept", "incorrect", "duplicate", "kept", "kept", "unfinished", "special_token"]),
        ({"per_row": 2}, ["kept", "incorrect", "duplicate", "kept", "surplus", "unfinished", "special_token"]),
        ({"distinct": False, "min_tokens": 3}, ["kept", "incorrect", "kept", "short", "kept", "unfinished", "short"]),
        ({"max_tokens": 3}, ["kept", "incorrect", "duplicate", "kept", "long", "unfinished", "special_token"]),
        (
            {"correct_only": False, "finished_only": False},
            ["kept", "kept", "duplicate", "kept", "kept", "kept", "special_token"],
        ),
    ],
)
def test_every_filter_says_what_it_leaves_out(options, expected):
    """Lengths 3 3 3 2 4 8 2; the sixth is right but was cut off."""
    scores = [RIGHT, WRONG, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT]
    found = judge(
        Selection(**options), "a b a c d e <|im_start|>", scores, [3, 3, 3, 2, 4, 8, 2], [True] * 5 + [False, True]
    )
    assert found == expected


def test_soft_accuracies_have_a_threshold_and_the_format_counts():
    unformatted = {"accuracy": 1.0, "format": 0.0}
    assert judge(Selection(threshold=0.5), "a b c", [HALF, WRONG, unformatted]) == ["kept", "incorrect", "incorrect"]
    assert judge(Selection(), "a", [HALF]) == ["incorrect"]


def test_a_wrong_answer_before_does_not_make_the_same_text_a_duplicate_of_what_is_not_kept():
    """Cut off once, and the same text once more with its end: the second one is the first that is kept."""
    assert judge(Selection(), "a a", [RIGHT, RIGHT], ends=[False, True]) == ["unfinished", "kept"]


def test_completions_end_with_any_stop_token():
    completions = Completions(torch.tensor([[5, 1, 0], [5, 6, 7], [2, 0, 0]]), torch.ones(3, 3, dtype=torch.bool))
    assert completions.ended([1, 2]).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": 0.5, "correct_only": False}, "no effect"),
        ({"min_tokens": 5, "max_tokens": 4}, "max_tokens=4"),
        ({"per_row": 0}, "per_row=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Selection(**options)
