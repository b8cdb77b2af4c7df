"""Formulas: by their characters, by their value, by algebra."""

import pytest

from cpt_lightning.rewards import grade
from cpt_lightning.rewards.formulas import is_formula


@pytest.mark.parametrize(
    "gold, completions",
    [
        (r"5 \sqrt { 3 }", [r"5\sqrt{3}", r"5\sqrt3", "5\u221a3", "5 sqrt(3)", r"$5\sqrt{3}$", "8.6603", r"\sqrt{75}"]),
        (r"5 \sqrt { 3 }", [r"x = 5\sqrt{3}", r"5\sqrt{3}\text{ cm}", r"AB is 5\sqrt{3}.", r"5\sqrt{3} \approx 8.66"]),
        ("x^{2}+1", ["x^2 + 1", "1 + x^2", "y = x^2 + 1", "x\u00b2+1", "1 + x\u00b2"]),
        (r"\frac{x}{2}", ["\u00bdx", "x \\cdot \u00bd"]),
        ("m + n - 180", ["n + m - 180", "-180+m+n", r"\boxed{m+n-180}", "The answer is $m + n - 180$."]),
        ("a + b = 90", ["a+b=90", "b = 90 - a"]),
        ("90", [r"90^\circ", "90\u00b0", "90 degrees", r"m\angle 2 = 90"]),
        ("1.5707963", [r"\frac{\pi}{2}"]),
        ("1024", ["2^10"]),
        (r"4 \frac { 4 } { 11 }", ["48/11", r"4\frac{4}{11}"]),
        ("2:3", ["4:6", "2 to 3", "2/3"]),
        (r"\angle 8 \cong \angle 2", [r"\angle 8\cong\angle 2", "\u22208 \u2245 \u22202"]),
        (r"\sin 2x", [r"2\sin x\cos x"]),
        ("3, 5", ["5, 3", "x = 3 or x = 5"]),
        ("rhombus", ["Rhombus", "The answer is a rhombus."]),
        ("not enough information", ["Not enough information."]),
        ("A D and B E", ["AD and BE"]),
        ("no", ["No.", "no"]),
        ("xy", ["yx", r"x \cdot y"]),
    ],
)
def test_a_formula_is_right_in_every_spelling(gold, completions):
    assert [said for said in completions if grade(said, gold, "math") != 1] == []


@pytest.mark.parametrize(
    "gold, completions",
    [
        (r"5 \sqrt { 3 }", [r"3\sqrt{5}", "8.7", r"5\sqrt{2}", "5", r"\sqrt{3}", "53", "", "I do not know"]),
        ("x^{2}+1", ["x^2-1", "x2 + 1", "x^2 1"]),
        ("m + n - 180", ["m - n - 180", "180 - m - n", "m + n", "106", "mn"]),
        ("a + b = 90", ["90", "a - b = 90", "a + b"]),
        ("90", ["9", "91", "a + b = 90 + c", "rhombus"]),
        ("5", ["x = 3 or x = 5", "3, 5", "(3, 5)", "5x", "5!"]),
        ("5 cm", ["5 m"]),
        ("abc", ["cab"]),  # words, not products
        ("rhombus", ["square"]),
    ],
)
def test_another_formula_is_wrong(gold, completions):
    assert [said for said in completions if grade(said, gold, "math") != 0] == []


def test_any_of_several_references_will_do():
    assert [grade(said, ["x + y", "7"], "math") for said in ("y + x", "7.0", "x - y")] == [1, 1, 0]


@pytest.mark.parametrize("text", ["5", "-x", r"\frac{1}{2}", "sin(x)", r"\log_2 8", "AB", "(2, 3)", "12 km/h", "x < 3"])
def test_formulas_are_told_from_words(text):
    assert is_formula(text)
    assert not is_formula(f"{text} apples")
