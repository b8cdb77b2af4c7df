"""Finding the answer in what a model writes."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_lightning.rewards import extract_answer
from cpt_lightning.rewards.answers import after_lead_in, last_boxed, readings, without_markup


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


def test_an_answer_is_read_as_a_whole_and_after_its_lead_in():
    assert list(readings("red")) == ["red"]
    assert list(readings("So the answer is red.\nIt is round.")) == [
        "So the answer is red.\nIt is round.",
        "red.\nIt is round.",
        "red.",
    ]
