"""The panel of completions: a card has room for anything that a model may say."""

from __future__ import annotations

from PIL import Image

from cpt_lightning.pictures import completions
from cpt_lightning.pictures.completions import COLOURS, HEAD, PICTURE, TAIL, Said, completion_panel
from cpt_lightning.tasks import Reward
from cpt_lightning.types import Example


def said(completion="<answer>4</answer>", outcome="right", images=(), question="What is 2 + 2?") -> Said:
    messages = [{"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]}]
    example = Example("t", "r:0", messages, "4", Reward(), images=list(images))
    return Said(example, completion, {"total": 1.0, "accuracy": 1.0, "format": 0.5}, outcome)


def colours_of(image: Image.Image) -> set[str]:
    return {f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in image.getcolors(1 << 24)}


def test_pictures_outcomes_and_texts_are_there(monkeypatch):
    written = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, place, text, **_: written.append(text))
    red, blue = Image.new("RGB", (3000, 30), "red"), Image.new("RGB", (30, 3000), "blue")
    panel = completion_panel("a task", [said(images=[red, blue]), said("x", "newly forgotten")])
    assert {"#ff0000", "#0000ff"} <= colours_of(panel)
    assert written == [
        "a task",
        "✓ right", "What is 2 + 2?", "gold = 4", "<answer>4</answer>", "total 1 · accuracy 1 · format 0.5",
        "✗ newly forgotten", "no image", "What is 2 + 2?", "gold = 4", "x", "total 1 · accuracy 1 · format 0.5",
    ]  # fmt: skip


def test_each_outcome_has_its_colour():
    for outcome, colour in COLOURS.items():
        assert colour in colours_of(completion_panel("t", [said(outcome=outcome)]))


def test_text_alone_takes_less_room():
    with_picture = completion_panel("t", [said(images=[Image.new("RGB", (30, 30))])])
    without = completion_panel("t", [said()])
    assert without.width == with_picture.width - 2 * PICTURE[0] and without.height < with_picture.height


def test_a_long_answer_keeps_beginning_and_end_and_the_card_grows(monkeypatch):
    long = "begin " + "word " * 3000 + "x" * 300 + "\n\n<answer>4</answer>"
    shown = completions._shortened(long)
    assert shown.startswith("begin word") and shown.endswith("<answer>4</answer>") and "[…]" in shown
    assert len(shown) == HEAD + TAIL + 5
    one, two = completion_panel("t", [said()]), completion_panel("t", [said(long)])
    assert one.height < two.height < 500


def test_an_empty_answer_and_strange_letters_are_drawn():
    panel = completion_panel("t" * 500, [said(""), said("∫ β ≤ 1, 答え, \x00 \u202e", question="?" * 900)])
    assert panel.height > 100
