"""One group of completions as pictures: the packed row, its positions, and what an update changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cpt_lightning.rollouts import PackedGroup

PROMPT, IMAGE = "#999999", "#e69f00"
COMPLETIONS = ("#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d00")
"""Colours that the colour-blind tell apart (Okabe and Ito), in turn."""
POSITION_MARKS = {"time": ("#bbbbbb", "o", 5), "height": ("#0072b2", "_", 6), "width": ("#d55e00", "|", 6)}
"""Colour, form and size: where all three are equal they make a target."""
LINE_CHARACTERS = 110
"""A completion of more goes on in the next line."""


def tree_mask(group: PackedGroup) -> Figure:
    """What each token of a packed group looks at: a row per token, coloured where it sees the token of the column.

    The prompt's text and its image have a colour each; in the other colours completions look at themselves.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.patches import Patch

    shown = torch.where(group.sees, 1 + _kinds(group), 0)
    figure = Figure(figsize=(6.4, 6), layout="constrained")
    axes = figure.subplots()
    colours = ListedColormap(["white", PROMPT, IMAGE, *COMPLETIONS])
    axes.imshow(shown.cpu().numpy(), cmap=colours, vmin=-0.5, vmax=colours.N - 0.5, interpolation="nearest")
    starts, centres, names = _segments(group)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="black", linewidth=0.4)
        axes.axvline(start - 0.5, color="black", linewidth=0.4)
    axes.set_xticks(centres, names)
    axes.set_yticks(centres, names)
    axes.tick_params(length=0)
    axes.set(xlabel="… looks at", ylabel="a token …")
    parts = {"text of the prompt": PROMPT, "image": IMAGE}
    axes.legend(handles=[Patch(color=colour, label=name) for name, colour in parts.items()], loc="upper right")
    return figure


def rope_positions(group: PackedGroup) -> Figure:
    """M-RoPE positions along a packed group: each image fans out in height and width, each completion starts anew."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for place in group.is_image.nonzero().flatten().tolist():
        axes.axvspan(place - 0.5, place + 0.5, color=IMAGE, alpha=0.25, linewidth=0)
    starts, centres, names = _segments(group)
    for (name, (colour, marker, size)), values in zip(
        POSITION_MARKS.items(), group.positions.cpu().numpy(), strict=True
    ):
        axes.plot(values, marker, markersize=size, color=colour, label=name, linestyle="none")
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="black", linewidth=0.4)
    axes.set_xticks(centres, names)
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel="position", xlim=(-1, len(group)))
    axes.legend(loc="upper left", fontsize=8)
    return figure


def token_changes(pieces: Sequence[Sequence[str]], changes: Tensor, titles: Sequence[str]) -> Figure:
    """Completions token by token, each in the colour of a change of its log-probability.

    Args:
        pieces: For each of N completions the text of each of its tokens.
        changes: ``[N, T]`` in nats; what stands behind a completion's end is not shown.
        titles: N, such as the reward.

    Raises:
        ValueError: A completion has more pieces than there are changes.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    if (longest := max(map(len, pieces))) > changes.shape[1]:
        raise ValueError(f"a completion of {longest} tokens, but changes of {changes.shape[1]}: give one per token")
    kept = [row[: len(words)] for row, words in zip(changes.detach().float().cpu(), pieces, strict=True)]
    largest = max(1e-6, *(float(row.abs().max()) for row in kept if len(row)))
    scale = ScalarMappable(Normalize(-largest, largest), "RdBu")
    lines = [_lines([_visible(piece) for piece in words]) for words in pieces]
    height = sum(map(len, lines))
    figure = Figure(figsize=(9, 0.9 + 0.24 * height), layout="constrained")
    axes = figure.subplots()
    y = 0
    for row, words, title in zip(kept, lines, titles, strict=True):
        axes.text(-1, y, title, ha="right", va="center", fontsize=8, parse_math=False)
        y = _write(axes, words, scale.to_rgba(row.numpy()).tolist(), y)
    axes.set(xlim=(0, max(sum(map(len, line)) for words in lines for line in words)), ylim=(height - 0.4, -0.6))
    axes.axis("off")
    figure.colorbar(scale, ax=axes, orientation="horizontal", fraction=0.04, aspect=60, label="change, nats")
    return figure


def _kinds(group: PackedGroup) -> Tensor:
    """``[R]`` 0 for the prompt's text, 1 for its image, 2 and on for the colours of completions."""
    own = 2 + (group.owners - 1) % len(COMPLETIONS)
    return torch.where(group.owners > 0, own, group.is_image.long())


def _segments(group: PackedGroup) -> tuple[list[int], list[float], list[str]]:
    """Where prompt and completions begin, where their middles are, and their names."""
    owners, counts = group.owners.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [end - count for end, count in zip(ends, counts.tolist(), strict=True)]
    centres = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    return starts, centres, [f"c{owner}" if owner else "prompt" for owner in owners.tolist()]


def _visible(piece: str) -> str:
    return piece.replace("\n", "⏎") or " "


def _lines(pieces: Sequence[str]) -> list[list[str]]:
    """The pieces of a completion, in lines."""
    lines: list[list[str]] = [[]]
    for piece in pieces:
        if lines[-1] and sum(map(len, lines[-1])) + len(piece) > LINE_CHARACTERS:
            lines.append([])
        lines[-1].append(piece)
    return lines


def _write(axes: Axes, lines: Sequence[Sequence[str]], colours: Sequence[tuple[float, ...]], y: int) -> int:
    """Writes the lines of a completion, from y on; gives the y behind them."""
    from matplotlib.patches import Rectangle

    number = 0
    for line in lines:
        x = 0
        for piece in line:
            colour = colours[number]
            axes.add_patch(Rectangle((x, y - 0.42), len(piece), 0.84, facecolor=colour, edgecolor="white"))
            light = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 0.5
            axes.text(
                x + len(piece) / 2, y, piece, ha="center", va="center", fontsize=7, family="monospace",
                color="black" if light else "white", parse_math=False,
            )  # fmt: skip
            x, number = x + len(piece), number + 1
        y += 1
    return y
