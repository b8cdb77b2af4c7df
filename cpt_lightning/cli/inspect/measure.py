"""The rows of a split -> what there is to know of them: sizes, lengths, answers, and what is wrong."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cpt_lightning.cli.inspect.report import Answers, Complaint, Shown, SplitReport, Spread
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.rewards import YES_NO_COUNTS, score
from cpt_lightning.tasks import SkippedRow
from cpt_lightning.tasks.splits import spaced
from cpt_lightning.tasks.targets import most_frequent
from cpt_lightning.types import Example

NUM_FREQUENT = 3
"""Answers that are named with their shares."""

_VARYING = re.compile(r"(?P<kept>columns? '[^']*')|'[^']*'|(?P<number>(?<!\w)\d[\d,.]*)")
"""What differs among rows with the same fault, and the quoted names that do not."""
_IMAGE_RUN = re.compile(r"(?:<\|image_pad\|>)+")


class Complaints:
    """Counts what is wrong with rows, by reason."""

    def __init__(self) -> None:
        self._found: dict[str, Complaint] = {}

    def add(self, what: str, message: str) -> None:
        """Takes note of a row: what it has in common with others, and what is said of it."""
        self._found.setdefault(what, Complaint(what, 0, message)).count += 1

    def sorted(self) -> list[Complaint]:
        """The most frequent first."""
        return sorted(self._found.values(), key=lambda complaint: -complaint.count)


def reason(message: str) -> str:
    """What the errors of rows with the same fault have in common: all but values and numbers; columns keep their names.

    >>> reason("task 'a', rows.jsonl:17: image 'x.png' is 20 x 400 pixels; the model needs 28 a side")
    'image is N x N pixels; the model needs N a side'
    >>> reason("task 'a', rows.jsonl:17: has no column 'o1', only question, answer")
    "has no column 'o1', only question, answer"
    """
    fault = re.sub(r"^task '[^']*', .*?: ", "", message)
    return " ".join(_VARYING.sub(lambda found: found["kept"] or (found["number"] and "N") or "", fault).split())


@dataclass
class Measured:
    """What the rows of a split turn out to be; one row's pictures are in memory at a time.

    Args:
        processor: Counts tokens.
        examples: The rows that can be read, without their images.
        sizes: Width and height of each row's images.
        tokens: Tokens of each prompt, and those of images among them.
        skipped: Rows that are left out because of an image.
        refused: Rows that would stop a run.
        asked: Of each row what stands for its words and images.
    """

    processor: PromptProcessor
    examples: list[Example] = field(default_factory=list)
    sizes: list[list[tuple[int, int]]] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)
    skipped: Complaints = field(default_factory=Complaints)
    refused: Complaints = field(default_factory=Complaints)
    asked: list[bytes] = field(default_factory=list)

    def add(self, rows: Sequence[Example], index: int) -> None:
        """Reads and measures a row."""
        try:
            example = rows[index]
        except ValueError as error:
            complaints = self.skipped if isinstance(error, SkippedRow) else self.refused
            complaints.add(reason(str(error)), str(error))
            return
        sizes = [image.size for image in example.images]
        self.sizes.append(sizes)
        self.tokens.append(self.processor.count_tokens(example.messages, sizes))
        self.asked.append(_digest(example))
        self.examples.append(replace(example, images=[]))

    def target_lengths(self) -> list[int]:
        """Tokens of each SFT target."""
        targets = [example.target for example in self.examples if example.target is not None]
        return self.processor.encode_targets(targets).lengths.tolist() if targets else []


def measure_split(
    split: str,
    rows: Sequence[Example],
    processor: PromptProcessor,
    limit: int | None = None,
    max_rows: int | None = None,
    advance: Callable[[], object] = lambda: None,
    learned: set[bytes] | None = None,
) -> SplitReport:
    """Measures a split: all of it but its fingerprint.

    Args:
        split: Its name.
        rows: Its examples.
        processor: Counts tokens.
        limit: ``data.max_prompt_tokens``.
        max_rows: Measure so many rows, evenly spaced; all by default.
        advance: Called after each row.
        learned: What stands for the rows of ``train``, which adds its own.
    """
    found, indices = Measured(processor), spaced(len(rows), max_rows)
    for index in indices:
        found.add(rows, index)
        advance()
    earned, wrong = grade_targets(found.examples)
    learned = set() if learned is None else learned
    num_learned = 0 if split == "train" else sum(row in learned for row in found.asked)
    learned.update(found.asked if split == "train" else ())
    return SplitReport(
        split,
        num_rows=len(rows),
        num_measured=len(indices),
        images_per_row=Spread.of([len(sizes) for sizes in found.sizes]),
        image_sizes=_extremes([size for sizes in found.sizes for size in sizes]),
        prompt_tokens=Spread.of([tokens for tokens, _ in found.tokens]),
        image_tokens=Spread.of([tokens for _, tokens in found.tokens]),
        target_tokens=Spread.of(found.target_lengths()),
        num_too_long=sum(limit is not None and tokens > limit for tokens, _ in found.tokens),
        skipped=found.skipped.sorted(),
        refused=found.refused.sorted(),
        answers=_answers(found.examples),
        target_earns=earned,
        wrong_targets=wrong,
        num_learned=num_learned,
    )


def _digest(example: Example) -> bytes:
    """The same for rows that ask the same of the same images."""
    digest = hashlib.blake2b(json.dumps(example.messages).encode())
    for image in example.images:
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.digest()


def _extremes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return [ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]] if ordered else []


def _answers(examples: Sequence[Example]) -> Answers | None:
    if not examples:
        return None
    counts = Counter(most_frequent(example.gold) for example in examples)
    shares = [(answer, count / len(examples)) for answer, count in counts.most_common(NUM_FREQUENT)]
    earned = [parts["accuracy"] for example in examples if (parts := _earns(shares[0][0], example))]
    return Answers(len(counts), shares, sum(earned) / len(examples))


def grade_targets(examples: Sequence[Example]) -> tuple[dict[str, float], list[Complaint]]:
    """What SFT targets earn on average, and those that the task's own reward finds wrong: faults of the data."""
    complaints, earned = Complaints(), []
    for example in examples:
        if example.target is None:
            continue
        try:
            parts = _graded(example.target, example)
        except RuntimeError as error:  # names the row, and what the reward said of it
            complaints.add("the reward cannot grade the row", str(error))
            continue
        earned.append(parts)
        if parts["accuracy"] < _attainable(example):
            what = f"the SFT target earns accuracy {parts['accuracy']:g} under the task's own reward"
            text = f"target {_short(example.target)}, answer {_short(example.gold)}"
            complaints.add(what, f"task '{example.task}', {example.row_id}: {text}")
    names = dict.fromkeys(name for parts in earned for name in parts)
    return {name: sum(parts.get(name, 0.0) for parts in earned) / len(earned) for name in names}, complaints.sorted()


def _attainable(example: Example) -> float:
    """What a right answer earns: 1, or less where people disagree and accuracy is soft."""
    if isinstance(example.gold, str):
        return 1.0
    earned = [parts["accuracy"] for gold in dict.fromkeys(example.gold) if (parts := _earns(gold, example))]
    return max(earned, default=0.0) or 1.0


def _earns(text: str, example: Example) -> dict[str, float]:
    """The parts a text earns; none where the reward cannot grade the row, which its target has told already."""
    try:
        return _graded(text, example)
    except RuntimeError:
        return {}


def _graded(text: str, example: Example) -> dict[str, float]:
    """What is optimised and reported of a text; a reward may also count what a set's precision is made of."""
    (parts,) = score([text], [example])
    return {name: value for name, value in parts.items() if name not in YES_NO_COUNTS}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def show(example: Example, processor: PromptProcessor) -> Shown:
    """An example as the model gets it: what is decoded here are the very ids of its prompt."""
    prompt = processor.encode([example.messages], [example.images], [f"task '{example.task}', {example.row_id}"])
    text = processor.tokenizer.decode(prompt.input_ids[0], clean_up_tokenization_spaces=False)
    earns = {} if example.target is None else _earns(example.target, example)
    return Shown(example.row_id, collapse_images(text), example.gold, example.target, earns)


def collapse_images(text: str) -> str:
    """The text with each run of image tokens as one and its length.

    >>> collapse_images("<|vision_start|>" + 3 * "<|image_pad|>" + "<|vision_end|>Look")
    '<|vision_start|><|image_pad|> x 3<|vision_end|>Look'
    """
    return _IMAGE_RUN.sub(lambda run: f"<|image_pad|> x {run[0].count('<|image_pad|>')}", text)
