"""What the model said after each evaluation, as pictures: wins, losses, and what it has just forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from cpt_lightning.callbacks.answers import Answers
from cpt_lightning.callbacks.display.loggers import log_image, logged_step, shows_images
from cpt_lightning.pictures.completions import OUTCOMES, Outcome, Said, completion_panel
from cpt_lightning.tasks import SkippedRow
from cpt_lightning.types import Example

RIGHT = 0.5
"""Accuracy from which an answer counts as right, where it is soft."""


class CompletionPanel(Answers):
    """Shows some rows of every task and probe after each evaluation, with their pictures, as ``completions/<task>``.

    A card has the question, the reference answer, the completion, and the parts of its reward. In turn the rows are
    *newly forgotten* (right after their own task and when they were asked last, wrong now), *forgotten* (the former
    alone), *wrong* and *right*, each kind in the order of the rows. What has not been taught, such as a probe, is
    compared with the base. Nothing is drawn where no logger has pictures. ``samples.jsonl`` has all the answers.

    Args:
        num_rows: Rows of each task and probe that are shown; 0 switches this off.

    Raises:
        ValueError: A negative number.
    """

    def __init__(self, num_rows: int = 4) -> None:
        super().__init__()
        if num_rows < 0:
            raise ValueError(f"num_rows={num_rows} must not be negative; 0 shows no completions")
        self.num_rows = num_rows
        self._rows_now: list[dict] = []
        self._right_then: dict[str, set[str]] = {}  # after its own task, before that by the base
        self._right_last: dict[str, set[str]] = {}

    # -- hooks -----------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows an evaluation; before ``fit`` it is the untrained base's."""
        is_base = trainer.state.fn == TrainerFn.VALIDATING and trainer.ckpt_path is None
        if not (is_base or trainer.state.fn == TrainerFn.FITTING):  # else `validate` was asked about a checkpoint
            return
        if not self.num_rows or trainer.sanity_checking or trainer.fast_dev_run:
            return
        self._rows_now = self.take(trainer)
        taught = [] if is_base else trainer.datamodule.stages[trainer.current_epoch]
        if shows_images(trainer):
            title = "base" if is_base else f"after {trainer.datamodule.stage_names[trainer.current_epoch]}"
            self._show(trainer, title, taught)
        if is_base:
            self._remember(taught)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task has been learned: its rows are compared with the answers of now from here on."""
        self._remember(trainer.datamodule.stages[trainer.current_epoch])

    # -- what is shown ---------------------------------------------------------------------------------------------

    def _show(self, trainer: Trainer, title: str, taught: Sequence[str]) -> None:
        for task, rows in _by_task(self._rows_now).items():
            outcomes = [self._outcome(row, is_taught=task in taught) for row in rows]
            examples = trainer.datamodule.examples(task, trainer.datamodule.evaluate_on)
            chosen = choose(outcomes, self.num_rows)
            said = [
                Said(example, rows[place]["completion"], rows[place]["parts"], outcomes[place])
                for place in chosen
                if (example := find(examples, rows[place]["row_id"], place)) is not None
            ]
            counts = ", ".join(f"{outcomes.count(each)} {each}" for each in reversed(OUTCOMES) if each in outcomes)
            panel = completion_panel(f"{task}, {title}: {counts}", said)
            log_image(trainer, f"completions/{task}", panel, logged_step(trainer))

    def _outcome(self, row: dict, is_taught: bool) -> Outcome:
        if counts_as_right(row):
            return "right"
        task, row_id = row["task"], row["row_id"]
        if is_taught or row_id not in self._right_then.get(task, ()):
            return "wrong"
        return "newly forgotten" if row_id in self._right_last.get(task, ()) else "forgotten"

    # -- what is remembered ----------------------------------------------------------------------------------------

    def _remember(self, taught: Sequence[str]) -> None:
        for task, rows in _by_task(self._rows_now).items():
            self._right_last[task] = {row["row_id"] for row in rows if counts_as_right(row)}
            if task in taught or task not in self._right_then:
                self._right_then[task] = self._right_last[task]
        self._rows_now = []

    def state_dict(self) -> dict:
        """Which rows were right, as plain lists."""
        return {
            name: {task: sorted(row_ids) for task, row_ids in right.items()}
            for name, right in (("right_then", self._right_then), ("right_last", self._right_last))
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on with the outcomes of a checkpoint."""
        self._right_then, self._right_last = (
            {task: set(row_ids) for task, row_ids in state_dict[name].items()} for name in ("right_then", "right_last")
        )


def counts_as_right(row: dict) -> bool:
    """Whether an answer counts as right: by its accuracy, which the matrix has too, whatever its format."""
    return row["accuracy"] >= RIGHT


def choose(outcomes: Sequence[Outcome], num_rows: int) -> list[int]:
    """Places of the rows that are shown: of each outcome in turn the first, then the second, and so on.

    >>> choose(["right", "wrong", "right", "forgotten", "wrong"], 4)
    [3, 1, 4, 0]
    >>> choose(["right", "wrong", "right", "forgotten", "wrong"], 2)
    [3, 1]
    """
    queues = [[place for place, each in enumerate(outcomes) if each == outcome] for outcome in OUTCOMES]
    in_turn = [place for turn in zip_longest(*queues) for place in turn if place is not None]
    return sorted(in_turn[:num_rows], key=lambda place: (OUTCOMES.index(outcomes[place]), place))


def find(examples: Sequence[Example], row_id: str, place: int) -> Example | None:
    """The row of that name; it stands at its place among the answers, or as much later as rows before it were skipped.

    Args:
        examples: All rows of a task.
        row_id: Whose row.
        place: Of its answer among the task's.
    """
    for index in range(place, len(examples)):
        try:
            if (example := examples[index]).row_id == row_id:
                return example
        except SkippedRow:  # its image was refused
            continue
    return None


def _by_task(rows: Sequence[dict]) -> dict[str, list[dict]]:
    tasks: dict[str, list[dict]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    return tasks
