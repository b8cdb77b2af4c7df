"""Which of several things no other beats in both respects."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(gains: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Places of those that nothing else gains as much as and loses less, or gains more than and loses no more.

    Args:
        gains: Of each, the more the better.
        losses: Of each, the less the better.

    Returns:
        By growing loss, and so by growing gain.

    >>> pareto_front(gains=[1.0, 3.0, 2.0, 0.5], losses=[1.0, 2.0, 3.0, 0.0])
    [3, 0, 1]
    """
    front: list[int] = []
    for place in sorted(range(len(gains)), key=lambda place: (losses[place], -gains[place])):
        if not front or gains[place] > gains[front[-1]]:
            front.append(place)
    return front
