"""Where tokens stand in a packed row, worked out by hand, and that each sees what a dense mask would let it see."""

from __future__ import annotations

import torch

from cpt_lightning.models.attention import DenseMask
from cpt_lightning.rollouts.layout import PackedGroups
from cpt_lightning.types import Prompts

TWO_PROMPTS = Prompts(torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]]), [0, 0])


def test_the_layout_of_two_hand_packed_groups():
    """Prompts of 2 and 3 tokens, completions of 3 and 1, then 1 and 2 tokens.

    The last token of each completion has no place, so the row is: p0 p1 a0 a1 | q0 q1 q2 d0. b0 is predicted by p1,
    a0 by p1, a1 by a0, a2 by a1; c0 and d0 by q2, d1 by d0. The first prompt ends at position 7, the second at 2.
    """
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0]]).bool()
    layout = PackedGroups.of(TWO_PROMPTS, mask)
    assert len(layout) == 8
    assert layout.prompt_places.tolist() == [0, 1, 4, 5, 6]
    assert layout.input_places.tolist() == [2, 3, 7]
    assert layout.sources.tolist() == [1, 2, 3, 1, 6, 6, 7]
    assert layout.is_input.tolist() == [True, True, False, False, False, True, False]
    assert layout.prompt_ends.tolist() == [1, 6]
    tokens = torch.tensor([10, 11, 12, 20, 30, 40, 41])
    assert layout.token_ids(TWO_PROMPTS, tokens).tolist() == [[5, 6, 10, 11, 7, 8, 9, 40]]
    positions = layout.positions(torch.tensor([[0, 6, 7], [0, 1, 2]]).expand(3, 2, 3))
    assert positions[:, 0].tolist() == [[6, 7, 8, 9, 0, 1, 2, 3]] * 3


def test_prompts_alone_are_a_layout_too():
    layout = PackedGroups.of(TWO_PROMPTS)
    assert layout.token_ids(TWO_PROMPTS).tolist() == [[5, 6, 7, 8, 9]]
    assert layout.prompt_ends.tolist() == [1, 4]


def dense(layout: PackedGroups, group_size: int) -> torch.Tensor:
    """``[1, 1, L, L]``: the tree mask written down token by token."""
    names = []
    for group, (prompt, completions) in enumerate(zip(layout.prompt_mask.sum(dim=1).tolist(), layout.inputs.tolist())):
        names += [(group, None)] * prompt
        for member, length in enumerate(completions):
            names += [(group, member)] * length
    allowed = [
        [
            column <= row and mine[0] == other[0] and other[1] in (None, mine[1])
            for column, other in enumerate(names)
        ]
        for row, mine in enumerate(names)
    ]
    return torch.tensor(allowed)[None, None]


def test_attention_is_that_of_a_dense_tree_mask():
    """Groups of ragged, equal, and no lengths at all; 4 query heads share 2 key heads."""
    lengths = {
        "ragged": [[4, 1, 6], [2, 2, 5]],
        "equal": [[3, 3, 3], [3, 3, 3]],
        "some without inputs": [[1, 1, 1], [1, 4, 1]],
        "single": [[5], [2]],
    }
    for name, rows in lengths.items():
        mask = torch.arange(6) < torch.tensor(rows).flatten()[:, None]
        layout = PackedGroups.of(TWO_PROMPTS, mask)
        query = torch.randn(1, 4, len(layout), 8)
        key, value = torch.randn(2, 1, 2, len(layout), 8)
        expected = DenseMask(dense(layout, len(rows[0]))).attend(0, query, key, value)
        torch.testing.assert_close(layout.attend(0, query, key, value), expected, msg=name)
