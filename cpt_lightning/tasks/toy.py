"""The toy world: small procedural tasks with pictures drawn on demand, on which a CPU shows continual post-training.

Families about scenes of coloured shapes: ``colour``, ``count``, ``existence``, ``relation``; about one subject:
``bars``, ``digit``, ``word``, ``polygon``, ``single``; without a picture: ``arithmetic``, ``facts``. The shifted
versions ``bars2``, ``digit2``, ``word2``, ``polygon2`` ask the same about harder pictures. ``jigsaw`` is new to the
embedded base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from cpt_lightning.tasks.rows import LazySequence, Row, Source, Split
from cpt_lightning.tasks.toy_drawings import DRAWERS
from cpt_lightning.tasks.toy_scenes import ASKERS, draw_scene, make_scene
from cpt_lightning.tasks.toy_text import TEXT_ASKERS, reason_like_a_teacher, think

FAMILIES = (*ASKERS, *DRAWERS, *TEXT_ASKERS)


class ToyWorld(Source):
    """One family of the toy world: a data set of any size that is drawn, row by row, when it is read.

    A row depends on family, seed, split and index alone. Splits never share a picture: each has its own random stream,
    noise on every pixel included, and handwritten digits and arithmetic problems of its own. Each question comes in two
    wordings and holds no instruction. Fields for a task's target template: ``thought``, a short phrase in the style of
    the embedded base; ``teacher``, a long reasoning in a foreign style; of scenes also ``caption``.

    Args:
        family: What is asked; see the module's list.
        seed: Draws another world of the same kind.
        num_train: Rows of the training split.
        num_val: Rows of the validation split.
        num_test: Rows of the test split.

    Raises:
        ValueError: If the family is unknown or a size is negative.
    """

    def __init__(
        self, family: str, seed: int = 0, num_train: int = 4000, num_val: int = 500, num_test: int = 500
    ) -> None:
        if family not in FAMILIES:
            raise ValueError(f"unknown toy family {family!r}; choose one of {', '.join(FAMILIES)}")
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        for split, size in self.sizes.items():
            if size < 0:
                raise ValueError(f"num_{split} must not be negative, got {size}")
        self.family = family
        self.seed = seed

    def split(self, split: Split) -> Sequence[Row]:
        """The rows of ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            ValueError: If there is no such split.
        """
        if split not in self.sizes:
            raise ValueError(f"toy family {self.family!r} has no split {split!r}; it has {', '.join(self.sizes)}")
        return toy_rows(self.family, self.seed, split, self.sizes[split])


def toy_rows(family: str, seed: int, split: str, num_rows: int) -> LazySequence[Row]:
    """Rows of one family and split, drawn on access; of the split ``"pretrain"`` the embedded base is made."""

    def draw(index: int) -> Row:
        row = draw_row(family, keyed_rng(family, seed, split, index), split)
        row.row_id = f"toy/{family}/{split}/{index}"
        return row

    return LazySequence(num_rows, draw)


def draw_row(family: str, rng: Generator, split: str) -> Row:
    """One question of a family with its picture, answer, and the two phrases a target may put before the answer."""
    fields: dict[str, str] = {}
    if family in ASKERS:
        while True:  # a scene without a unique shape or pair has no answer to give: draw another
            scene = make_scene(rng)
            asked = ASKERS[family](scene, rng)
            if asked is not None:
                break
        question, answer = asked
        images = [draw_scene(scene, rng)]
        fields["caption"] = scene.caption
    elif family in DRAWERS:
        image, question, answer = DRAWERS[family](rng, split)
        images = [image]
    else:
        question, answer = TEXT_ASKERS[family](rng, split)
        images = []
    fields |= {"thought": think(rng), "teacher": reason_like_a_teacher(rng)}
    return Row(row_id=f"toy/{family}/{split}", question=question, answer=answer, images=images, fields=fields)


def keyed_rng(*key: object) -> Generator:
    """A random generator that depends on the key alone, the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
