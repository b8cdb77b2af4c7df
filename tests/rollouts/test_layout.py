"""What a token in a row looks at: what a dense mask, written down token by token, would let it see."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.models.attention import DenseMask
from cpt_lightning.rollouts import layout
from cpt_lightning.rollouts.layout import CausalRow, GroupBranches
from cpt_lightning.types import PromptState
from tests.pretend_gpu import pretended_gpu

PROMPT_LENGTHS = [2, 3]


def heads(length: int, count: int) -> torch.Tensor:
    return torch.randn(1, count, length, 8)


def test_a_causal_row_is_block_diagonal_and_wants_the_ends():
    """Sequences of 3, 1 and 4 tokens, of which the last 2, 1 and 3 are wanted: places 1 2 | 3 | 5 6 7."""
    row = CausalRow([3, 1, 4], [2, 1, 3], torch.device("cpu"))
    assert row.wanted.tolist() == [1, 2, 3, 5, 6, 7]
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    allowed = (owner[:, None] == owner[None, :]) & torch.ones(8, 8, dtype=torch.bool).tril()
    query, key, value = heads(8, 4), heads(8, 2), heads(8, 2)
    expected = DenseMask(allowed[None, None]).attend(0, query, key, value)
    torch.testing.assert_close(row.attend(0, query, key, value), expected)
    torch.testing.assert_close(row.attend(0, query[:, :, row.wanted], key, value), expected[:, :, row.wanted])


@pytest.mark.parametrize(
    "lengths, calls", [([9, 2, 10, 5, 8, 4], 3), ([6, 6, 6], 1), ([7], 1)], ids=["10 9 8 | 5 4 | 2", "equal", "one"]
)
def test_a_gpu_attends_to_sequences_of_about_one_length_in_one_call(lengths, calls, monkeypatch):
    """And outputs and gradients are those of sequence by sequence."""
    query, key, value = (heads(sum(lengths), count).requires_grad_() for count in (4, 2, 2))
    upstream = heads(sum(lengths), 4)

    def attended(device: str) -> list[torch.Tensor]:
        row = CausalRow(lengths, [1] * len(lengths), torch.device(device))
        output = row.attend(0, *(each.to(device) for each in (query, key, value)))
        return [each.cpu() for each in (output, *torch.autograd.grad(output, (query, key, value), upstream.to(device)))]

    expected, called = attended("cpu"), []
    attend = layout.causal_attention
    monkeypatch.setattr(layout, "causal_attention", lambda *rows: called.append(rows) or attend(*rows))
    with pretended_gpu():
        torch.testing.assert_close(attended("cuda"), expected)
    assert len(called) == calls


def test_where_the_tokens_of_two_groups_stand():
    """Completions of 3 and 1, then 1 and 2 tokens: a0 a1 a2, b0, c0, d0 d1. The last of each has no place: a0 a1 d0.

    a0 and b0 are predicted by the first prompt (0), c0 and d0 by the second (1); a1 by a0, which comes first in the row
    (2), a2 by a1 (3), d1 by d0 (4). The prompts' next positions are 8 and 3.
    """
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0]]).bool()
    state = PromptState([], [], torch.zeros(2, 1), next_position=torch.tensor([8, 3]))
    branches = GroupBranches(state, torch.tensor(PROMPT_LENGTHS), mask)
    assert branches.is_input.tolist() == [True, True, False, False, False, True, False]
    assert branches.sources.tolist() == [0, 2, 3, 0, 1, 1, 4]
    assert branches.positions.tolist() == [[[8, 9, 3]]] * 3


@pytest.mark.parametrize(
    "lengths",
    [[[4, 1, 6], [2, 2, 5]], [[3, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 4, 1]], [[5], [2]]],
    ids=["ragged", "equal", "a group without inputs", "single"],
)
def test_branches_see_their_prompt_and_themselves(lengths: list[list[int]]):
    """The same attention over one row of prompts and completions under a dense tree mask; 4 heads share 2 key heads."""
    names = [(group, None) for group, length in enumerate(PROMPT_LENGTHS) for _ in range(length)]
    for group, members in enumerate(lengths):
        names += [(group, member) for member, length in enumerate(members) for _ in range(length - 1)]
    allowed = torch.tensor(
        [
            [
                column <= row and mine[0] == other[0] and other[1] in (None, mine[1])
                for column, other in enumerate(names)
            ]
            for row, mine in enumerate(names)
        ]
    )
    query, key, value = heads(len(names), 4), heads(len(names), 2), heads(len(names), 2)
    expected = DenseMask(allowed[None, None]).attend(0, query, key, value)[:, :, 5:]

    def padded(row: torch.Tensor) -> torch.Tensor:
        """``[2, 2, 3, 8]``: the shorter prompt has one column of padding on its left."""
        return torch.stack([torch.cat([row[0, :, :1] * 99, row[0, :, :2]], dim=1), row[0, :, 2:5]])

    state = PromptState([padded(key)], [padded(value)], torch.zeros(2, 1), torch.tensor([2, 3]))
    mask = torch.arange(6) < torch.tensor(lengths).flatten()[:, None]
    branches = GroupBranches(state, torch.tensor(PROMPT_LENGTHS), mask)
    found = branches.attend(0, query[:, :, 5:], key[:, :, 5:], value[:, :, 5:])
    torch.testing.assert_close(found, expected)
