"""Which rows: a part set aside for validation and test, or a few evenly spaced ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from cpt_lightning.tasks.rows import Split


def check_fractions(val_fraction: float, test_fraction: float = 0.0) -> None:
    """Refuses fractions that are none, or that leave nothing to train on.

    Raises:
        ValueError: As said.
    """
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} is {fraction}; give a part of 1, or 0 for none")
    if val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing of train")


def cut_by_group(
    groups: Sequence[Hashable], val_fraction: float, test_fraction: float = 0.0, seed: int = 0
) -> dict[Split, np.ndarray]:
    """Indices of the rows of each split, in order; rows of one group (of one picture, say) stay together.

    Args:
        groups: The group of every row.
        val_fraction: Part of the groups to set aside for validation.
        test_fraction: Part of the groups to set aside for test; the same ones whatever ``val_fraction`` is.
        seed: Draws the groups.

    Raises:
        ValueError: There are too few groups to give each split one.
    """
    if (val_fraction or test_fraction) and not groups:
        raise ValueError("there are no rows of which any could be set aside for validation or test")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    num_test, num_val = (round(part * len(numbers)) for part in (test_fraction, val_fraction))
    for name, fraction, count in (("val", val_fraction, num_val), ("test", test_fraction, num_test)):
        if fraction and not count:
            raise ValueError(f"{name}_fraction {fraction} of {len(numbers)} images or groups is none; raise it")
    if groups and num_test + num_val >= len(numbers):
        raise ValueError(f"val_fraction and test_fraction leave none of {len(numbers)} images or groups to train on")
    order = np.random.default_rng(seed).permutation(len(numbers))
    split_of_group = np.full(len(numbers), "train", dtype="<U5")
    split_of_group[order[:num_test]] = "test"
    split_of_group[order[num_test : num_test + num_val]] = "val"
    split_of_row = split_of_group[[numbers[group] for group in groups]]
    return {split: np.flatnonzero(split_of_row == split) for split in ("train", "val", "test")}


def spaced(num_rows: int, num_wanted: int | None) -> list[int]:
    """Indices of evenly spaced rows, the first and the last among them.

    >>> spaced(10, 4), spaced(3, None)
    ([0, 3, 6, 9], [0, 1, 2])
    """
    count = num_rows if num_wanted is None else min(num_rows, num_wanted)
    return np.linspace(0, num_rows - 1, count).round().astype(int).tolist()
