"""Packs lessons into rows: the exchanges about a picture share it, and short lessons share a row.

The packing is that of group training, with whole exchanges in the place of completions. A token sees its own picture
and its own branch, and M-RoPE positions go on where the picture ended, so every branch is the very sequence that a
prompt with one question will be.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cpt_lightning.models.tiny.config import VISION
from cpt_lightning.models.tiny.lessons import Lesson
from cpt_lightning.tasks.toy_scenes import SIZE

PATCH, MERGE, TEMPORAL = (VISION[name] for name in ("patch_size", "spatial_merge_size", "temporal_patch_size"))
GRID = SIZE // PATCH
"""Patches along each side of a toy picture."""

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
ANSWER_WEIGHT = 4.0
"""An answer token counts as much in the loss as four tokens of phrase, tags or caption."""


@dataclass
class PackedLessons:
    """One step's lessons as R packed rows of length S.

    Args:
        input_ids: ``[R, S]`` token ids.
        positions: ``[3, R, S]`` M-RoPE positions.
        allowed: ``[R, 1, S, S]`` bool, true where a query may look at a key.
        pixel_values: ``[num_patches, patch_dim]`` of all pictures in reading order of the rows.
        predict: ``[M, 3]`` row, column and target id of every learned token: the column that predicts it.
        weights: ``[M]`` weight of every learned token in the loss.
    """

    input_ids: Tensor
    positions: Tensor
    allowed: Tensor
    pixel_values: Tensor
    predict: Tensor
    weights: Tensor


class Packer:
    """Packs lessons into rows for one tokenizer.

    Args:
        tokenizer: The tiny tokenizer.
        row_length: Tokens of a row; a longer lesson gets a longer row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, row_length: int = 168) -> None:
        self.tokenizer = tokenizer
        self.row_length = row_length
        self._known: dict[str, list[int]] = {}  # most texts come again; encoding one costs more than drawing a scene
        self.before = self._ids("<|im_start|>user\n")
        self.picture = self._ids("<|vision_start|>" + "<|image_pad|>" * (GRID // MERGE) ** 2 + "<|vision_end|>")
        self.turn = self._ids("<|im_end|>\n<|im_start|>assistant\n")
        self.picture_positions = _picture_positions(len(self.before), GRID // MERGE)

    def pack(self, lessons: list[Lesson]) -> PackedLessons:
        """Lays the lessons out, first fit, longest first."""
        laid = sorted((self._lay_out(lesson) for lesson in lessons), key=len, reverse=True)
        rows: list[list[_Layout]] = []
        for layout in laid:
            for row in rows:
                if sum(map(len, row)) + len(layout) <= self.row_length:
                    row.append(layout)
                    break
            else:
                rows.append([layout])
        return self._collate(rows)

    def _lay_out(self, lesson: Lesson) -> _Layout:
        layout = _Layout(lesson.image)
        if lesson.image is None:
            layout.add_prefix(self.before, [(position,) * 3 for position in range(len(self.before))])
        else:
            layout.add_prefix(self.before + self.picture, self.picture_positions)
        for exchange in lesson.exchanges:
            asked = self._ids(exchange.question) + self.turn
            lead = self._ids(f"<think>{exchange.thought}</think><answer>")
            answer = self._ids(exchange.answer)
            tail = self._ids("</answer><|im_end|>")
            weight = 1.0 if exchange.is_caption else ANSWER_WEIGHT
            weights = [0.0] * len(asked) + [1.0] * len(lead) + [weight] * len(answer) + [1.0] * len(tail)
            layout.add_branch(asked + lead + answer + tail, weights)
        return layout

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def _collate(self, rows: list[list[_Layout]]) -> PackedLessons:
        num_rows, length = len(rows), max(sum(map(len, row)) for row in rows)
        ids = np.full((num_rows, length), self.tokenizer.pad_token_id)
        positions = np.zeros((3, num_rows, length), dtype=np.int64)
        lesson_of = np.full((num_rows, length), -1)  # -1 on padding
        branch_of = np.zeros((num_rows, length), dtype=np.int64)
        predict, weights, images = [], [], []
        for index, row in enumerate(rows):
            start = 0
            for number, layout in enumerate(row):
                here = slice(start, start + len(layout))
                ids[index, here] = layout.ids
                positions[:, index, here] = np.array(layout.positions).T
                lesson_of[index, here] = number
                branch_of[index, here] = layout.branches
                predict += [(index, start + column, target) for column, target in layout.predict]
                weights += layout.weights
                images += [] if layout.image is None else [layout.image]
                start += len(layout)
        return PackedLessons(
            input_ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            allowed=_allowed(torch.from_numpy(lesson_of), torch.from_numpy(branch_of)),
            pixel_values=patches(images),
            predict=torch.tensor(predict),
            weights=torch.tensor(weights),
        )


@dataclass
class _Layout:
    """The tokens of one lesson in a row; branch 0 is the shared prefix.

    The last token of a branch predicts nothing and has no place in the row.
    """

    image: Image.Image | None
    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, ...]] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    predict: list[tuple[int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add_prefix(self, ids: list[int], positions: list[tuple[int, ...]]) -> None:
        self.ids += ids
        self.positions += positions
        self.branches += [0] * len(ids)
        self.after_prefix = max(max(position) for position in positions) + 1

    def add_branch(self, ids: list[int], weights: list[float]) -> None:
        start, branch = len(self.ids), self.branches[-1] + 1
        inputs = ids[:-1]
        self.ids += inputs
        self.positions += [(self.after_prefix + step,) * 3 for step in range(len(inputs))]
        self.branches += [branch] * len(inputs)
        learned = [step for step, weight in enumerate(weights) if weight]
        self.predict += [(start + step - 1, ids[step]) for step in learned]
        self.weights += [weights[step] for step in learned]


def _picture_positions(num_before: int, side: int) -> list[tuple[int, ...]]:
    """M-RoPE of ``num_before`` text tokens, then a picture of ``side`` x ``side`` tokens between its two brackets."""
    text = [(position,) * 3 for position in range(num_before + 1)]
    origin = num_before + 1
    picture = [(origin, origin + row, origin + column) for row in range(side) for column in range(side)]
    return [*text, *picture, (origin + side,) * 3]


def _allowed(lesson_of: Tensor, branch_of: Tensor) -> Tensor:
    """``[R, 1, S, S]``: a token sees its lesson's prefix and its own branch up to itself; padding sees itself."""
    order = torch.arange(lesson_of.shape[1])
    earlier = order[:, None] >= order[None, :]
    same_lesson = (lesson_of[:, :, None] == lesson_of[:, None, :]) & (lesson_of[:, None, :] >= 0)
    same_branch = branch_of[:, :, None] == branch_of[:, None, :]
    seen = earlier & same_lesson & (same_branch | (branch_of[:, None, :] == 0))
    return (seen | (order[:, None] == order[None, :])).unsqueeze(1)


def patches(images: list[Image.Image]) -> Tensor:
    """``[num_images * 36, 1176]``: what Qwen's image processor gives for toy pictures, for all of them in one pass."""
    if not images:
        return torch.zeros(0, 3 * TEMPORAL * PATCH**2)
    side = GRID // MERGE
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255
    pixels = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)  # [N, 84, 84, 3]
    cut = pixels.view(-1, side, MERGE, PATCH, side, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return cut.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, TEMPORAL, -1, -1).reshape(len(pixels) * GRID**2, -1)
