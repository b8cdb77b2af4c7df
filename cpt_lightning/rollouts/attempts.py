"""How rows are answered several times, and how the answer may be hinted at meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.rollouts.sampling import Sampling
from cpt_lightning.tasks.prompts import check_text
from cpt_lightning.tasks.targets import check_template, fill_template, most_frequent
from cpt_lightning.types import Example, Prompts


@dataclass
class Hint:
    """Shows the reference answer while completions are sampled; what is learned afterwards is asked without it.

    Args:
        text: Put behind the question; its slot ``answer`` is the reference answer, of several the most frequent one.

    Raises:
        ValueError: No slot, or a malformed one.
    """

    text: str = "\nThe right answer is {answer}. Say how to find it as if you did not know it, and then give it."

    def __post_init__(self) -> None:
        check_text(self.text, "hint.text")
        try:
            check_template(self.text)
            fill_template(self.text, {"answer": ""})
        except ValueError as error:
            raise ValueError(f"hint.text: {error}") from error

    def show(self, processor: PromptProcessor, prompts: Prompts) -> Prompts:
        """The same prompts, and images, with the hint behind each question."""
        return processor.reworded(prompts, [self.messages(example) for example in prompts.examples])

    def messages(self, example: Example) -> list[dict]:
        """The chat turns of a row with the hint in them."""
        hint = fill_template(self.text, {"answer": most_frequent(example.gold)})
        check_text(hint, f"task '{example.task}', {example.row_id}: the hint")
        *before, question = example.messages
        return [*before, {**question, "content": [*question["content"], {"type": "text", "text": hint}]}]


@dataclass
class Attempts:
    """How the rows of ``cpt predict`` are answered, several times each.

    Args:
        group_size: Completions of each row.
        sampling: How completions are drawn. It is not that of training: what completions were made to begin with there
            (``sampling.prefix``) is to be said here too; it is part of the completion, drawn as if with certainty.
        hint: Shows the reference answer meanwhile, see :class:`Hint`; ``{}`` does so in its default words.

    Raises:
        ValueError: No completion, or several of the same.
    """

    group_size: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    hint: Hint | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"attempts.group_size={self.group_size} must be at least 1")
        if self.group_size > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"attempts.sampling.temperature=0 makes all {self.group_size} completions of a row the same; use e.g. "
                "1.0, or group_size=1"
            )


def repeated(examples: Sequence[Example], group_size: int) -> list[Example]:
    """Each row once per completion of its group."""
    return [example for example in examples for _ in range(group_size)]
