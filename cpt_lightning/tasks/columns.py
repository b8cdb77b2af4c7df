"""How data sets write a row, as a mapping of columns -> :class:`~cpt_lightning.tasks.rows.Row`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cpt_lightning.rewards import extract_answer, with_option_text
from cpt_lightning.tasks.chats import BadRecord, as_text, read_turns
from cpt_lightning.tasks.choices import listed_texts, option_lines, right_option
from cpt_lightning.tasks.images import ImageInput, is_encoded
from cpt_lightning.tasks.prompts import IMAGE_MARKER
from cpt_lightning.tasks.records import Record, is_held, kind_of
from cpt_lightning.tasks.rows import Row
from cpt_lightning.tasks.targets import template_slots
from cpt_lightning.types import Gold

QUESTION_COLUMNS = ("problem", "question")
ANSWER_COLUMNS = ("answer", "answers", "solution")
IMAGE_COLUMNS = ("images", "image")

Value = bool | int | float | str

_NUMBERED_MARKER = re.compile(r"<image (\d+)>")


@dataclass
class Columns:
    """Which columns of a data set say what; by default rows of both usual forms are understood.

    These are ``messages`` + ``images`` (LLaMA-Factory, ms-swift) and ``images``, ``problem``, ``answer`` (EasyR1).
    A question whose text brings its own option lines ("A. March") and whose answer is the letter of one also accepts
    that option's text as an answer.

    Args:
        messages: Column of a chat of one question and, for SFT, its reply; by default ``messages`` where a row has it.
        question: Column of the question, by default ``problem`` or ``question``; or a list of lines with slots that are
            columns, such as ``["Context: {hint}", "{question}", "{options}"]``. A line is left out where one of its
            slots is empty; a list fills a slot with commas between its entries. ``{options}`` are the options, a line
            each; without that slot they come last.
        options: Column of a list of option texts, or of text that writes such a list; or one column per option. The
            answer is then the right one's index from 0, its letter or its text, and is graded by letter or text. A row
            without options is an open question, whose answer may be text that writes a list of answers.
        answer: Column of the reference answer, or of a list of them, blank ones of which are dropped; by default a
            chat's reply, else ``answer``, ``answers`` or ``solution``.
        images: Column of the image or images, or a list of columns with one each (empty ones are skipped); by default
            ``images`` or ``image``; without it rows are text only. ``<image 2>`` in question or options shows the
            second one there, and images that are never named so come first.
        fields: Columns whose text a target template may use.
        required: Columns that must hold something; rows where one is empty are left out.
        where: Column to the value, or list of values, that it must have; other rows are left out.

    Raises:
        ValueError: Options that contradict each other, or a malformed line.
    """

    messages: str | None = None
    question: str | list[str] | None = None
    options: str | list[str] | None = None
    answer: str | None = None
    images: str | list[str] | None = None
    fields: list[str] = field(default_factory=list)
    required: list[str] = field(default_factory=list)
    where: dict[str, Value | list[Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.messages and (self.question or self.options):
            raise ValueError("columns.messages excludes question and options: a row is a chat or a question")
        if isinstance(self.question, str) and "{" in self.question:
            raise ValueError(f"columns.question {self.question!r} has slots; write it as a list of lines")
        slots = [slot for line in self.question or [] for slot in template_slots(line)] if self._has_lines else []
        if self._has_lines and not slots:
            raise ValueError(f"columns.question {self.question} has no slot, so every row would ask the same")
        if "options" in slots and not self.options:
            raise ValueError("columns.question has the slot {options}; name the column of the options with options")

    @property
    def _has_lines(self) -> bool:
        return isinstance(self.question, list)

    def read(self, record: Record, row_id: str, folder: Path) -> Row:
        """The row that a record says.

        Args:
            record: Its columns.
            row_id: Its name.
            folder: What relative image paths are relative to.

        Raises:
            ValueError: A column is missing or holds something else than it should; the message names row and column.
        """
        try:
            is_chat = self.messages is not None or (self.question is None and "messages" in record)
            row = self._read_chat(record, row_id) if is_chat else self._read_question(record, row_id)
            row.images = [_resolve(image, folder) for image in row.images]
            row.fields = {name: as_text(_get(record, name, "fields"), name) for name in self.fields}
        except BadRecord as error:
            raise ValueError(f"{row_id}: {error}") from error
        return row

    def _read_question(self, record: Record, row_id: str) -> Row:
        texts = self._option_texts(record)
        question = self._question(record, _checked(option_lines, texts))
        value, column = _pick(record, self.answer, ANSWER_COLUMNS, "answer")
        if texts:
            answer = _checked(right_option, value, texts)
        else:
            answer = _with_option(_answer(value, column, may_be_written_out=self.options is not None), question)
        question, images = _place(question, self._images(record) or {})
        return Row(row_id, question, answer, images)

    def _read_chat(self, record: Record, row_id: str) -> Row:
        column = self.messages or "messages"
        chat = read_turns(_get(record, column, "messages"), column)
        if self.answer is not None or chat.reply is None:
            answer = _answer(*_pick(record, self.answer, ANSWER_COLUMNS, "answer"))
        else:
            answer = extract_answer(chat.reply)
        images = self._images(record)
        numbered = dict(enumerate(chat.images, start=1)) if images is None else images
        question, shown = _place(chat.question, numbered)
        return Row(row_id, question, _with_option(answer, question), shown, chat.reply, system=chat.system)

    # -- parts of a row --------------------------------------------------------------------------------------------

    def _question(self, record: Record, options: str) -> str:
        if isinstance(self.question, list):
            lines = [_line(line, record, options) for line in self.question]
            has_slot = any("options" in template_slots(line) for line in self.question)
            lines += [] if has_slot else [options]
        else:
            value, column = _pick(record, self.question, QUESTION_COLUMNS, "question")
            lines = [as_text(value, column) if is_held(value) else "", options]
        question = "\n".join(line for line in lines if line)
        if not question.strip():
            raise BadRecord("the question is empty; fill it in, or leave such rows out with columns.required")
        return question

    def _option_texts(self, record: Record) -> list[str]:
        if self.options is None:
            return []
        if isinstance(self.options, list):
            values = [_get(record, name, "options") for name in self.options]
            while values and not is_held(values[-1]):
                values.pop()
        else:
            value = _get(record, self.options, "options")
            written = listed_texts(value.strip()) if isinstance(value, str) else value
            if written is not None and not isinstance(written, (list, tuple)):
                raise BadRecord(f"column '{self.options}' holds {kind_of(written)}, not a list of options")
            if isinstance(value, str) and value.strip() and written is None:
                raise BadRecord(f"column '{self.options}' holds {value!r:.60}, which is no list of options")
            values = list(written or [])
        if not all(is_held(value) for value in values):
            raise BadRecord(f"an option is empty in {values!r:.80}; letters would shift")
        return [str(value).strip() for value in values]

    def _images(self, record: Record) -> dict[int, ImageInput] | None:
        """The row's images by their numbers from 1; ``None`` if it has no column of images."""
        if isinstance(self.images, list):
            values = {number: _get(record, name, "images") for number, name in enumerate(self.images, start=1)}
            return {number: value for number, value in values.items() if is_held(value)}  # type: ignore[misc]
        if self.images is None and not any(name in record for name in IMAGE_COLUMNS):
            return None
        value, _ = _pick(record, self.images, IMAGE_COLUMNS, "images")
        images = list(value) if isinstance(value, (list, tuple)) else [value] if is_held(value) else []
        return dict(enumerate(images, start=1))  # type: ignore[arg-type]


def _pick(record: Record, column: str | list[str] | None, usual: Sequence[str], option: str) -> tuple[object, str]:
    """The value of the given column, or of the first usual one that the record has, and the column's name."""
    name = column if isinstance(column, str) else next((name for name in usual if name in record), None)
    if name is None:
        raise BadRecord(f"has no column {' or '.join(usual)}, only {', '.join(record)}; name it with columns.{option}")
    return _get(record, name, option), name


def _get(record: Record, column: str, option: str) -> object:
    if column not in record:
        raise BadRecord(f"has no column '{column}', only {', '.join(record)}; correct columns.{option}")
    return record[column]


def _checked(function, *arguments):
    """What a function makes of a record's values; its complaint is about the record."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise BadRecord(str(error)) from error


def _line(line: str, record: Record, options: str) -> str:
    """A line of the question with its slots filled, empty if one of them is."""
    slots = template_slots(line)
    values = {slot: options if slot == "options" else _slot(_get(record, slot, "question"), slot) for slot in slots}
    return line.format(**values) if all(values.values()) else ""


def _slot(value: object, column: str) -> str:
    if not is_held(value):
        return ""
    if isinstance(value, (list, tuple)):
        return ",".join(_slot(entry, column) for entry in value)
    if not isinstance(value, (str, int, float)):
        raise BadRecord(f"column '{column}' holds {kind_of(value)}, which is no text for the question")
    return str(value)


def _answer(value: object, column: str, may_be_written_out: bool = False) -> Gold:
    """A reference answer as text, or those of several that say something; ``{"answer": ...}`` is unpacked."""
    if may_be_written_out and isinstance(value, str):
        value = listed_texts(value.strip()) or value
    if isinstance(value, (list, tuple)):
        return [_one_answer(item, column) for item in value if is_held(item)]
    return _one_answer(value, column)


def _one_answer(value: object, column: str) -> str:
    if isinstance(value, dict) and "answer" in value:  # the VQA sets' own form
        value = value["answer"]
    if not is_held(value):
        return ""  # Row refuses it as empty
    if not isinstance(value, (str, int, float)):
        raise BadRecord(f"column '{column}' holds {kind_of(value)}, not an answer")
    if isinstance(value, float) and value.is_integer():  # what pandas makes of whole numbers where one is missing
        value = int(value)
    return str(value)


def _with_option(answer: Gold, question: str) -> Gold:
    return with_option_text(answer, question) if isinstance(answer, str) else answer


def _place(question: str, images: dict[int, ImageInput]) -> tuple[str, list[ImageInput]]:
    """The question with plain markers only, and the images in their order.

    Args:
        question: With plain markers, or with numbered ones such as ``<image 2>``.
        images: By number, from 1.
    """
    named = [int(number) for number in _NUMBERED_MARKER.findall(question)]
    if not named:
        return question, list(images.values())
    if IMAGE_MARKER in question:
        raise BadRecord(f"the question mixes {IMAGE_MARKER} and numbered markers; use one of them")
    missing = [number for number in named if number not in images]
    if missing:
        held = ", ".join(map(str, images)) or "none"
        raise BadRecord(f"the question shows <image {missing[0]}>, the row has {held}; correct columns.images")
    leading = [number for number in images if number not in named]
    question = IMAGE_MARKER * len(leading) + _NUMBERED_MARKER.sub(IMAGE_MARKER, question)
    return question, [images[number] for number in [*leading, *named]]


def _resolve(image: ImageInput, folder: Path) -> ImageInput:
    """The image with a relative path made relative to the folder."""
    if isinstance(image, dict) and not image.get("bytes") and isinstance(image.get("path"), str):
        image = image["path"]
    if isinstance(image, str) and "://" not in image[:10] and not is_encoded(image):
        return str(folder / Path(image).expanduser())
    return image
