"""How data sets write a row, as a mapping of columns -> :class:`~cpt_lightning.tasks.rows.Row`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cpt_lightning.rewards import extract_answer, with_option_text
from cpt_lightning.tasks.cells import filled_line, get_cell, pick, place_images, read_answer, resolved
from cpt_lightning.tasks.chats import BadRecord, as_text, read_reply, read_turns
from cpt_lightning.tasks.checks import check_known
from cpt_lightning.tasks.choices import listed_texts, option_lines, right_option
from cpt_lightning.tasks.images import ImageInput
from cpt_lightning.tasks.records import Record, is_held, kind_of
from cpt_lightning.tasks.rows import Row
from cpt_lightning.tasks.targets import template_slots
from cpt_lightning.types import Gold

CHAT_COLUMNS = ("messages", "conversations")
QUESTION_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "answers", "solution", "ground_truth", "reward_model")
REPLY_COLUMN = "completion"
SYSTEM_COLUMN = "system"
UNREAD_COLUMNS = ("videos", "audios", "tools")
IMAGE_COLUMNS = ("images", "image")

Turns = Literal["one", "last"]
Value = bool | int | float | str


@dataclass
class Columns:
    """Which columns of a data set say what; by default rows of the usual forms are understood.

    These are a chat, as ``messages`` (LLaMA-Factory, ms-swift, TRL), ``conversations`` (ShareGPT, LLaVA) or ``prompt``
    with or without ``completion`` (TRL, verl), and a question, as ``problem`` or ``question`` and ``answer`` (EasyR1).
    A question whose text brings its own option lines ("A. March") and whose answer is the letter of one also accepts
    that option's text as an answer.

    Args:
        messages: Column of a chat of one question and, for SFT, its reply; by default ``messages`` or ``conversations``
            where a row has it, or ``prompt`` where it is a list of turns.
        turns: Which question of a chat is asked: ``one``, which must be the only one, or ``last``, behind the turns
            before it. The replies in these are shown, and not learned.
        system: Column of the system turn, where the chat has none; by default ``system`` where a row has it.
        question: Column of the question, by default ``problem``, ``question`` or ``prompt``; or a list of lines with
            slots that are columns, such as ``["Context: {hint}", "{question}", "{options}"]``. A line is left out where
            one of its slots is empty; a list fills a slot with commas between its entries. ``{options}`` are the
            options, a line each; without that slot they come last.
        options: Column of a list of option texts, or of text that writes such a list; or one column per option. The
            answer is then the right one's index from 0, its letter or its text, and is graded by letter or text. A row
            without options is an open question, whose answer may be text that writes a list of answers.
        reply: Column of what SFT learns, where the chat has no reply; by default ``completion`` beside ``prompt``.
        answer: Column of the reference answer, or of a list of them, blank ones of which are dropped; by default that
            of a chat's reply, else ``answer``, ``answers``, ``solution``, ``ground_truth`` or ``reward_model``, else
            that of the column ``reply``.
        images: Column of the image or images, or a list of columns with one each (empty ones are skipped); by default
            ``images`` or ``image``; without it rows are text only. ``<image 2>`` in question or options shows the
            second one there, and images that are never named so come first.
        fields: Columns whose text a target template may use.
        required: Columns that must hold something; rows where one is empty are left out.
        where: Column to the value, or list of values, that it must have; other rows are left out.

    Raises:
        TypeError: Text in the place of a list of columns.
        ValueError: Options that contradict each other, or a malformed line.
    """

    messages: str | None = None
    turns: Turns = "one"
    system: str | None = None
    question: str | list[str] | None = None
    options: str | list[str] | None = None
    reply: str | None = None
    answer: str | None = None
    images: str | list[str] | None = None
    fields: list[str] = field(default_factory=list)
    required: list[str] = field(default_factory=list)
    where: dict[str, Value | list[Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_known("columns.", turns=(self.turns, Turns))
        lists: dict[str, object] = {"fields": self.fields, "required": self.required}
        for name, names in lists.items():
            if isinstance(names, str):
                raise TypeError(f"columns.{name}={names!r} is text; give a list of columns")
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
            _refuse_unread(record)
            chat = self._chat_column(record)
            row = self._read_question(record, row_id) if chat is None else self._read_chat(record, row_id, chat)
            row.images = [resolved(image, folder) for image in row.images]
            row.fields = {name: as_text(get_cell(record, name, "fields"), name) for name in self.fields}
        except BadRecord as error:
            raise ValueError(f"{row_id}: {error}") from error
        return row

    def _read_question(self, record: Record, row_id: str) -> Row:
        texts = self._option_texts(record)
        question = self._question(record, _checked(option_lines, texts))
        reply = self._reply(record)
        value, column = self._right(record, None, reply)
        if texts:
            answer = _checked(right_option, value, texts)
        else:
            answer = _with_option(read_answer(value, column, may_be_written_out=self.options is not None), question)
        (question,), images = place_images([question], self._images(record))
        return Row(row_id, question, answer, images, reply, system=self._system(record))

    def _read_chat(self, record: Record, row_id: str, column: str) -> Row:
        chat = read_turns(get_cell(record, column, "messages"), column)
        if chat.history and self.turns == "one":
            raise BadRecord(
                f"column '{column}' has turns before its last question; a row is one question and its answer: "
                "columns.turns=last shows them, and learns the last answer alone"
            )
        reply = self._reply(record)
        answer = read_answer(*self._right(record, chat.reply, reply))
        images = self._images(record) or dict(enumerate(chat.images, start=1))
        said = [text for _, text in chat.history]
        (*said, question), shown = place_images([*said, chat.question], images)
        history = [(speaker, text) for (speaker, _), text in zip(chat.history, said, strict=True)]
        return Row(
            row_id,
            question,
            _with_option(answer, question),
            shown,
            reply if chat.reply is None else chat.reply,
            system=self._system(record) if chat.system is None else chat.system,
            history=history,
        )

    # -- parts of a row --------------------------------------------------------------------------------------------

    def _chat_column(self, record: Record) -> str | None:
        """The column of the row's chat; ``None`` if the row is a question."""
        if self.messages is not None or self.question is not None or self.options is not None:
            return self.messages
        name = next((name for name in (*CHAT_COLUMNS, *QUESTION_COLUMNS) if name in record), None)
        return name if name in CHAT_COLUMNS or (name == "prompt" and isinstance(record[name], list)) else None

    def _reply(self, record: Record) -> str | None:
        """The reply that stands in a column of its own."""
        if self.reply is None and not ("prompt" in record and REPLY_COLUMN in record):
            return None
        column = self.reply or REPLY_COLUMN
        return read_reply(get_cell(record, column, "reply"), column)

    def _right(self, record: Record, chat_reply: str | None, reply: str | None) -> tuple[object, str]:
        """What the reference answer is read from, and the column's name."""
        has_column = self.answer is not None or any(name in record for name in ANSWER_COLUMNS)
        reply = reply if chat_reply is None and not has_column else chat_reply
        if self.answer is None and reply is not None:
            return extract_answer(reply), "reply"
        return pick(record, self.answer, ANSWER_COLUMNS, "answer")

    def _system(self, record: Record) -> str | None:
        if self.system is None and SYSTEM_COLUMN not in record:
            return None
        column = self.system or SYSTEM_COLUMN
        value = get_cell(record, column, "system")
        return as_text(value, column) if is_held(value) else None

    def _question(self, record: Record, options: str) -> str:
        if isinstance(self.question, list):
            lines = [filled_line(line, record, options) for line in self.question]
            has_slot = any("options" in template_slots(line) for line in self.question)
            lines += [] if has_slot else [options]
        else:
            value, column = pick(record, self.question, QUESTION_COLUMNS, "question")
            lines = [as_text(value, column) if is_held(value) else "", options]
        question = "\n".join(line for line in lines if line)
        if not question.strip():
            raise BadRecord("the question is empty; fill it in, or leave such rows out with columns.required")
        return question

    def _option_texts(self, record: Record) -> list[str]:
        if self.options is None:
            return []
        if isinstance(self.options, list):
            values = [get_cell(record, name, "options") for name in self.options]
            while values and not is_held(values[-1]):
                values.pop()
        else:
            value = get_cell(record, self.options, "options")
            written = listed_texts(value.strip()) if isinstance(value, str) else value
            if written is not None and not isinstance(written, (list, tuple)):
                raise BadRecord(f"column '{self.options}' holds {kind_of(written)}, not a list of options")
            if isinstance(value, str) and value.strip() and written is None:
                raise BadRecord(f"column '{self.options}' holds {value!r:.60}, which is no list of options")
            values = list(written or [])
        if not all(is_held(value) for value in values):
            raise BadRecord(f"an option is empty in {values!r:.80}; letters would shift")
        return [str(value).strip() for value in values]

    def _images(self, record: Record) -> dict[int, ImageInput]:
        """The images of the row's columns by their numbers from 1."""
        if isinstance(self.images, list):
            values = {number: get_cell(record, name, "images") for number, name in enumerate(self.images, start=1)}
            return {number: value for number, value in values.items() if is_held(value)}  # type: ignore[misc]
        if self.images is None and not any(name in record for name in IMAGE_COLUMNS):
            return {}
        value, _ = pick(record, self.images, IMAGE_COLUMNS, "images")
        images = list(value) if isinstance(value, (list, tuple)) else [value] if is_held(value) else []
        return dict(enumerate(images, start=1))  # type: ignore[arg-type]


def _refuse_unread(record: Record) -> None:
    """A row that brings more than is shown would be asked without it."""
    for name in UNREAD_COLUMNS:
        if is_held(record.get(name)):
            raise BadRecord(f"has {name}, and text and images are understood; take the row out")


def _checked(function, *arguments):
    """What a function makes of a record's values; its complaint is about the record."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise BadRecord(str(error)) from error


def _with_option(answer: Gold, question: str) -> Gold:
    return with_option_text(answer, question) if isinstance(answer, str) else answer
