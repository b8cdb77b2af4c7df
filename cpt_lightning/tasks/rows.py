"""What a source gives: rows of a split, each a question and its answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, get_args, overload

from cpt_lightning.tasks.images import ImageInput
from cpt_lightning.tasks.prompts import Prompt, Turn, refuse_surrogates
from cpt_lightning.tasks.records import kind_of
from cpt_lightning.types import Gold

T = TypeVar("T")

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def check_split(split: str) -> None:
    """Refuses a split that is none.

    Raises:
        ValueError: ``split`` is not one of :data:`SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")


@dataclass
class Row:
    """One question of a source with its answer, before a task decides how it is asked.

    Args:
        row_id: Names the row in errors and result files: ``"<source>/<split>/<index>"`` or ``"<file>:<row>"``, the
            index from 0 and the row from 1.
        question: Text asked; an ``<image>`` marker says where an image goes, images without a marker come first.
        answer: Reference answer, or several that are all right.
        images: In the order of their markers; whatever :func:`~cpt_lightning.tasks.images.load_image` reads.
        target: Completion that SFT learns; ``None`` leaves it to the task.
        fields: Further slots for the task's target template, such as ``{"thought": "three bars, the left one"}``.
        system: System turn that the data itself brings; a prompt's own ``system`` replaces it.
        prompt: How this row is asked, in place of the task's own prompt: what was sampled is learned as it was asked.
        target_ids: Token ids of the target, which SFT then learns as they are.
        history: Turns before the question, each who speaks (``user`` or ``assistant``) and what is said; the markers of
            images count through all of them.

    Raises:
        ValueError: Question or answer is no text, or images no list; the answer is empty or holds half of a character,
            or a field would hide the slot ``answer``.
    """

    row_id: str
    question: str
    answer: Gold
    images: Sequence[ImageInput] = field(default_factory=list)
    target: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    system: str | None = None
    prompt: Prompt | None = None
    target_ids: list[int] | None = None
    history: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.question, str):
            raise ValueError(f"{self.row_id}: the question is {kind_of(self.question)}; give text")
        if isinstance(self.images, str | bytes) or not isinstance(self.images, Sequence):
            raise ValueError(f"{self.row_id}: images is {kind_of(self.images)}; give a list of images")
        answers = [self.answer] if isinstance(self.answer, str) else self.answer
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{self.row_id}: the answer {answers!r} is no text, nor a list of texts")
        if not answers or not all(answer.strip() for answer in answers):
            raise ValueError(f"{self.row_id}: empty answer {self.answer!r}; fill it in or take the row out")
        for answer in answers:  # what is asked and learned is looked at where it is filled in
            refuse_surrogates(answer, f"{self.row_id}: the answer")
        if "answer" in self.fields:
            raise ValueError(f"{self.row_id}: the field 'answer' would hide the row's answer; give it another name")


class Source(ABC):
    """Where a task's rows come from."""

    @abstractmethod
    def split(self, split: Split) -> Sequence[Row]:
        """The rows of ``"train"``, ``"val"`` or ``"test"``: map-style, each read when it is asked for.

        Raises:
            ValueError: The source has no such split.
        """


class LazySequence(Sequence[T], Generic[T]):
    """``num_items`` items, each made by ``get(index)`` when it is asked for and not kept.

    Args:
        num_items: Length of the sequence.
        get: Makes the item of an index in ``[0, num_items)``.
    """

    def __init__(self, num_items: int, get: Callable[[int], T]) -> None:
        self.num_items = num_items
        self.get = get

    def __len__(self) -> int:
        return self.num_items

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(self.num_items)[index]]
        return self.get(range(self.num_items)[index])  # range resolves negative indices and raises IndexError

    def __iter__(self) -> Iterator[T]:
        return map(self.get, range(self.num_items))  # Sequence's own would end silently at an IndexError inside `get`
