"""The chat turns around a question."""

import pytest

from cpt_lightning.rewards.rewards import FORMAT_STYLES
from cpt_lightning.tasks import Prompt
from cpt_lightning.tasks.prompts import INSTRUCTIONS

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "question, num_images, content",
    [
        ("What is it?", 0, [text("What is it?")]),
        ("What is it?", 1, [IMAGE, text("What is it?")]),
        ("What is it?", 2, [IMAGE, IMAGE, text("What is it?")]),
        ("<image>\nWhat is it?", 1, [IMAGE, text("\nWhat is it?")]),
        ("Is <image> like <image>?", 2, [text("Is "), IMAGE, text(" like "), IMAGE, text("?")]),
        ("What is it? <image>", 1, [text("What is it? "), IMAGE]),
        ("<image><image>", 2, [IMAGE, IMAGE]),
    ],
)
def test_images_stand_where_their_markers_are_or_first(question, num_images, content):
    assert Prompt().messages(question, num_images) == [{"role": "user", "content": content}]


@pytest.mark.parametrize("question, num_images", [("<image>a", 0), ("<image>a", 2), ("<image><image>a", 1)])
def test_markers_and_images_must_agree(question, num_images):
    markers = question.count("<image>")
    with pytest.raises(ValueError, match=f"{markers} <image> markers for {num_images} images"):
        Prompt().messages(question, num_images)


def test_prefix_and_suffix_enclose_the_question_after_its_leading_images():
    prompt = Prompt(prefix="Question: ", suffix=" Look closely.")
    marked = prompt.messages("<image>\nWhat is it?", 1)[0]["content"]
    assert marked == [IMAGE, text("\nQuestion: What is it? Look closely.")]
    assert prompt.messages("What is it?", 1)[0]["content"] == [IMAGE, text("Question: What is it? Look closely.")]


def test_a_style_ends_the_prompt_with_its_instruction():
    asked = Prompt(suffix="!", style="think_boxed").messages("x?", 0)[0]["content"]
    assert asked == [text("x?!" + INSTRUCTIONS["think_boxed"])]
    assert "\\boxed{}" in INSTRUCTIONS["think_boxed"]
    assert "<answer>" in INSTRUCTIONS["think_answer"]


def test_every_rewarded_format_can_be_asked_for():
    assert set(FORMAT_STYLES) <= set(INSTRUCTIONS)


def test_the_prompts_system_turn_replaces_the_rows():
    of_row = Prompt().messages("x?", 0, system="Be brief.")
    assert of_row[0] == {"role": "system", "content": [text("Be brief.")]}
    of_prompt = Prompt(system="Be kind.").messages("x?", 0, system="Be brief.")
    assert [turn["role"] for turn in of_prompt] == ["system", "user"]
    assert of_prompt[0]["content"] == [text("Be kind.")]


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_chat_tokens_in_the_text_are_refused(token):
    with pytest.raises(ValueError, match=f"the question holds '{token}'".replace("|", r"\|")):
        Prompt().messages(f"What is {token}?", 0)
    with pytest.raises(ValueError, match="the system turn holds"):
        Prompt().messages("What?", 0, system=token)
    with pytest.raises(ValueError, match="the prompt's suffix holds"):
        Prompt(suffix=token)


@pytest.mark.parametrize("name", ["system", "prefix", "suffix"])
def test_a_template_with_an_image_marker_is_refused(name):
    with pytest.raises(ValueError, match=f"the prompt's {name} holds <image>"):
        Prompt(**{name: "see <image>"})


def test_an_unknown_style_names_the_known_ones():
    with pytest.raises(ValueError, match="'cot' is unknown; there are none, direct"):
        Prompt(style="cot")


@pytest.mark.parametrize(
    ("question", "tail"),
    [
        ("Which?\nA. ice\nB. fire", "Answer with the option's letter from the given choices directly."),
        ("Which?\n(A) ice\n(B) fire", "Answer with the option's letter from the given choices directly."),
        ("A. Smith\nwrote what?", "Answer the question using a single word or phrase."),
        ("What is plan A. or B. about?", "Answer the question using a single word or phrase."),
    ],
)
def test_a_direct_answer_is_a_letter_where_the_question_lists_options(question, tail):
    content = Prompt(style="direct").messages(question, 0)[0]["content"]
    assert content[0]["text"] == f"{question}\n{tail}"
