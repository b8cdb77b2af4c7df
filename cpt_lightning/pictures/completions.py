"""What the model said: rows of a task with their pictures, the answer, and what it was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image, ImageDraw

from cpt_lightning.pictures.contact_sheet import (
    ANSWER,
    FAINT,
    FRAME,
    INK,
    LINE_HEIGHT,
    MAX_IMAGES,
    Line,
    answer_of,
    font,
    paste_side_by_side,
    question_of,
    wrap,
)
from cpt_lightning.types import Example

Outcome = Literal["newly forgotten", "forgotten", "wrong", "right"]
"""``forgotten``: wrong now, but right after its own task; ``newly``: and when it was asked last."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

COLOURS: dict[Outcome, str] = {
    "newly forgotten": "#d55e00",
    "forgotten": "#d55e00",
    "wrong": "#595959",
    "right": "#0072b2",
}
QUESTION = "#5f5f5f"
MARKS: dict[Outcome, str] = {"newly forgotten": "✗", "forgotten": "✗", "wrong": "✗", "right": "✓"}

NUM_COLUMNS = 2
MARGIN = 14
PICTURE = (170, 150)
"""Pixels of the frame that a row's pictures are fitted into, width and height."""
TEXT_WIDTH = 330
TITLE_HEIGHT, HEADER_HEIGHT = 40, 24
MAX_QUESTION_LINES, MAX_ANSWER_LINES, MAX_COMPLETION_LINES, MAX_PARTS_LINES = 5, 2, 14, 3
HEAD, TAIL = 380, 200
"""Letters of a completion that are shown; it begins with its reasoning and ends in its answer."""


@dataclass
class Said:
    """A row, and what the model answered.

    Args:
        example: The row, with its images.
        completion: The answer.
        scores: Parts of its reward.
        outcome: What became of the row.
    """

    example: Example
    completion: str
    scores: Mapping[str, float]
    outcome: Outcome


def completion_panel(title: str, rows: Sequence[Said]) -> Image.Image:
    """A card for each row: its pictures, the question, the reference answer, the completion and its reward's parts.

    Args:
        title: Written above.
        rows: At least one.
    """
    texts = [_lines(row) for row in rows]
    frame = PICTURE if any(row.example.images for row in rows) else (0, 0)
    starts = range(0, len(rows), NUM_COLUMNS)
    heights = [_card_height(texts[start : start + NUM_COLUMNS], frame) for start in starts]
    card_width = frame[0] + TEXT_WIDTH + 2 * MARGIN
    panel = Image.new("RGB", (NUM_COLUMNS * card_width + MARGIN, TITLE_HEIGHT + sum(heights)), "white")
    draw = ImageDraw.Draw(panel)
    draw.text((MARGIN, 10), wrap(title, panel.width - 2 * MARGIN, 1, size=16)[0], fill=INK, font=font(16))
    top = TITLE_HEIGHT
    for start, height in zip(starts, heights, strict=True):
        for column, index in enumerate(range(start, min(start + NUM_COLUMNS, len(rows)))):
            _draw_card(panel, rows[index], texts[index], MARGIN + column * card_width, top, frame)
        top += height
    return panel


def _lines(row: Said) -> list[Line]:
    """What stands beside the picture, each line with its colour."""
    said = wrap(_shortened(row.completion), TEXT_WIDTH, MAX_COMPLETION_LINES)
    parts = " · ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in row.scores.items())
    return [
        *((line, QUESTION) for line in wrap(question_of(row.example), TEXT_WIDTH, MAX_QUESTION_LINES)),
        *((line, ANSWER) for line in wrap(f"gold {answer_of(row.example)}", TEXT_WIDTH, MAX_ANSWER_LINES)),
        *((line, INK) for line in said),
        *((line, COLOURS[row.outcome]) for line in wrap(parts, TEXT_WIDTH, MAX_PARTS_LINES)),
    ]


def _shortened(completion: str) -> str:
    """A long completion without its middle."""
    text = " ".join(completion.split())
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]} […] {text[-TAIL:]}"


def _card_height(texts: Sequence[Sequence[Line]], frame: tuple[int, int]) -> int:
    """Of neighbouring cards."""
    return HEADER_HEIGHT + max(frame[1], max(map(len, texts)) * LINE_HEIGHT) + MARGIN


def _draw_card(
    panel: Image.Image, row: Said, lines: Sequence[Line], left: int, top: int, frame: tuple[int, int]
) -> None:
    draw = ImageDraw.Draw(panel)
    header = f"{MARKS[row.outcome]} {row.outcome}"
    draw.text((left, top + 2), header, fill=COLOURS[row.outcome], font=font(13, bold=True))
    beside = left + frame[0] + (MARGIN if frame[0] else 0)
    top += HEADER_HEIGHT
    if frame[0]:
        _draw_pictures(panel, draw, row.example.images[:MAX_IMAGES], left, top)
    for number, (text, ink) in enumerate(lines):
        draw.text((beside, top + number * LINE_HEIGHT), text, fill=ink, font=font())


def _draw_pictures(
    panel: Image.Image, draw: ImageDraw.ImageDraw, images: Sequence[Image.Image], left: int, top: int
) -> None:
    draw.rectangle((left - 1, top - 1, left + PICTURE[0], top + PICTURE[1]), outline=FRAME)
    if images:
        paste_side_by_side(panel, images, left, top, PICTURE)
    else:
        draw.text((left + 8, top + 8), "no image", fill=FAINT, font=font())
