"""Chats as other trainers write them -> one question, its images and its reply."""

from __future__ import annotations

from dataclasses import dataclass

from cpt_lightning.tasks.images import ImageInput
from cpt_lightning.tasks.prompts import IMAGE_MARKER
from cpt_lightning.tasks.records import kind_of


class BadRecord(ValueError):
    """What is wrong with a record; the caller adds which."""


@dataclass
class Chat:
    """One question and its answer.

    Args:
        question: The user's turn, a marker where each image inside it was.
        images: The images inside it.
        reply: The assistant's turn.
        system: The system's turn, or several one after another.
    """

    question: str
    images: list[ImageInput]
    reply: str | None = None
    system: str | None = None


def read_turns(value: object, column: str) -> Chat:
    """The chat that a column's value is.

    Args:
        value: A list of ``{"role": ..., "content": ...}``; content is text, or a list of parts.
        column: Its name, for errors.

    Raises:
        BadRecord: It is no such list, or more than one question and its answer.
    """
    if not isinstance(value, list) or not all(isinstance(turn, dict) and "content" in turn for turn in value):
        raise BadRecord(f"column '{column}' is not a list of turns with 'role' and 'content'")
    roles = [turn.get("role") for turn in value]
    unknown = [role for role in roles if role not in ("system", "user", "assistant")]
    if unknown:
        raise BadRecord(f"column '{column}' has a turn of the role {unknown[0]!r}")
    contents = [_content(turn["content"], column) for turn in value]
    by_role = {role: [text for (text, _), of in zip(contents, roles, strict=True) if of == role] for role in roles}
    asked, replies = by_role.get("user", []), by_role.get("assistant", [])
    if len(asked) != 1:
        raise BadRecord(f"column '{column}' has {len(asked)} user turns; a row is one question and its answer")
    if len(replies) > 1 or (replies and roles[-1] != "assistant"):
        raise BadRecord(f"column '{column}' must end with the assistant's one reply, or have none")
    images = [image for _, images in contents for image in images]
    return Chat(asked[0], images, replies[0] if replies else None, "\n".join(by_role.get("system", [])) or None)


def _content(content: object, column: str) -> tuple[str, list[ImageInput]]:
    if isinstance(content, str):
        return content, []
    text = ""
    images: list[ImageInput] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind == "text":
            text += as_text(part.get("text"), column)
        elif isinstance(part, dict) and kind == "image":
            text += IMAGE_MARKER
            images += [part["image"]] if part.get("image") else []
        else:
            raise BadRecord(f"column '{column}' has a turn with {part!r:.60}; text and images are understood")
    return text, images


def as_text(value: object, column: str) -> str:
    """The value, which must be text.

    Raises:
        BadRecord: It is not; the message names the column.
    """
    if not isinstance(value, str):
        raise BadRecord(f"column '{column}' holds {kind_of(value)}, not text")
    return value
