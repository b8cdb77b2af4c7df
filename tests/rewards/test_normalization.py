"""The forms in which short answers are compared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_lightning.rewards import normalize_text
from cpt_lightning.rewards.normalization import is_unanswerable, normalize_option


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


def test_contractions_are_equal_with_and_without_their_apostrophe():
    """The VQA evaluation has a list of them; here every apostrophe goes, of possessives as well."""
    for written, plain in (
        ("don't", "dont"),
        ("can\u2019t", "cant"),
        ("o'clock", "oclock"),
        ("monteith's", "monteiths"),
    ):
        assert normalize_text(written) == normalize_text(plain)


def test_a_spaced_ratio_is_the_same_ratio():
    assert normalize_text("5 : 4") == normalize_text("5:4") != normalize_text("5 4")


@pytest.mark.parametrize(
    "text, plain",
    [
        ("Juneau", "juneau"),
        ("  A  Sunflower. ", "sunflower"),
        ('"the  sun"', "the sun"),
        ("y - 36 = 13", "y - 36 = 13"),
        ("a", "a"),
        ("3.0 atm .", "3.0 atm"),
        ("...", "..."),
    ],
)
def test_option_texts_keep_every_sign_inside(text, plain):
    assert normalize_option(text) == plain


@pytest.mark.parametrize(
    "text",
    [
        *(
            "unanswerable",
            "Unanswerable.",
            "Not answerable",
            "It cannot be determined.",
            "I can't tell",
            "unsuitable image",
        ),
        *(
            "Insufficient information",
            "not enough info",
            "I don\u2019t know.",
            "The question is unanswerable",
            "unknown",
        ),
    ],
)
def test_there_are_many_ways_to_say_that_a_question_has_no_answer(text):
    assert is_unanswerable(text)


@pytest.mark.parametrize("text", ["", "no", "really blurry", "pink cup unanswerable", "an unknown man", "no bus stop"])
def test_an_answer_that_only_sounds_like_it_is_one(text):
    assert not is_unanswerable(text)
