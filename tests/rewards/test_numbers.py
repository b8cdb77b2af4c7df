"""Numbers, percent, ratios and units as people and models write them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_lightning.rewards import grade
from cpt_lightning.rewards.arithmetic import value_of
from cpt_lightning.rewards.numbers import Number, find_number, parse_number


@pytest.mark.parametrize(
    "gold, completions",
    [
        ("1250", ["1250", "1,250", "1250.0", "1.25e3", "$1,250", "1250 m", "x = 1250", "about 1250", "1250 dollars."]),
        ("0.75", ["3/4", r"\frac{3}{4}", r"\dfrac34", "3:4", "3 out of 4", "3 to 4", "75%", ".75", "0.75 cm^2"]),
        ("3", ["three", "There are 3 vehicles.", "3 red cars", "There are three", "3.0", "1 + 2 = 3", "The sum is 3."]),
        ("1.5", ["1 1/2", r"1 \frac{1}{2}", "3/2", "150 percent"]),
        ("\u22122", ["-2", "- 2", "\u22122"]),
        ("50%", ["50", "0.5", "50 percent", "50 per cent", r"50\%"]),
        ("100/3", ["33.3333", r"33\frac{1}{3}"]),
        ("0.5", ["\u00bd", r"\frac12", "The answer is \u00bd."]),
        ("2.5 cm", ["2\u00bd", "2 \u00bd cm", "5/2"]),
        ("9", ["3\u00b2", "3^2"]),
        ("0.001", ["10\u207b\u00b3"]),
        ("21", ["twenty-one", "Twenty one", "There are twenty-one cars.", "21 cars"]),
        ("30", ["thirty", "There are thirty."]),
        (
            "12 cm^2",
            ["12", "12 cm\u00b2", "12 square centimeters", "12 sq cm", r"12\,\mathrm{cm}^2", r"12 \text{ cm}^2"],
        ),
        ("90", ["90\u00b0", r"90^\circ", r"90\degree", r"180 \div 2", "90 degrees"]),
        ("red", ["Red", "The answer is red."]),  # the reference is no number: compared as text
    ],
)
def test_numbers_are_right_in_every_spelling(gold, completions):
    assert [said for said in completions if grade(said, gold, "number") != 1] == []


@pytest.mark.parametrize(
    "gold, completions",
    [
        ("3", ["4", "3 or 4", "x = 3 or x = 4", "-3", "33", "1/3", "three hundred", "a dozen", "", "red", "1 2 3 4"]),
        ("3", ["The answer is 3, not 4.", "3 cats or 4 dogs", "three-wheeled", "twenty-three"]),
        ("3", ["twenty three cars", "thirty-three", "3\u00b2", "\u0663", "\uff13", "twenty-", "three-"]),
        ("5", ["5\u2212", "5-", "at \u22125 or so", "5.5-", "five-hundred"]),
        ("32", ["3\u00b2"]),
        ("100/3", ["33.3", "34"]),
        ("10000", ["10001"]),
        ("12 cm^2", ["12 cm", "12 m^2", "12 cubic cm", "11 cm^2"]),
        ("30 grams", ["30 kg", "3 grams"]),
        ("red", ["7"]),
    ],
)
def test_other_numbers_and_other_units_are_wrong(gold, completions):
    assert [said for said in completions if grade(said, gold, "number") != 0] == []


@pytest.mark.parametrize(
    "said, gold, right",
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("0.52", "50%", 1),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Red.", "red", 1),
        ("blue", "red", 0),
    ],
)
def test_relaxed_accuracy_lets_numbers_be_five_percent_off(said, gold, right):
    assert grade(said, gold, "relaxed") == right


@pytest.mark.parametrize(
    "gold", ["1", "-3", "2.5", "1,000", "3/4", "3:4", "50%", r"\frac{12}{5}", r"2 \pi", r"\sqrt[3]{8}", "7 km/h"]
)
def test_numbers_mean_themselves_in_every_wrapping(gold):
    for said in (gold, f"${gold}$", f"\\boxed{{{gold}}}", f"The answer is {gold}.", f"<answer> {gold} </answer>"):
        assert grade(said, gold, "number") == grade(said, gold, "math") == grade(said, gold, "relaxed") == 1, said


@given(st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-3), st.integers(0, 8))
def test_a_number_equals_its_own_writing_and_not_its_double(value, digits):
    written = f"{value:.{max(digits, 6)}f}"
    assert parse_number(written).value == pytest.approx(value, rel=1e-3)
    assert grade(written, str(value), "number") in (0.0, 1.0)
    assert grade(str(2 * value), str(value), "number") == 0


@pytest.mark.parametrize(
    "expression, value",
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("-2^2", -4),
        ("2^-1", 0.5),
        ("2^{3}", 8),
        ("6/3/2", 1),
        (r"\frac{\sqrt{16}}{2}", 2),
        (r"\sqrt[3]{27}", 3),
        (r"3 * 10^2", 300),
        ("2(3)", 6),
        (r"2\pi", 2 * math.pi),
    ],
)
def test_expressions_have_their_value(expression, value):
    assert value_of(expression) == pytest.approx(value)
    assert parse_number(expression).value == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x",
            "1 2",
            "(1",
            "1)",
            "1/0",
            "0^-1",
            "(-1)^0.5",
            "9^9^9^9",
            "1+",
            "()",
            "(" * 60 + "1",
            "__import__('os')",
        ),
        *("m", "cm", "1e999"),
    ],
)
def test_what_is_no_number_has_no_value(text):
    assert parse_number(text) is None


def test_a_unit_is_read_off_and_never_converted():
    assert parse_number("12 inches") == parse_number("12 in") == Number(12, unit="in")
    assert parse_number("3 cubic metres") == parse_number("3 m^{3}") == Number(3, unit="m3")
    assert not parse_number("100 cm").equals(parse_number("1 m"))


def test_the_number_of_a_sentence_is_the_stated_or_the_only_one():
    assert find_number("2 + 3 = 5").value == 5
    assert find_number("There are 1,200 of them").value == 1200
    assert find_number("area of 12 cm^2").value == 12
    assert find_number("5 or 6") is None
