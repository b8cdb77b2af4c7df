"""Chats as other trainers write them -> one question, its images and its reply."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpt_lightning.tasks.images import ImageInput
from cpt_lightning.tasks.prompts import IMAGE_MARKER, Turn
from cpt_lightning.tasks.records import kind_of


class BadRecord(ValueError):
    """What is wrong with a record; the caller adds which."""


_SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names, which LLaVA and LLaMA-Factory write."""
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
"""Where a part of a turn has its image, as Qwen, OpenAI and transformers write it."""


@dataclass
class Chat:
    """One question and its answer.

    Args:
        question: The user's turn, a marker where each image inside it was.
        images: The images inside the turns.
        reply: The assistant's turn.
        system: The system's turn, or several one after another.
        history: The turns before the question.
    """

    question: str
    images: list[ImageInput]
    reply: str | None = None
    system: str | None = None
    history: list[Turn] = field(default_factory=list)


def read_turns(value: object, column: str) -> Chat:
    """The chat that a column's value is.

    Args:
        value: A list of ``{"role": ..., "content": ...}`` or ``{"from": ..., "value": ...}``; content is text, or a
            list of parts.
        column: Its name, for errors.

    Raises:
        BadRecord: It is no such list, or does not end with a question or its answer.
    """
    turns = _turns(value, column)
    images = [image for _, _, shown in turns for image in shown]
    system = "\n".join(text for role, text, _ in turns if role == "system") or None
    spoken = [(role, text) for role, text, _ in turns if role != "system"]
    reply = spoken.pop()[1] if spoken and spoken[-1][0] == "assistant" else None
    if not spoken or spoken[-1][0] != "user":
        raise BadRecord(f"column '{column}' must be a question, and may end with the assistant's one reply")
    *history, (_, question) = spoken
    return Chat(question, images, reply, system, history)


def read_reply(value: object, column: str) -> str:
    """A reply that stands in a column of its own: text, or a list of one turn of the assistant.

    Raises:
        BadRecord: It is neither.
    """
    if not isinstance(value, list):
        return as_text(value, column)
    turns = _turns(value, column)
    if [(role, images) for role, _, images in turns] != [("assistant", [])]:
        raise BadRecord(f"column '{column}' is not text, nor a list of the assistant's one turn")
    return turns[0][1]


def _turns(value: object, column: str) -> list[tuple[str, str, list[ImageInput]]]:
    """Role, text and images of every turn."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRecord(f"column '{column}' is not a list of turns with 'role' and 'content'")
    return [_turn(turn, column) for turn in value]


def _turn(turn: dict, column: str) -> tuple[str, str, list[ImageInput]]:
    for speaker, said in (("role", "content"), ("from", "value")):
        if speaker in turn and said in turn:
            role = _SPEAKERS.get(turn[speaker], turn[speaker])
            if role not in ("system", "user", "assistant"):
                raise BadRecord(f"column '{column}' has a turn of the role {role!r}")
            return role, *_content(turn[said], column)
    raise BadRecord(f"column '{column}' has a turn with {', '.join(turn) or 'nothing'}; it needs 'role' and 'content'")


def _content(content: object, column: str) -> tuple[str, list[ImageInput]]:
    if isinstance(content, str):
        return content, []
    text = ""
    images: list[ImageInput] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind == "text":
            text += as_text(part.get("text"), column)
        elif isinstance(part, dict) and kind in ("image", "image_url"):
            text += IMAGE_MARKER
            images += _images(part)
        else:
            raise BadRecord(f"column '{column}' has a turn with {part!r:.60}; text and images are understood")
    return text, images


def _images(part: dict) -> list[ImageInput]:
    """The image inside a part of a turn, if it is there and not in a column of its own."""
    value = next((part[key] for key in _IMAGE_KEYS if part.get(key)), None)
    if isinstance(value, dict) and "url" in value:  # {"image_url": {"url": ..., "detail": ...}}
        value = value["url"]
    return [value] if value else []


def as_text(value: object, column: str) -> str:
    """The value, which must be text.

    Raises:
        BadRecord: It is not; the message names the column.
    """
    if not isinstance(value, str):
        raise BadRecord(f"column '{column}' holds {kind_of(value)}, not text")
    return value
