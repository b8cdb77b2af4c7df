"""A group of completions, drawn."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.pictures import rope_positions, token_changes, tree_mask
from cpt_lightning.rollouts import PackedGroup


@pytest.fixture
def group() -> PackedGroup:
    """A prompt of three tokens, the second of which is an image, and two completions of two tokens and one."""
    sees = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
                         [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]).bool()  # fmt: skip
    return PackedGroup(
        ids=torch.arange(6),
        owners=torch.tensor([0, 0, 0, 1, 1, 2]),
        is_image=torch.tensor([0, 1, 0, 0, 0, 0]).bool(),
        positions=torch.tensor([[0, 1, 2, 3, 4, 3], [0, 5, 2, 3, 4, 3], [0, 1, 2, 3, 4, 3]]),
        sees=sees,
    )


def test_the_mask_is_coloured_by_what_is_seen(group):
    """0 unseen, 1 text of the prompt, 2 image, 3 and 4 the two completions."""
    (axes,) = tree_mask(group).axes
    assert axes.images[0].get_array().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 2, 0, 0, 0, 0],
        [1, 2, 1, 0, 0, 0],
        [1, 2, 1, 3, 0, 0],
        [1, 2, 1, 3, 3, 0],
        [1, 2, 1, 0, 0, 4],
    ]
    labels = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert [(place, label.get_text()) for place, label in labels] == [(1, "prompt"), (3.5, "c1"), (5, "c2")]


def test_more_completions_than_colours_begin_again_with_the_first(group):
    group.owners = torch.tensor([0, 0, 0, 1, 1, 7])
    assert tree_mask(group).axes[0].images[0].get_array()[5, 5] == 3


def test_positions_are_drawn_in_their_places(group):
    (axes,) = rope_positions(group).axes
    values = {line.get_label(): list(line.get_ydata()) for line in axes.lines[:3]}
    assert values == {"time": [0, 1, 2, 3, 4, 3], "height": [0, 5, 2, 3, 4, 3], "width": [0, 1, 2, 3, 4, 3]}


def boxes_of(figure) -> list[tuple[tuple[float, ...], float]]:
    return [(box.get_xy(), box.get_width()) for box in figure.axes[0].patches]


def test_a_token_is_a_box_as_wide_as_its_text_in_the_colour_of_its_change():
    changes = torch.tensor([[-0.5, 0.5, 9.0], [0.0, 0.25, -0.25]])
    figure = token_changes([["ab", "\n"], ["x", "$y$", ""]], changes, ["right", "wrong"])
    widths = [width for _, width in boxes_of(figure)]
    assert widths == [2, 1, 1, 3, 1]
    red, blue, white, light_blue, light_red = (box.get_facecolor() for box in figure.axes[0].patches)
    assert red[0] > light_red[0] - 0.6 > red[2]
    assert blue[2] > blue[0]
    assert light_blue[2] > light_blue[0]
    assert min(white[:3]) > 0.95
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["right", "ab", "⏎", "wrong", "x", "$y$", " "]
    figure.canvas.draw()  # what looks like a formula is no formula


def test_the_scale_ends_at_the_largest_change_of_a_token_that_is_shown():
    figure = token_changes([["a"], ["b", "c"]], torch.tensor([[0.1, 9.0], [-0.4, 0.2]]), ["", ""])
    assert figure.axes[1].get_xlim() == pytest.approx((-0.4, 0.4))


def test_a_long_completion_goes_on_in_the_next_line():
    figure = token_changes([["a" * 60, "b" * 60], ["c"]], torch.zeros(2, 2), ["", ""])
    assert [round(y + 0.42) for (_, y), _ in boxes_of(figure)] == [0, 1, 2]


def test_changes_that_are_too_few_are_refused():
    with pytest.raises(ValueError, match="a completion of 2 tokens, but changes of 1"):
        token_changes([["a", "b"]], torch.zeros(1, 1), [""])
