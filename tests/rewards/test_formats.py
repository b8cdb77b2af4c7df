"""The styles that are rewarded."""

import pytest

from cpt_lightning.rewards import has_format


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


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="'xml' is unknown; there are none, think_answer, think_boxed"):
        has_format("b", "xml")
