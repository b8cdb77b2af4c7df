"""A picture of a task: thumbnails of its rows, the question and the answer beneath each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate

from PIL import Image, ImageDraw, ImageFont

from cpt_lightning.types import Example

NUM_COLUMNS = 4
MARGIN = 12
PICTURE = (276, 200)
"""Pixels of the frame that a picture is fitted into, width and height."""
TITLE_HEIGHT = 40
FONT_SIZE = 12
LINE_HEIGHT = 17
MAX_QUESTION_LINES = 5
MAX_ANSWER_LINES = 2
MAX_IMAGES = 4
"""Images of a row that are shown side by side."""

INK, FAINT, ANSWER, FRAME = "#1a1a1a", "#8a8a8a", "#0a6640", "#d5d5d5"

Line = tuple[str, str]
"""Text and its colour."""


def contact_sheet(title: str, examples: Sequence[Example]) -> Image.Image:
    """The sheet.

    Args:
        title: Written above.
        examples: A cell for each.
    """
    captions = [caption(example) for example in examples]
    starts = range(0, len(examples), NUM_COLUMNS)
    lines = [max(map(len, captions[start : start + NUM_COLUMNS])) for start in starts]  # of each row of cells
    tops = list(accumulate((_cell_height(count) for count in lines), initial=TITLE_HEIGHT))
    sheet = Image.new("RGB", (NUM_COLUMNS * (PICTURE[0] + MARGIN) + MARGIN, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), wrap(title, sheet.width - 2 * MARGIN, 1, size=18)[0], fill=INK, font=font(18))
    for index, example in enumerate(examples):
        row, column = divmod(index, NUM_COLUMNS)
        left, top = MARGIN + column * (PICTURE[0] + MARGIN), tops[row]
        _draw_pictures(sheet, draw, example.images, left, top)
        for number, (text, colour) in enumerate(captions[index]):
            place = (left, top + PICTURE[1] + 6 + number * LINE_HEIGHT)
            draw.text(place, text, fill=colour, font=font())
    return sheet


def with_thumbnails(example: Example) -> Example:
    """The example with its images no larger than they are shown, so that a sheet's rows fit in memory together."""
    images = [image.copy() for image in example.images]
    for image in images:
        image.thumbnail(PICTURE)
    return replace(example, images=images)


def _cell_height(num_lines: int) -> int:
    return PICTURE[1] + 6 + num_lines * LINE_HEIGHT + 2 * MARGIN


def caption(example: Example) -> list[Line]:
    """What stands beneath a picture."""
    asked = wrap(question_of(example), PICTURE[0], MAX_QUESTION_LINES)
    answered = wrap(answer_of(example), PICTURE[0], MAX_ANSWER_LINES)
    return [*((line, INK) for line in asked), *((line, ANSWER) for line in answered)]


def _draw_pictures(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, images: Sequence[Image.Image], left: int, top: int
) -> None:
    right, bottom = left + PICTURE[0], top + PICTURE[1]
    draw.rectangle((left - 1, top - 1, right, bottom), outline=FRAME)
    if not images:
        draw.text((left + 8, top + 8), "no image", fill=FAINT, font=font())
        return
    paste_side_by_side(sheet, images[:MAX_IMAGES], left, top, PICTURE)
    if len(images) > MAX_IMAGES:
        draw.text((left + 4, bottom - 18), f"{len(images)} images", fill=INK, font=font())


def paste_side_by_side(
    sheet: Image.Image, images: Sequence[Image.Image], left: int, top: int, frame: tuple[int, int]
) -> None:
    """Fits pictures into a frame, each into an equal share of its width.

    Args:
        sheet: What is pasted into.
        images: At least one.
        left: Pixels from the left to the frame.
        top: Pixels from the top to the frame.
        frame: Its width and height.
    """
    width = frame[0] // len(images)
    for position, image in enumerate(images):
        scale = min(width / image.width, frame[1] / image.height)
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        # Enlarged pictures keep their pixels: what looks smooth here would not be what the model gets.
        small = image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC)
        x = left + position * width + (width - small.width) // 2
        sheet.paste(small, (x, top + (frame[1] - small.height) // 2))


def question_of(example: Example) -> str:
    """The user's turn as text; an image in the middle of it stands as ``[image]``."""
    content = example.messages[-1]["content"]
    parts = [content] if isinstance(content, str) else [part.get("text", " [image] ") for part in content]
    return re.sub(r"^(?: ?\[image\] ?)+", "", " ".join("".join(parts).split()))


def answer_of(example: Example) -> str:
    """The reference answer, or all different ones."""
    golds = [example.gold] if isinstance(example.gold, str) else list(dict.fromkeys(example.gold))
    return "= " + " | ".join(" ".join(gold.split()) for gold in golds)


def wrap(text: str, width: int, max_lines: int, size: int = FONT_SIZE) -> list[str]:
    """The text in lines of at most ``width`` pixels; what does not fit into ``max_lines`` is cut off with dots."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, width, size):
            longer = f"{lines[-1]} {piece}".lstrip()
            if font(size).getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font(size).getlength(f"{last}...") > width:
            last = last[:-1]
        lines[max_lines - 1 :] = [f"{last}..."]
    return lines


def _pieces(word: str, width: int, size: int) -> list[str]:
    """A word, cut where it alone is wider than a line."""
    if len(word) <= 500 and font(size).getlength(word) <= width:
        return [word]
    pieces = [""]
    for letter in word[:500]:
        if font(size).getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


@cache
def font(size: int = FONT_SIZE, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Matplotlib's DejaVu Sans, which has Greek, Cyrillic and mathematics; letters it lacks show as boxes."""
    import matplotlib  # slow

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = f"{matplotlib.get_data_path()}/fonts/ttf/{name}"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)  # the other takes three times as long
