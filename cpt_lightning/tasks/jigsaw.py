"""Jigsaw puzzles: a picture is cut into pieces and shuffled; the answer is the order that restores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from cpt_lightning.tasks.images import load_image
from cpt_lightning.tasks.rows import SPLITS, LazySequence, Row, Source, Split, check_split
from cpt_lightning.tasks.splits import check_fractions, cut_by_group

Convention = Literal["source", "target"]
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

_QUESTION = (
    "The picture was cut into {rows} x {cols} pieces of equal size, which were then shuffled. Positions are numbered "
    "from 1 to {count}, row by row from the top left. {wanted} Give the {count} numbers, separated by commas."
)
_WANTED = {
    "source": "For each position of the shuffled picture, in order, say where its piece was in the original.",
    "target": "For each position of the original, in order, say where its piece is in the shuffled picture.",
}


def shuffle_order(num_pieces: int, key: Sequence[int]) -> np.ndarray:
    """A random order of the pieces that is not the original one: shown position ``i`` holds piece ``order[i]``.

    Args:
        num_pieces: At least 2.
        key: Whole numbers from which alone the order follows.
    """
    generator = np.random.default_rng(list(key))
    while True:
        order = generator.permutation(num_pieces)
        if (order != np.arange(num_pieces)).any():
            return order


def answer_indices(order: np.ndarray, convention: Convention) -> list[int]:
    """The right answer, positions counted from 1.

    ``"source"``: for each shown piece its position in the original, ``order`` itself. ``"target"``: for each piece of
    the original its position in the shuffled picture, the inverse permutation. Public code has both.

    >>> answer_indices(np.array([2, 0, 1]), "source"), answer_indices(np.array([2, 0, 1]), "target")
    ([3, 1, 2], [2, 3, 1])
    """
    return ((order if convention == "source" else np.argsort(order)) + 1).tolist()


def shuffle_pieces(image: Image.Image, order: np.ndarray, rows: int, cols: int) -> Image.Image:
    """The picture with piece ``order[i]`` shown at position ``i``; what is over to the right and below is cropped."""
    width, height = image.width // cols, image.height // rows
    shuffled = Image.new(image.mode, (width * cols, height * rows))
    for shown, piece in enumerate(order.tolist()):
        left, top = piece % cols * width, piece // cols * height
        box = image.crop((left, top, left + width, top + height))
        shuffled.paste(box, (shown % cols * width, shown // cols * height))
    return shuffled


@dataclass
class Jigsaw(Source):
    """Jigsaw puzzles from any folder of pictures (arXiv 2506.23508: 3 x 3 on COCO).

    The answer is a list of positions, ``"3, 1, 4, 2"``, for the reward kinds ``permutation`` and ``permutation_hits``.
    A puzzle depends on seed, split and index alone and is never in the right order already.

    Args:
        folder: Folder with the pictures, searched with its sub-folders; their order is that of the sorted paths.
        num_rows: Pieces from top to bottom.
        num_cols: Pieces from left to right.
        convention: ``source``: the answer gives for each shown piece its position in the original; ``target``: for each
            piece of the original its position in the shuffled picture.
        val_fraction: Part of the pictures for validation.
        test_fraction: Part of the pictures for test.
        seed: Draws the split and the puzzles.

    Raises:
        ValueError: The folder is missing or has no pictures, fewer than two pieces, or a bad fraction.
    """

    folder: str
    num_rows: int = 3
    num_cols: int = 3
    convention: Convention = "source"
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_rows, self.num_cols) < 1 or self.num_rows * self.num_cols < 2:
            raise ValueError(f"a jigsaw of {self.num_rows} x {self.num_cols} pieces cannot be shuffled; give 2 or more")
        if self.convention not in get_args(Convention):
            raise ValueError(f"convention {self.convention!r} is unknown; there are {', '.join(get_args(Convention))}")
        if not Path(self.folder).expanduser().is_dir():
            raise ValueError(f"folder {self.folder!r} does not exist (relative paths start at {Path.cwd()})")
        check_fractions(self.val_fraction, self.test_fraction)

    def split(self, split: Split) -> Sequence[Row]:
        """The puzzles of a split, one for each of its pictures, cut when it is shown."""
        check_split(split)
        indices = self._cut[split].tolist()
        if not indices:
            raise ValueError(f"no {split} split; set {split}_fraction to set pictures aside")
        return LazySequence(len(indices), partial(self._row, split, indices))

    @cached_property
    def _pictures(self) -> list[Path]:
        root = Path(self.folder).expanduser()
        pictures = sorted(path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not pictures:
            raise ValueError(f"folder {self.folder!r} has no pictures ({', '.join(sorted(SUFFIXES))})")
        return pictures

    @cached_property
    def _cut(self) -> dict[Split, np.ndarray]:
        return cut_by_group(self._pictures, self.val_fraction, self.test_fraction, self.seed)

    def _row(self, split: Split, indices: list[int], index: int) -> Row:
        picture = self._pictures[indices[index]]
        count = self.num_rows * self.num_cols
        order = shuffle_order(count, (self.seed, SPLITS.index(split), index))
        question = _QUESTION.format(
            rows=self.num_rows, cols=self.num_cols, count=count, wanted=_WANTED[self.convention]
        )
        answer = ", ".join(map(str, answer_indices(order, self.convention)))
        shuffled = partial(self._shuffled, Path(self.folder).expanduser() / picture, order)
        return Row(f"{self.folder}/{picture.as_posix()}", question, answer, [shuffled])

    def _shuffled(self, picture: Path, order: np.ndarray) -> Image.Image:
        return shuffle_pieces(load_image(picture), order, self.num_rows, self.num_cols)
