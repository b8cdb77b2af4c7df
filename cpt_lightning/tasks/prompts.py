"""How a question is asked: the chat turns around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

IMAGE_MARKER = "<image>"

Turn = tuple[str, str]
"""Who speaks (``user`` or ``assistant``), and what is said, with a marker where each image stands."""

Style = Literal["none", "direct", "letter", "think_answer", "think_boxed"]

INSTRUCTIONS: dict[str, str] = {
    "none": "",
    "direct": "\nAnswer the question using a single word or phrase.",
    "letter": "\nAnswer with the option's letter from the given choices directly.",
    "think_answer": (
        "\nFirst think about the question inside <think> </think> tags, then give only the final answer inside "
        "<answer> </answer> tags."
    ),
    "think_boxed": (
        "\nFirst think about the question inside <think> </think> tags, then put only the final answer in \\boxed{}."
    ),
}
"""Instruction that each style puts after the question. ``direct`` and ``letter`` are the tails of paper A's SFT rows
(arXiv 2507.05386); the think styles ask for what the rewards' formats of the same names check."""

_HAS_OPTIONS = re.compile(r"^\(?A[.):]\s.*\n\(?B[.):]\s", re.MULTILINE)

SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_LEADING_MARKERS = re.compile(r"(?:\s*<image>)*\s*")


@dataclass
class Prompt:
    r"""How a row's question is asked.

    Args:
        system: System turn; ``None`` takes the row's own, else the chat template's default.
        prefix: Text before the question, after images that lead it.
        suffix: Text after the question.
        style: Instruction after the suffix: ``none``, ``direct`` (a word or phrase; an option's letter where the
            question lists options), ``letter`` (an option's letter), ``think_answer`` (think, then ``<answer>`` tags)
            or ``think_boxed`` (think, then ``\boxed{}``).

    Raises:
        ValueError: Unknown style, or an ``<image>`` marker, chat token or half a character in one of the texts.
    """

    system: str | None = None
    prefix: str = ""
    suffix: str = ""
    style: Style = "none"

    def __post_init__(self) -> None:
        if self.style not in INSTRUCTIONS:
            raise ValueError(f"prompt style {self.style!r} is unknown; there are {', '.join(INSTRUCTIONS)}")
        for name, text in (("system", self.system or ""), ("prefix", self.prefix), ("suffix", self.suffix)):
            check_text(text, f"the prompt's {name}")
            if IMAGE_MARKER in text:
                raise ValueError(f"the prompt's {name} holds {IMAGE_MARKER}; images belong to the rows' questions")

    def messages(
        self, question: str, num_images: int, system: str | None = None, history: Sequence[Turn] = ()
    ) -> list[dict]:
        """The chat turns before the answer; each image stands as ``{"type": "image"}`` where its marker was.

        Images come first if no turn has a marker; the prefix follows the images that lead the question.

        Args:
            question: The row's question, with one ``<image>`` marker per image or none at all.
            num_images: Images of the row.
            system: The row's own system turn.
            history: Turns before the question, whose markers count too.

        Raises:
            ValueError: As many markers as images were expected, or the text holds a chat token or half a character.

        >>> Prompt(prefix="Look: ").messages("<image>What is it?", 1)[0]["content"]
        [{'type': 'image'}, {'type': 'text', 'text': 'Look: What is it?'}]
        """
        system = self.system if self.system is not None else system
        texts = [*(text for _, text in history), question]
        for name, text in (("system turn", system or ""), *(("question", text) for text in texts)):
            check_text(text, f"the {name}")
        num_markers = sum(text.count(IMAGE_MARKER) for text in texts)
        if num_markers not in (0, num_images):
            raise ValueError(f"the question has {num_markers} {IMAGE_MARKER} markers for {num_images} images")
        if num_markers == 0:
            texts[0] = IMAGE_MARKER * num_images + texts[0]
        *said, question = texts
        turns = [] if system is None else [("system", system)]
        turns += [(speaker, text) for (speaker, _), text in zip(history, said, strict=True)]
        return [{"role": role, "content": _content(text)} for role, text in [*turns, ("user", self._asked(question))]]

    def _asked(self, question: str) -> str:
        """The question with its images, and what the prompt puts around it."""
        lead = _LEADING_MARKERS.match(question).end()  # type: ignore[union-attr]  # matches the empty string
        style = "letter" if self.style == "direct" and _HAS_OPTIONS.search(question) else self.style
        return question[:lead] + self.prefix + question[lead:] + self.suffix + INSTRUCTIONS[style]


def _content(text: str) -> list[dict]:
    parts: list[dict] = []
    for index, piece in enumerate(text.split(IMAGE_MARKER)):
        if index > 0:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def check_text(text: str, what: str) -> None:
    """Refuses text that a tokenizer cannot take, or would take for something else than text.

    Raises:
        ValueError: ``text`` holds something like ``<|image_pad|>`` or ``<|im_end|>``, which would change the turns or
            the image count, or half of a character.
    """
    found = SPECIAL_TOKEN.search(text)
    if found:
        raise ValueError(f"{what} holds {found[0]!r}, a special token of the tokenizer; respell or remove it")
    refuse_surrogates(text, what)


def refuse_surrogates(text: str, what: str) -> None:
    r"""Refuses text that holds half of a character, as JSON can: ``"\ud83d"`` without the ``"\ude00"`` behind it.

    Raises:
        ValueError: It does; no tokenizer takes it and no file of results.
    """
    found = _SURROGATE.search(text)
    if found:
        raise ValueError(
            f"{what} holds {found[0]!r}, which is half of a character (a lone surrogate); write all of it or remove it"
        )
