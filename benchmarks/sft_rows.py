"""Ragged rows of text for SFT: real questions and answers where there are some, else questions of the toy world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.tasks.toy import toy_rows
from cpt_lightning.types import Example

SHORTEST, LONGEST = 40, 320
"""Tokens of the shortest and of the longest row of a batch, its answer included."""


def ragged_rows(folder: Path, num_rows: int, processor: PromptProcessor) -> list[Example]:
    """Rows whose lengths are spread evenly on a logarithmic scale, in mixed order."""
    pairs = real_pairs(folder) or toy_pairs()
    pairs *= 1 + 4 * num_rows // len(pairs)  # enough of every length, some more than once
    examples = [
        Example("text", f"row {number}", [{"role": "user", "content": question}], answer, no_reward, target=answer)
        for number, (question, answer) in enumerate(pairs)
    ]
    lengths = np.array(lengths_of(examples, processor))
    chosen: list[int] = []
    for length in np.geomspace(SHORTEST, LONGEST, num_rows):
        free = np.setdiff1d(np.arange(len(examples)), chosen)
        chosen.append(int(free[np.abs(lengths[free] - length).argmin()]))
    return [examples[row] for row in np.random.default_rng(0).permutation(chosen)]


def lengths_of(examples: Sequence[Example], processor: PromptProcessor) -> list[int]:
    """Tokens of each row, prompt and target."""
    prompts = processor.encode([example.messages for example in examples]).lengths
    targets = processor.encode_targets([example.target or "" for example in examples]).lengths
    return (prompts + targets).tolist()


def real_pairs(folder: Path) -> list[tuple[str, str]]:
    """Questions and answers of every JSON file of chats in the folder, without their pictures; maybe none."""
    chats = [row["messages"] for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())]
    return [(question["content"].replace("<image>", "").strip(), answer["content"]) for question, answer in chats]


def toy_pairs() -> list[tuple[str, str]]:
    """Up to 24 questions of the toy world at once."""
    rows = [row for family in ("arithmetic", "facts") for row in toy_rows(family, 0, "train", 200)]
    groups = [rows[start : start + size] for size in range(1, 25) for start in range(0, 60, 24)]
    return [(" ".join(row.question for row in group), " ".join(str(row.answer) for row in group)) for group in groups]


def no_reward(completion: str, gold: str | list[str]) -> dict[str, float]:
    """SFT needs none."""
    return {"total": 0.0, "accuracy": 0.0}
