"""The forms in which data sets write a row -> :class:`~cpt_lightning.tasks.task.Row`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cpt_lightning.rewards import extract_answer
from cpt_lightning.tasks.images import ImageInput
from cpt_lightning.tasks.prompts import IMAGE_MARKER
from cpt_lightning.tasks.tables import Record
from cpt_lightning.tasks.task import Row
from cpt_lightning.types import Gold

QUESTION_COLUMNS = ("problem", "question")
ANSWER_COLUMNS = ("answer", "answers", "solution")
IMAGE_COLUMNS = ("images", "image")


@dataclass
class RowForm:
    """Reads rows of both usual forms: ``messages`` + ``images``, or ``images``, ``problem``, ``answer``.

    Args:
        messages_column: Column of the chat; rows that have it (by default: ``messages``) are read as chats.
        question_column: Column of the question otherwise; by default ``problem`` or ``question``.
        answer_column: Column of the reference answer(s); by default a chat's last turn, else ``answer``, ``answers`` or
            ``solution``.
        images_column: Column of the image or images; by default ``images`` or ``image``, and rows may have neither.
        fields: Columns whose text a target template may use.
    """

    messages_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    images_column: str | None = None
    fields: list[str] = field(default_factory=list)

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
            is_chat = self.messages_column is not None or (self.question_column is None and "messages" in record)
            row = self._read_chat(record, row_id) if is_chat else self._read_question(record, row_id)
            row.images = [_resolve(image, folder) for image in row.images]
            row.fields = {name: _text(_get(record, name, "fields"), name) for name in self.fields}
        except _BadRecord as error:
            raise ValueError(f"{row_id}: {error}") from error
        return row

    def _read_question(self, record: Record, row_id: str) -> Row:
        question = _text(*_pick(record, self.question_column, QUESTION_COLUMNS, "question_column"))
        answer = _answer(*_pick(record, self.answer_column, ANSWER_COLUMNS, "answer_column"))
        return Row(row_id, question, answer, self._images(record) or [])

    def _read_chat(self, record: Record, row_id: str) -> Row:
        column = self.messages_column or "messages"
        turns = _turns(_get(record, column, "messages_column"), column)
        images_of_turns = [image for _, _, images in turns for image in images]
        asked = [text for role, text, _ in turns if role == "user"]
        system = "\n".join(text for role, text, _ in turns if role == "system") or None
        if len(asked) != 1:
            raise _BadRecord(f"column '{column}' has {len(asked)} user turns; a row is one question and its answer")
        replies = [text for role, text, _ in turns if role == "assistant"]
        if len(replies) > 1 or (replies and turns[-1][0] != "assistant"):
            raise _BadRecord(f"column '{column}' must end with the assistant's one reply, or have none")
        target = replies[0] if replies else None
        if self.answer_column is not None or target is None:
            answer = _answer(*_pick(record, self.answer_column, ANSWER_COLUMNS, "answer_column"))
        else:
            answer = extract_answer(target)
        images = self._images(record)
        return Row(row_id, asked[0], answer, images_of_turns if images is None else images, target, system=system)

    def _images(self, record: Record) -> list[ImageInput] | None:
        if self.images_column is None and not any(name in record for name in IMAGE_COLUMNS):
            return None
        value, _ = _pick(record, self.images_column, IMAGE_COLUMNS, "images_column")
        if value is None:
            return []
        return list(value) if isinstance(value, (list, tuple)) else [value]  # type: ignore[list-item]


class _BadRecord(ValueError):
    """What is wrong with a record; the caller adds which."""


def _pick(record: Record, column: str | None, usual: tuple[str, ...], option: str) -> tuple[object, str]:
    """The value of the given column, or of the first usual one that the record has, and the column's name."""
    if column is None:
        column = next((name for name in usual if name in record), None)
    if column is None:
        raise _BadRecord(f"has no column {' or '.join(usual)}, only {', '.join(record)}; name it with {option}")
    return _get(record, column, option), column


def _get(record: Record, column: str, option: str) -> object:
    if column not in record:
        raise _BadRecord(f"has no column '{column}', only {', '.join(record)}; correct {option}")
    return record[column]


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise _BadRecord(f"column '{column}' holds a {type(value).__name__}, not text")
    return value


def _answer(value: object, column: str) -> Gold:
    """A reference answer as text, or several: numbers are written out, ``{"answer": ...}`` is unpacked."""
    if isinstance(value, (list, tuple)):
        return [_one_answer(item, column) for item in value]
    return _one_answer(value, column)


def _one_answer(value: object, column: str) -> str:
    if isinstance(value, dict) and "answer" in value:  # the VQA sets' own form
        value = value["answer"]
    if value is None:
        return ""  # Row refuses it as empty
    if not isinstance(value, (str, int, float)):
        raise _BadRecord(f"column '{column}' holds a {type(value).__name__}, not an answer")
    return str(value)


def _turns(value: object, column: str) -> list[tuple[str, str, list[ImageInput]]]:
    """Role, text and the images inside the turn, for every turn of a chat."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) and "content" in turn for turn in value):
        raise _BadRecord(f"column '{column}' is not a list of turns with 'role' and 'content'")
    turns = []
    for turn in value:
        if turn.get("role") not in ("system", "user", "assistant"):
            raise _BadRecord(f"column '{column}' has a turn of the role {turn.get('role')!r}")
        turns.append((turn["role"], *_content(turn["content"], column)))
    return turns


def _content(content: object, column: str) -> tuple[str, list[ImageInput]]:
    if isinstance(content, str):
        return content, []
    text = ""
    images: list[ImageInput] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind == "text":
            text += _text(part.get("text"), column)
        elif isinstance(part, dict) and kind == "image":
            text += IMAGE_MARKER
            images += [part["image"]] if part.get("image") else []
        else:
            raise _BadRecord(f"column '{column}' has a turn with {part!r:.60}; text and images are understood")
    return text, images


def _resolve(image: ImageInput, folder: Path) -> ImageInput:
    """The image with a relative path made relative to the folder."""
    if isinstance(image, dict) and not image.get("bytes") and isinstance(image.get("path"), str):
        image = image["path"]
    if isinstance(image, str) and "://" not in image:
        return str(folder / Path(image).expanduser())
    return image
