"""What a completion loses for its length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OverlongPenalty:
    """The soft over-long punishment of DAPO (arXiv 2503.14476, eq. 13): 0 for short completions, down to -1.

    Args:
        max_tokens: Length at which the full penalty is reached, usually ``sampling.max_new_tokens``.
        margin: Tokens before that over which it grows, from 0 at ``max_tokens - margin``; 0 punishes only what is
            longer than ``max_tokens``.

    Raises:
        ValueError: A length below 1, or a margin outside [0, max_tokens].

    >>> [OverlongPenalty(max_tokens=100, margin=20)(length) for length in (80, 85, 100, 101)]
    [0.0, -0.25, -1.0, -1.0]
    """

    max_tokens: int
    margin: int

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; give at least 1")
        if not 0 <= self.margin <= self.max_tokens:
            raise ValueError(f"margin is {self.margin}; give a number of tokens from 0 to max_tokens={self.max_tokens}")

    def __call__(self, num_tokens: int) -> float:
        """The penalty, in [-1, 0], of a completion of ``num_tokens`` tokens."""
        excess = num_tokens - (self.max_tokens - self.margin)
        if excess <= 0:
            return 0.0
        return -min(1.0, excess / self.margin) if self.margin else -1.0
