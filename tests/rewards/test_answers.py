"""Finding the answer in what a model writes, and the form in which answers are compared."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_lightning.rewards import extract_answer, normalize_text
from cpt_lightning.rewards.answers import after_lead_in, last_boxed, without_markup


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("red", "red"),
        ("  red\n", "red"),
        ("<think>blue?</think><answer>red</answer>", "red"),
        ("<think>blue?</think>\nred", "red"),
        ("<think>a</think>red<think>b</think>green", "green"),
        (r"first \boxed{1}, then \boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
        (r"\boxed {2}", "2"),
        (r"<think>\boxed{3}</think><answer>4</answer>", "4"),  # what follows the thought goes first
        (r"<think>so \boxed{3}</think>", "3"),
        (r"<answer>the box \boxed{5}</answer>", "5"),
        (r"\boxed{\boxed{6}}", "6"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and \boxed{8", "7"),  # the second one was cut off
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<ANSWER>Red</ANSWER>", "Red"),
        ("<think>a</think><answer>red", "red"),
        ("red</answer>", "red"),  # after a forced prefix the completion starts inside the tag
        ("<think>so it is red", ""),  # cut off while thinking: no answer
        ("<think>red</think>", ""),
        ("", ""),
    ],
)
def test_the_answer_is_found_in_every_style(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    "text, plain",
    [
        ("The Red Circle.", "red circle"),
        ("a", "a"),  # nothing but an article: an option letter
        ("?", "?"),
        ("isn't", "isnt"),
        ("isn\u2019t", "isnt"),
        ("two cats", "2 cats"),
        ("None", "0"),
        ("1,234,567", "1234567"),
        ("1,2", "1 2"),
        ("10:35", "10:35"),
        ("time: 10", "time 10"),
        ("3/4", "3/4"),
        ("and/or", "and or"),
        ("t-shirt", "t shirt"),
        ("-5", "-5"),
        ("U.S.A.", "usa"),
        ("5.50", "5.50"),
        ("  two \n lines ", "2 lines"),
    ],
)
def test_short_answers_get_their_normal_form(text, plain):
    assert normalize_text(text) == plain


@given(st.text())
def test_the_normal_form_is_lower_case_single_spaced_and_only_empty_for_blank_text(text):
    plain = normalize_text(text)
    assert plain == " ".join(plain.split())
    assert bool(plain) == bool(text.strip())


@given(st.text(alphabet=st.characters(exclude_characters="{}\\")), st.text())
def test_a_box_gives_back_what_was_put_into_it(content, before):
    assert last_boxed(before.replace("\\", "").replace("{", "").replace("}", "") + f"\\boxed{{{content}}}") == content


@pytest.mark.parametrize(
    "answer, stated",
    [
        ("The answer is B.", "B."),
        ("Answer: B", "B"),
        ("**Answer:** B", "** B"),
        ("the answer is A. No, the answer is: C", "C"),
        ("It is B.", None),
    ],
)
def test_a_lead_in_states_what_follows_it(answer, stated):
    assert after_lead_in(answer) == stated


def test_markup_goes_and_a_price_stays():
    assert without_markup(r"**$\text{red}$**") == "red"
    assert without_markup("$5") == "$5"
    assert without_markup("$5$") == "5"


@pytest.mark.parametrize("piece", ["\\boxed{", "{", "<answer>", "</answer>", "<think>", "answer is ", "\\", " ", "9"])
def test_a_megabyte_of_garbage_is_read_in_under_a_second(piece):
    garbage = piece * (1_000_000 // len(piece))
    start = time.process_time()
    extract_answer(garbage)
    assert time.process_time() - start < 1
