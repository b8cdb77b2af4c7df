"""Grading on answers as models write them, formats, and the parts of a reward."""

import json
import math
import pickle
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_lightning.rewards import Reward, RewardPart, grade, has_format, permutation_hits, score
from cpt_lightning.rewards.grading import KINDS
from cpt_lightning.rewards.numbers import find_number, parse_number
from cpt_lightning.types import Example

GOLDS = {"letter": "B", "permutation": "2, 1", "permutation_hits": "2, 1", "number": "5", "math": "5", "yes_no": "yes"}
REAL_TEXT = Path(__file__).parents[3] / "shared" / "data" / "real_text"


@pytest.mark.parametrize(
    "completion, gold, kind, right",
    [
        # letter
        *[(said, "B", "letter", 1) for said in ("B", "b", "(B)", "[b]", "B.", "B:", " B ", "**B**", r"$\text{B}$")],
        *[(said, "B", "letter", 1) for said in ("B. Juneau", "(B) Juneau", "B) A dog", "Option B", "choice (B)")],
        *[(said, "B", "letter", 1) for said in ("The answer is (B).", "Answer: B", "So it must be B.", "I say B")],
        ("Option A is wrong, so the answer is B, a fish.", "B", "letter", 1),
        (r"<think>A or C?</think>\boxed{B}", "B", "letter", 1),
        ("B", "(B).", "letter", 1),
        ("Juneau", ["B", "Juneau"], "letter", 1),
        ("C", ["B", "Juneau"], "letter", 0),
        *[(said, "B", "letter", 0) for said in ("A", "A or B", "B, C", "Bird", "be", "", "C. Not B", "AB")],
        *[("A dog", letter, "letter", 0) for letter in "AD"],
        ("I", "I", "letter", 1),
        # number
        *[
            (said, "1250", "number", 1)
            for said in ("1250", "1,250", "1250.0", "1.25e3", "$1,250", "1250 m", "x = 1250")
        ],
        *[
            (said, "0.75", "number", 1)
            for said in ("3/4", r"\frac{3}{4}", r"\dfrac34", "3:4", "75%", ".75", "0.75 cm^2")
        ],
        *[
            (said, "3", "number", 1)
            for said in ("three", "There are 3 vehicles.", "3 red cars", "There are three", "3.0")
        ],
        ("1 + 2 = 3", "3", "number", 1),
        ("The answer is 3, not 4.", "3", "number", 0),  # two numbers, none of them stated alone
        ("The total is 3.", "3", "number", 1),
        ("1 1/2", "1.5", "number", 1),
        (r"1 \frac{1}{2}", "1.5", "number", 1),
        ("-2", "\u22122", "number", 1),
        ("50", "50%", "number", 1),
        ("0.5", "50%", "number", 1),
        ("50 percent", "50%", "number", 1),
        ("33.3333", "100/3", "number", 1),
        ("33.3", "100/3", "number", 0),
        *[
            (said, "3", "number", 0)
            for said in ("4", "3 or 4", "-3", "33", "1/3", "three hundred", "", "red", "1 2 3 4")
        ],
        ("10001", "10000", "number", 0),
        ("red", "Red", "number", 1),  # the reference is no number: compared as text
        ("7", "red", "number", 0),
        # math
        *[
            (said, r"5 \sqrt { 3 }", "math", 1)
            for said in (r"5\sqrt{3}", r"5\sqrt3", "5√3", "5 sqrt(3)", r"$5\sqrt{3}$")
        ],
        *[
            (said, r"5 \sqrt { 3 }", "math", 1)
            for said in ("8.6603", r"x = 5\sqrt{3}", r"\sqrt{75}", r"5\sqrt{3}\text{ cm}")
        ],
        *[(said, r"5 \sqrt { 3 }", "math", 0) for said in (r"3\sqrt{5}", "8.7", r"5\sqrt{2}", "5", r"\sqrt{3}", "53")],
        *[
            (said, "x^{2}+1", "math", right)
            for said, right in (("x^2 + 1", 1), ("x^2-1", 0), ("x2 + 1", 0), ("x^2 1", 0))
        ],
        *[(said, "90", "math", right) for said, right in ((r"90^\circ", 1), ("90°", 1), ("90 degrees", 1), ("9", 0))],
        (r"\frac{\pi}{2}", "1.5707963", "math", 1),
        ("2^10", "1024", "math", 1),
        ("rhombus", "Rhombus", "math", 1),
        # yes_no
        *[
            (said, "yes", "yes_no", 1)
            for said in ("yes", "Yes.", "YES, there is a dog", "True", "The answer is yes", "It is true")
        ],
        *[(said, "yes", "yes_no", 0) for said in ("no", "yes or no", "maybe", "", "nowhere", "yesterday", "False")],
        ("No, there is not.", "No", "yes_no", 1),
        ("There is no dog.", "no", "yes_no", 1),
        ("Thymus.", "thymus", "yes_no", 1),
        # text, exact, permutation
        ("A Red circle.", "red circle", "text", 1),
        ("The answer is red.", "red", "text", 1),
        ("green", ["red", "Green"], "text", 1),
        ("red circle", "red", "text", 0),
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


@pytest.mark.parametrize(
    "gold", ["1", "-3", "2.5", "1,000", "3/4", "3:4", "50%", r"\frac{12}{5}", r"2 \pi", r"\sqrt[3]{8}"]
)
def test_numbers_mean_themselves_in_every_wrapping(gold):
    for said in (gold, f"${gold}$", f"\\boxed{{{gold}}}", f"The answer is {gold}.", f"<answer> {gold} </answer>"):
        assert grade(said, gold, "number") == grade(said, gold, "math") == 1, said


@given(st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-3), st.integers(0, 8))
def test_a_number_equals_its_own_writing_and_not_its_double(value, digits):
    written = f"{value:.{max(digits, 6)}f}"
    assert parse_number(written).value == pytest.approx(value, rel=1e-3)
    assert grade(written, str(value), "number") in (0.0, 1.0)
    assert grade(str(2 * value), str(value), "number") == 0


@pytest.mark.parametrize(
    "formula, value",
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("-2^2", -4),
        ("2^-1", 0.5),
        ("2^{3}", 8),
        ("6/3/2", 1),
        (r"\frac{\sqrt{16}}{2}", 2),
        (r"\sqrt[3]{27}", 3),
        (r"3 \times 10^2", 300),
        ("2(3)", 6),
        (r"2\pi", 2 * math.pi),
        ("1 1/2", 1.5),
        ("seven", 7),
    ],
)
def test_formulas_have_their_value(formula, value):
    assert parse_number(formula).value == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    ["", "x", "1 2", "(1", "1)", "1/0", "0^-1", "(-1)^0.5", "9^9^9^9", "1+", "()", "(" * 60 + "1", "__import__('os')"],
)
def test_what_is_no_number_has_no_value(text):
    assert parse_number(text) is None


def test_the_number_of_a_sentence_is_the_stated_or_the_only_one():
    assert find_number("2 + 3 = 5").value == 5
    assert find_number("There are 1,200 of them").value == 1200
    assert find_number("area of 12 cm^2").value == 12
    assert find_number("5 or 6") is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_answer_is_right_in_every_style(kind):
    gold = GOLDS.get(kind, "red")
    styles = ["{}", " {}\n", "<think>7 C no</think><answer>{}</answer>", "<think>7 C no</think>\\boxed{{{}}}"]
    for style in styles:
        assert grade(style.format(gold), gold, kind) == 1, style


@settings(deadline=None, max_examples=150)
@given(st.text() | st.text(alphabet="{}\\boxed()0123456789 /^$%=<answer>ABC.,:-\n"), st.sampled_from(KINDS))
def test_any_text_gets_a_grade(completion, kind):
    assert 0 <= grade(completion, GOLDS.get(kind, "red"), kind) <= 1


@pytest.mark.parametrize("piece", ["1", "1 1/2 ", "\\frac{1}{2}", "answer is=", "{", "(A) ", "yes ", "$", "\\text{"])
def test_a_megabyte_of_garbage_is_graded_in_under_a_second(piece):
    garbage = piece * (1_000_000 // len(piece))
    for kind in KINDS:
        start = time.process_time()
        grade(garbage, GOLDS.get(kind, "red"), kind)
        has_format(garbage, "think_answer")
        has_format("<think>" + garbage, "think_boxed")
        assert time.process_time() - start < 1, kind


@pytest.mark.skipif(not REAL_TEXT.is_dir(), reason="the samples of real text are not here")
@pytest.mark.parametrize(
    "name, kind",
    [("scienceqa", "letter"), ("geometry3k", "math"), ("super_clevr", "number")]
    + [(name, "text") for name in ("textvqa", "vizwiz", "gqa", "pathvqa", "super_clevr")],
)
def test_real_reference_answers_are_right_in_every_style_and_wrong_for_one_another(name, kind):
    golds = [row["messages"][-1]["content"] for row in json.loads((REAL_TEXT / f"{name}.json").read_text())]
    styles = [
        "{}",
        "<think>7 or red</think>\n\\boxed{{{}}}",
        "<think>?</think><answer>{}</answer>",
        "The answer is {}.",
    ]
    wrong = [(style, gold) for gold in golds for style in styles if grade(style.format(gold), gold, kind) != 1]
    shuffled = random.Random(0).sample(golds, len(golds))
    pairs = [(a, b) for a, b in zip(golds, shuffled, strict=True) if a.lower() != b.lower() and {a, b} != {"1", "one"}]
    mistaken = [(a, b) for a, b in pairs if grade(a, b, kind)]
    assert (wrong, mistaken) == ([], [])


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


@pytest.mark.parametrize(
    "completion, style, kept",
    [
        ("<think>a</think><answer>b</answer>", "think_answer", True),
        (" <think>a\n</think>\n<answer>b</answer>\n", "think_answer", True),
        ("<think>a</think>so <answer>b</answer>", "think_answer", False),
        ("<think>a</think><answer>b</answer>.", "think_answer", False),
        ("<think>a</think><answer> </answer>", "think_answer", False),
        ("<answer>b</answer><think>a</think>", "think_answer", False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", "think_answer", False),
        ("<think>a<think>a</think><answer>b</answer>", "think_answer", False),
        ("<think>a</think>", "think_answer", False),
        ("b", "think_answer", False),
        (r"<think>a</think> So \boxed{b}.", "think_boxed", True),
        (r"<think>\boxed{b}</think> So b", "think_boxed", False),
        (r"<think>a</think>\boxed{b", "think_boxed", False),
        (r"<think>a</think>\boxed{ }", "think_boxed", False),
        (r"Well: <think>a</think>\boxed{b}", "think_boxed", False),
        (r"\boxed{b}", "think_boxed", False),
        ("", "think_boxed", False),
        ("b", "none", True),
    ],
)
def test_a_format_is_kept_to_the_letter(completion, style, kept):
    assert has_format(completion, style) is kept


def test_the_total_is_the_weighted_sum_of_its_parts():
    """0.9 * accuracy + 0.1 * format, as paper A has it."""
    reward = Reward(kind="text", format="think_answer")
    good, bare = "<think>a</think><answer>red</answer>", "red"
    assert reward(good, "red") == {"total": pytest.approx(1.0), "accuracy": 1.0, "format": 1.0}
    assert reward(bare, "red") == {"total": pytest.approx(0.9), "accuracy": 1.0, "format": 0.0}
    assert reward(good, "blue") == {"total": pytest.approx(0.1), "accuracy": 0.0, "format": 1.0}


def test_without_a_format_the_total_is_the_accuracy():
    assert Reward()("red", "Red") == {"total": 1.0, "accuracy": 1.0}


def test_an_answer_in_the_wrong_style_can_be_made_to_earn_nothing():
    reward = Reward(format="think_answer", accuracy_needs_format=True)
    assert reward("red", "red") == {"total": 0.0, "accuracy": 1.0, "format": 0.0}


def test_the_jigsaw_reward_of_paper_b_is_hits_and_accuracy_and_format():
    """All right and well-formed: 1 + 1 + 1; two of four right: 0.5 + 0 + 1."""
    reward = Reward("permutation", "think_answer", 1.0, 1.0, extra={"hits": RewardPart(permutation_hits)})
    assert reward("<think>.</think><answer>2 1 4 3</answer>", "2, 1, 4, 3")["total"] == pytest.approx(3)
    assert reward("<think>.</think><answer>2 1 3 4</answer>", "2, 1, 4, 3")["total"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "colour"}, "'colour' is unknown; there are exact"),
        ({"format": "xml"}, "'xml' is unknown; there are none, think_answer, think_boxed"),
        ({"accuracy_weight": -1}, "accuracy_weight is -1"),
        ({"format_weight": math.nan}, "format_weight is nan"),
        ({"accuracy_needs_format": True}, "needs a format"),
        ({"extra": {"total": RewardPart(permutation_hits)}}, "'total'"),
        ({"extra": {"hits": RewardPart(permutation_hits, math.inf)}}, "'hits' is inf"),
    ],
)
def test_a_reward_that_makes_no_sense_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Reward(**options)


def test_a_reward_travels_to_workers():
    reward = Reward("number", "think_boxed", extra={"hits": RewardPart(permutation_hits, 0.5)})
    assert pickle.loads(pickle.dumps(reward)) == reward


def example(reward, row_id="rows.json:7", gold="red"):
    return Example("colours", row_id, [], gold, reward)


def test_completions_of_one_example_stand_together_when_scored():
    examples = [example(Reward(), gold="red"), example(Reward(), gold="blue")]
    totals = [parts["total"] for parts in score(["red", "blue", "red", "blue"], examples)]
    assert totals == [1, 0, 0, 1]
    assert score([], []) == []
    with pytest.raises(ValueError, match="3 completions cannot be shared out among 2 examples"):
        score(["a", "b", "c"], examples)


def failing(completion, gold):
    raise KeyError("oops")


@pytest.mark.parametrize(
    "reward, message",
    [
        (failing, "task 'colours', rows.json:7: the reward raised KeyError"),
        (Reward(kind="letter"), "task 'colours', rows.json:7: .* no option letter"),
        (Reward(extra={"bonus": RewardPart(lambda completion, gold: math.nan)}), "rows.json:7: .*'bonus' is nan"),
        (lambda completion, gold: {"accuracy": 1.0}, "rows.json:7: .*finite 'total'"),
        (lambda completion, gold: 1.0, "rows.json:7: .*finite 'total'"),
    ],
)
def test_a_reward_that_fails_names_task_and_row(reward, message):
    with pytest.raises(RuntimeError, match=message):
        score(["red"], [example(reward)])
