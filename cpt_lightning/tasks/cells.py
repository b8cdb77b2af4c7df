"""What the cells of a record say: text for a question, an answer, images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cpt_lightning.tasks.chats import BadRecord
from cpt_lightning.tasks.choices import listed_texts
from cpt_lightning.tasks.images import ImageInput, is_encoded
from cpt_lightning.tasks.prompts import IMAGE_MARKER
from cpt_lightning.tasks.records import Record, is_held, kind_of
from cpt_lightning.tasks.targets import template_slots
from cpt_lightning.types import Gold

_NUMBERED_MARKER = re.compile(r"<image (\d+)>")


def pick(record: Record, column: str | list[str] | None, usual: Sequence[str], option: str) -> tuple[object, str]:
    """The value of the given column, or of the first usual one that the record has, and the column's name.

    Raises:
        BadRecord: The record has none; the message names the ``option`` of ``columns`` that mends it.
    """
    name = column if isinstance(column, str) else next((name for name in usual if name in record), None)
    if name is None:
        raise BadRecord(f"has no column {' or '.join(usual)}, only {', '.join(record)}; name it with columns.{option}")
    return get_cell(record, name, option), name


def get_cell(record: Record, column: str, option: str) -> object:
    """The value of a column, which the record must have; raises as :func:`pick` does."""
    if column not in record:
        raise BadRecord(f"has no column '{column}', only {', '.join(record)}; correct columns.{option}")
    return record[column]


def filled_line(line: str, record: Record, options: str) -> str:
    """A line of the question with its slots filled, empty if one of them is."""
    slots = template_slots(line)
    values = {slot: options if slot == "options" else _slot(get_cell(record, slot, "question"), slot) for slot in slots}
    return line.format(**values) if all(values.values()) else ""


def _slot(value: object, column: str) -> str:
    if not is_held(value):
        return ""
    if isinstance(value, (list, tuple)):
        return ",".join(_slot(entry, column) for entry in value)
    if not isinstance(value, (str, int, float)):
        raise BadRecord(f"column '{column}' holds {kind_of(value)}, which is no text for the question")
    return str(value)


def read_answer(value: object, column: str, may_be_written_out: bool = False) -> Gold:
    """A reference answer as text, or those of several that say something; a :class:`BadRecord` is neither."""
    if may_be_written_out and isinstance(value, str):
        value = listed_texts(value.strip()) or value
    if isinstance(value, (list, tuple)):
        return [_one_answer(item, column) for item in value if is_held(item)]
    return _one_answer(value, column)


def _one_answer(value: object, column: str) -> str:
    if isinstance(value, dict):  # the VQA sets' own form, and verl's
        value = next((value[name] for name in ("answer", "ground_truth") if name in value), value)
    if not is_held(value):
        return ""  # Row refuses it as empty
    if not isinstance(value, (str, int, float)):
        raise BadRecord(f"column '{column}' holds {kind_of(value)}, not an answer")
    if isinstance(value, float) and value.is_integer():  # what pandas makes of whole numbers where one is missing
        value = int(value)
    return str(value)


def place_images(texts: list[str], images: dict[int, ImageInput]) -> tuple[list[str], list[ImageInput]]:
    """The turns with plain markers only, and the images in their order.

    Args:
        texts: With plain markers, or with numbered ones such as ``<image 2>``; the question is the last.
        images: By number, from 1.

    Raises:
        BadRecord: Both kinds of markers, or one of an image that is not there.
    """
    named = [int(number) for text in texts for number in _NUMBERED_MARKER.findall(text)]
    if not named:
        return texts, list(images.values())
    if any(IMAGE_MARKER in text for text in texts):
        raise BadRecord(f"the question mixes {IMAGE_MARKER} and numbered markers; use one of them")
    missing = [number for number in named if number not in images]
    if missing:
        held = ", ".join(map(str, images)) or "none"
        raise BadRecord(f"the question shows <image {missing[0]}>, the row has {held}; correct columns.images")
    leading = [number for number in images if number not in named]
    first, *others = (_NUMBERED_MARKER.sub(IMAGE_MARKER, text) for text in texts)
    return [IMAGE_MARKER * len(leading) + first, *others], [images[number] for number in [*leading, *named]]


def resolved(image: ImageInput, folder: Path) -> ImageInput:
    """The image with a relative path made relative to the folder."""
    if isinstance(image, dict) and not image.get("bytes") and isinstance(image.get("path"), str):
        image = image["path"]
    if isinstance(image, str) and "://" not in image[:10] and not is_encoded(image):
        return str(folder / Path(image).expanduser())
    return image
