"""Whatever a policy writes gets a grade, at once."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_lightning.rewards import grade, has_format, with_option_text
from cpt_lightning.rewards.formats import FORMAT_STYLES
from cpt_lightning.rewards.grading import KINDS

GOLDS = {
    "letter": ["B", "the red one"],
    "permutation": "2, 1",
    "permutation_hits": "2, 1",
    "number": "5 cm",
    "math": "m + n - 180",
    "yes_no": "yes",
    "short_answer": ["unanswerable", "5", "no"],
    "relaxed": "5",
}
SIGNS = "{}[]\\boxed()0123456789 /^$%=<answer>thinkABC.,:-+*!\n\u221a\u00b0\u2220\u0660\ud800"
PIECES = ["1", "1 1/2 ", "\\frac{1}{2}", "answer is=", "{", "(A) ", "yes ", "$", "\\text{", "\\boxed{", "\n", "x or 1 "]
PIECES += ["not ", "not A ", "no a-", "does not show ", "1\u00bd ", "\u00b2", "twenty-", "because "]
PIECES += ["<answer>", "</answer>", "<think>", "A. ", "1,000", "x = ", " ", "\\", "-", ". ", "cm "]


@settings(deadline=None, max_examples=150)
@given(st.text() | st.text(alphabet=SIGNS), st.sampled_from([kind for kind in KINDS if kind != "math"]))
def test_any_text_gets_a_grade(completion, kind):
    assert 0 <= grade(completion, GOLDS.get(kind, "red"), kind) <= 1
    with_option_text("A", completion)
    assert all(has_format(completion, style) in (True, False) for style in FORMAT_STYLES)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60) | st.text(alphabet=SIGNS, max_size=60))
def test_any_text_gets_a_grade_as_a_formula(completion):
    assert 0 <= grade(f"x = {completion}", GOLDS["math"], "math") <= 1


@settings(deadline=None, max_examples=100)
@given(
    st.text(min_size=1).filter(str.strip),
    st.sampled_from(["text", "number", "yes_no", "short_answer", "vqa", "relaxed"]),
)
def test_any_text_serves_as_a_reference(gold, kind):
    assert 0 <= grade("5", gold, kind) <= 1


@pytest.mark.parametrize("piece", PIECES)
def test_a_megabyte_of_garbage_is_graded_in_under_a_second(piece):
    """Processor time of this process; algebra has its own limit, see symbolic_server.py."""
    garbage = piece * (1_000_000 // len(piece))
    for kind in KINDS:
        start = time.process_time()
        grade(garbage, GOLDS.get(kind, "red"), kind)
        assert time.process_time() - start < 1, kind
    start = time.process_time()
    grade(f"<answer>{garbage}</answer>", "red", "text")
    has_format(garbage, "think_answer")
    has_format("<think>" + garbage, "think_boxed")
    with_option_text("A", garbage)
    assert time.process_time() - start < 1
