"""Precision, recall, F1 and yes-ratio of questions that are answered by yes or no."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_lightning.rewards import Reward, with_ratios
from cpt_lightning.rewards.yes_no import YES_NO_COUNTS


def ratios_of(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """What is reported of (completion, reference) pairs."""
    scores = [Reward("yes_no")(said, gold) for said, gold in pairs]
    return with_ratios({name: sum(parts[name] for parts in scores) / len(scores) for name in scores[0]})


@pytest.mark.parametrize(
    "said, gold, counts",
    [
        ("Yes.", "yes", (1, 1, 1)),
        ("<think>no dog?</think><answer>Yes</answer>", "no", (1, 0, 0)),
        ("There isn't any.", "yes", (0, 1, 0)),
        ("a dog", "yes", (0, 1, 0)),
        ("", "yes", (0, 1, 0)),
        ("yes or no", "no", (0, 0, 0)),
        ("True", ["yes", "Yes, it is"], (1, 1, 1)),
        ("yes", "thymus", (1, 0, 0)),  # a reference that means neither is no positive row
    ],
)
def test_an_answer_counts_as_a_yes_only_if_it_says_so(said, gold, counts):
    parts = Reward("yes_no", "think_answer")(said, gold)
    assert tuple(parts[name] for name in YES_NO_COUNTS) == counts
    assert parts["total"] == pytest.approx(0.9 * parts["accuracy"] + 0.1 * parts["format"])


def test_nothing_over_nothing_is_zero():
    """No yes is said: precision 0/0; no reference is yes: recall 0/0; neither: F1 0/0 too, at full accuracy."""
    assert ratios_of([("no", "yes"), ("no", "no")]) == {
        "total": 0.5, "accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0
    }  # fmt: skip
    assert ratios_of([("no", "no")] * 3) == {
        "total": 1, "accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0
    }  # fmt: skip
    assert ratios_of([("yes", "no"), ("no", "no")])["precision"] == 0


def test_other_means_are_left_as_they_are():
    assert with_ratios({"accuracy": 0.3, "format": 1.0}) == {"accuracy": 0.3, "format": 1.0}


@given(
    st.lists(
        st.tuples(st.sampled_from(["yes", "no", "Yes, it is.", "maybe"]), st.sampled_from(["yes", "no"])), min_size=1
    )
)
def test_ratios_are_those_of_the_confusion_matrix(pairs):
    """Counted out as POPE's script does, but for "maybe", which is no yes here."""
    said = [answer.lower().startswith("yes") for answer, _ in pairs]
    gold = [reference == "yes" for _, reference in pairs]
    tp = sum(s and g for s, g in zip(said, gold, strict=True))
    fp, fn = sum(said) - tp, sum(gold) - tp
    precision = tp / (tp + fp) if tp + fp else 0
    recall = tp / (tp + fn) if tp + fn else 0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    found = ratios_of(pairs)
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    assert found["yes_ratio"] == pytest.approx(sum(said) / len(said))
