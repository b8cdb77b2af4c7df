"""Multiple choice: letters, options' texts, and what only looks like a letter."""

import pytest

from cpt_lightning.rewards import grade, with_option_text

QUESTION = "Which is warmer?\nA. Solution B\nB. Solution A\nC. neither\nAnswer with the option's letter."


@pytest.mark.parametrize(
    "completion",
    [
        *("B", "b", "(B)", "[b]", "B.", "B:", " B ", "**B**", r"$\text{B}$", "B. Juneau", "(B) Juneau", "B) A dog"),
        *(
            "Option B",
            "option b.",
            "choice (B)",
            "The answer is (B).",
            "Answer: B",
            "So it must be B.",
            "I say B",
            "So, B",
        ),
        *("It's B", "B because it is red", "My choice: B", "B\n\nExplanation: A is too cold.", "I pick (B), not C."),
        *("I think B", "My guess: B since C is too cold", "B because C is wrong", "I think B because A and C are not"),
        *(
            "It is not C; it is B",
            "It can't be (C), so (B)",
            "Option B because option C is wrong",
            "A is wrong. It's B",
        ),
        *(r"<think>A or C?</think>\boxed{B}", "Option A is wrong, so the answer is B, a fish."),
    ],
)
def test_a_letter_counts_however_it_is_written(completion):
    assert grade(completion, "B", "letter") == grade(completion, "(B).", "letter") == 1
    assert grade(completion, "C", "letter") == 0


@pytest.mark.parametrize(
    "completion",
    [
        *("A or B", "B, C", "both A and B", "Bird", "be", "", "AB", "sample B", "vitamin B", "B cells", "12 B"),
        *("It is not A", "(A) is wrong", "I think A or B", "I think solution A", "C is too cold because A is not"),
    ],
)
def test_two_letters_or_a_letter_that_belongs_to_other_words_are_no_choice(completion):
    assert [grade(completion, letter, "letter") for letter in "ABC"] == [0, 0, 0]


def test_an_article_and_a_pronoun_are_no_letters():
    assert grade("A dog", "A", "letter") == grade("I see a dog", "I", "letter") == 0
    assert grade("I", "I", "letter") == 1


@pytest.mark.parametrize("gold", [["B", "Juneau"], "B. Juneau", "(B) Juneau"])
def test_the_options_text_counts_where_the_reference_has_it(gold):
    for completion in ("Juneau", "juneau.", r"\boxed{Juneau}", "The answer is Juneau.", "B", "B. Juneau"):
        assert grade(completion, gold, "letter") == 1, completion
    for completion in ("C", "C. Juneau", "Juneau or Nome", "Nome"):
        assert grade(completion, gold, "letter") == 0, completion
    assert grade("Juneau", "B", "letter") == 0


def test_signs_inside_an_options_text_count():
    gold = ["H", "y - 36 = 13"]
    assert (grade("y - 36 = 13.", gold, "letter"), grade("y + 36 = 13", gold, "letter")) == (1, 0)


def test_a_text_that_names_another_options_letter_is_that_text():
    """ScienceQA asks about "Solution A" and "Solution B", and they are not always options A and B."""
    gold = with_option_text("A", QUESTION)
    assert gold == ["A", "Solution B"]
    assert [grade(said, gold, "letter") for said in ("Solution B", "Solution A", "A", "B")] == [1, 0, 1, 0]


def test_a_letter_is_a_choice_even_where_an_option_reads_like_one():
    assert [grade(said, "B. A", "letter") for said in ("B", "A", "B. A", "A. B")] == [1, 0, 1, 0]
    assert with_option_text("B", "Which grade?\nA. B\nB. A") == "B"


def test_several_letters_may_be_right():
    assert [grade(said, ["A", "C"], "letter") for said in "ABC"] == [1, 0, 1]


@pytest.mark.parametrize(
    "question, gold",
    [
        ("Which?\n(A) red\n(B) blue", ["B", "blue"]),
        ("Which?\nA) red\nB) blue\n", ["B", "blue"]),
        ("A. context\nWhich?\nA. red\nB. blue", ["B", "blue"]),
        ("Which?\nA. red\nC. blue\nB. green", ["B", "green"]),
        ("Which?\nB. blue", "B"),
        ("Which letter is it?", "B"),
    ],
)
def test_options_are_read_from_the_lines_of_a_question(question, gold):
    assert with_option_text("B", question) == gold


def test_a_reference_without_a_letter_is_refused():
    with pytest.raises(ValueError, match="no option letter"):
        grade("red", "red", "letter")
