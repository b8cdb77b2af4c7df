"""Grading answers as models write them, kind by kind."""

import pytest

from cpt_lightning.rewards import grade
from cpt_lightning.rewards.grading import KINDS

GOLDS = {"letter": "B", "permutation": "2, 1", "permutation_hits": "2, 1", "number": "5", "math": "5", "yes_no": "yes"}


@pytest.mark.parametrize(
    "completion, gold, kind, right",
    [
        # yes_no
        *[
            (said, "yes", "yes_no", 1)
            for said in (
                "yes",
                "Yes.",
                "YES, there is a dog",
                "True",
                "The answer is yes",
                "It is true",
                "Yeah",
                "Yep, it is",
                "It is not false.",
                "So, yes, it is",
            )
        ],
        *[
            (said, "yes", "yes_no", 0)
            for said in (
                "no",
                "yes or no",
                "maybe",
                "",
                "nowhere",
                "yesterday",
                "False",
                "It is not true",
                "The answer is not yes",
                "It can\u2019t be true",
                "I would not say yes.",
                "Nope",
            )
        ],
        *[
            (said, "no", "yes_no", 1)
            for said in (
                "No, there is not.",
                "No there is not",
                "There is no dog.",
                "there are no dogs",
                "The answer is no.",
                "There is not a dog in the image.",
                "There aren't any dogs.",
                "There isn\u2019t.",
                "Not true",
                "Nope",
                "No dogs are visible.",
                "No red car can be seen.",
                "The image does not contain a dog.",
                "I don't see any dogs.",
            )
        ],
        *[
            (said, "no", "yes_no", 0)
            for said in (
                "yes",
                "no tissue recognizable",
                "not",
                "none",
                "know",
                "There is not enough light to tell",
                "The image does not show enough to tell",
                "It does not show whether there is a dog",
                "No idea what it is",
                "No doubt it is",
                "It does not have wheels, so yes",
                "This is not a yes or no question",
            )
        ],
        ("No.", "No, it is not", "yes_no", 1),
        ("no", "view with no tissue recognizable", "yes_no", 0),  # a phrase, not a polarity
        ("Thymus.", "thymus", "yes_no", 1),
        # short_answer: by what the reference is
        *[(said, "Yes", "short_answer", 1) for said in ("yes", "Yes, the bus", "True")],
        *[(said, "Yes, the bus", "short_answer", right) for said, right in (("yes, the bus.", 1), ("Yes", 0))],
        ("Yes, the car", "Yes, the bus", "short_answer", 0),
        *[(said, "3", "short_answer", 1) for said in ("3", "Three", "There are 3 of them.", "three red cars")],
        *[(said, "3", "short_answer", 0) for said in ("13", "3 or 4", "no")],
        *[
            (said, "unanswerable", "short_answer", 1)
            for said in (
                "Unanswerable.",
                "It cannot be determined",
                "unknown",
                "It is not possible to determine.",
                "The question cannot be answered based on the image.",
                "I\u2019m unable to read this from the picture.",
                "There is not enough information to answer.",
            )
        ],
        *[
            (said, "unanswerable", "short_answer", 0)
            for said in ("no", "red", "an unknown man", "not possible", "a picture", "It can be read")
        ],
        ("unanswerable", "red", "short_answer", 0),
        *[(said, "4:23", "short_answer", right) for said, right in (("4:23", 1), ("8:46", 0), ("0.174", 0))],
        *[(said, "3:4", "short_answer", right) for said, right in (("3:4", 1), ("6:8", 1), ("3/4", 1), ("4:3", 0))],
        *[(said, "2:1", "short_answer", right) for said, right in (("2/1", 1), ("2", 1), ("1:2", 0), ("1", 0))],
        *[(said, "4:05", "short_answer", right) for said, right in (("4:05", 1), ("8:10", 0), ("0.8", 0))],
        *[(said, "A purple car", "short_answer", right) for said, right in (("purple car.", 1), ("car", 0))],
        ("5", ["unanswerable", "5"], "short_answer", 1),
        # letter_or_short_answer: by what the first reference is
        *[
            (said, "B", "letter_or_short_answer", 1)
            for said in ("B", "(b)", "Option B", "The answer is (B).", "B. red")
        ],
        *[(said, "B", "letter_or_short_answer", 0) for said in ("C", "B or C", "red", "banana", "2", "")],
        ("Juneau", ["B", "Juneau"], "letter_or_short_answer", 1),
        ("(B)", "(B)", "letter_or_short_answer", 1),
        *[(said, "12 cm", "letter_or_short_answer", 1) for said in ("12", "12.0 cm", "It is 12 centimeters.")],
        *[(said, ["6.5", "$6.50"], "letter_or_short_answer", r) for said, r in (("$6.5", 1), ("6.4", 0), ("B", 0))],
        *[(said, "E. coli", "letter_or_short_answer", r) for said, r in (("e. coli", 1), ("E", 0), ("coli", 0))],
        *[(said, "x", "letter_or_short_answer", right) for said, right in (("x", 1), ("Option X", 0))],
        # an open question about a point C is graded as a choice
        *[(said, "C", "letter_or_short_answer", right) for said, right in (("c", 1), ("Option C", 1), ("point D", 0))],
        # text, exact, permutation
        ("A Red circle.", "red circle", "text", 1),
        ("The answer is red.", "red", "text", 1),
        ("green", ["red", "Green"], "text", 1),
        ("red circle", "red", "text", 0),
        ("1", "01", "text", 0),
        ("", "red", "text", 0),
        ("<answer>Red</answer>", "Red", "exact", 1),
        ("red", "Red", "exact", 0),
        *[
            (said, "3, 1, 2", "permutation", 1)
            for said in ("3, 1, 2", "[3,1,2]", "312", "3 1 2", "The order is: 3 1 2.")
        ],
        *[(said, "3, 1, 2", "permutation", 0) for said in ("3, 2, 1", "3, 1", "3, 1, 2, 4", "", "9" * 5000, "none")],
        ("3, 2, 1", "3, 1, 2", "permutation_hits", 1 / 3),
        ("3, 1", "3, 1, 2", "permutation_hits", 0),
        ("1, 1, 1", "3, 1, 2", "permutation_hits", 1 / 3),
        ("\u0663, \u0661, \u0662", "3, 1, 2", "permutation", 0),
        ("3, 1, 2", "3, 1, 2", "permutation_hits", 1),
    ],
)
def test_answers_are_graded_as_a_person_would(completion, gold, kind, right):
    assert grade(completion, gold, kind) == pytest.approx(right)


@pytest.mark.parametrize("matches, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_answers_averages_over_leaving_one_out(matches, accuracy):
    """With m of 10 matching: m subsets keep m - 1 of them, 10 - m keep m; m = 3: (3 * 2/3 + 7 * 1) / 10 = 0.9."""
    golds = ["The cat"] * matches + ["dog"] * (10 - matches)
    assert grade("cat.", golds, "vqa") == pytest.approx(accuracy)


def test_vqa_accuracy_of_a_few_answers_needs_no_three_matches():
    """One answer must be matched; of two, one other person is enough: (0/1 + 1/1) / 2."""
    assert grade("cat", "cat", "vqa") == grade("cat", ["cat"], "vqa") == 1
    assert grade("cat", ["cat", "dog"], "vqa") == pytest.approx(0.5)
    assert grade("cat", ["cat", "cat"], "vqa") == 1


def test_vqa_accuracy_takes_every_way_to_say_unanswerable_for_the_same():
    """3 of the 10 say so, each in another way: 0.9, as for 3 equal answers."""
    golds = ["unanswerable", "Unsuitable image", "I can't tell"] + ["dog"] * 7
    assert grade("Cannot be determined", golds, "vqa") == pytest.approx(0.9)
    assert grade("It is unknown.", ["unanswerable"] * 10, "vqa") == 1
    assert grade("an unknown man", ["unanswerable"] * 10, "vqa") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_answer_is_right_in_every_style(kind):
    gold = GOLDS.get(kind, "red")
    styles = ["{}", " {}\n", "<think>7 C no</think><answer>{}</answer>", "<think>7 C no</think>\\boxed{{{}}}"]
    for style in styles:
        assert grade(style.format(gold), gold, kind) == 1, style


@pytest.mark.parametrize(
    "gold, kind, message",
    [
        ("red", "letter", "no option letter"),
        ("red", "permutation", "no indices"),
        ("", "text", "empty"),
        ([], "vqa", "empty"),
        (["red", " "], "text", "empty"),
        ("red", "colour", "there are exact, text"),
    ],
)
def test_a_reference_that_does_not_suit_its_kind_is_refused(gold, kind, message):
    with pytest.raises(ValueError, match=message):
        grade("red", gold, kind)
