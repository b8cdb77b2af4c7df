"""Completions that a model gave, read back as what SFT learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cpt_lightning.tasks.chats import BadRecord, read_turns
from cpt_lightning.tasks.files import check_files, open_files
from cpt_lightning.tasks.prompts import Prompt
from cpt_lightning.tasks.rows import LazySequence, Row, Source, Split, check_split
from cpt_lightning.tasks.tables import Table

AS_IT_WAS = Prompt()
"""Adds nothing to the turns that are in the file."""


@dataclass
class RolloutRows(Source):
    """Training rows from a file of rollouts, evaluation rows from the source whose rows were answered.

    A row is asked in the very turns in which the model was asked when it answered, whatever the task's prompt is, and
    its target are the very tokens that were sampled.

    Args:
        file: What the callback ``RolloutWriter`` wrote, ``.jsonl`` or ``.parquet``.
        task: Whose rows of the file are taken.
        source: Has the rows of ``val`` and ``test``.

    Raises:
        ValueError: The file is missing or of another kind.
    """

    file: str
    task: str
    source: Source

    def __post_init__(self) -> None:
        check_files([self.file])

    def split(self, split: Split) -> Sequence[Row]:
        """The file's rows of the task for ``train``, otherwise the source's.

        Raises:
            ValueError: The file has no rows of the task, or lacks a column.
        """
        check_split(split)
        if split != "train":
            return self.source.split(split)
        table, rows = self._table_and_rows
        return LazySequence(len(rows), lambda index: self._row(table, rows[index]))

    @cached_property
    def _table_and_rows(self) -> tuple[Table, list[int]]:
        table = open_files([self.file])
        for name in ("task", "messages", "answers", "images"):
            if name not in table.names():
                raise ValueError(f"{self.file} has no column '{name}', so `cpt predict` did not write it; use FileRows")
        tasks = table.column("task") or []
        rows = [row for row, task in enumerate(tasks) if task == self.task]
        if not rows:
            known = ", ".join(dict.fromkeys(map(str, tasks))) or "no task"
            raise ValueError(f"{self.file} has no rollouts of '{self.task}', it has those of {known}")
        return table, rows

    def _row(self, table: Table, index: int) -> Row:
        record, row_id = table[index], table.row_id(index)
        try:
            chat = read_turns(record["messages"], "messages")
        except BadRecord as error:
            raise ValueError(f"{row_id}: {error}") from error
        if chat.reply is None:
            raise ValueError(f"{row_id}: column 'messages' does not end with the assistant's reply")
        answers = list(record["answers"])
        return Row(
            row_id,
            chat.question,
            answers[0] if len(answers) == 1 else answers,
            [str(table.folder(index) / Path(image)) for image in record["images"]],
            target=chat.reply,
            system=chat.system,
            prompt=AS_IT_WAS,
            target_ids=record.get("completion_ids"),
            history=chat.history,
        )
