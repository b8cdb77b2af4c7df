"""Ranks of known matrices, and weights next to each other in bfloat16."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.functional import effective_rank, num_changed


def test_the_effective_rank_of_known_singular_values():
    """Shares 1/2, 1/4, 1/4 of 4: H = (1/2 + 1/2 + 1/2) log 2 nats, so 2^1.5; turned by any two rotations."""
    values = torch.zeros(5, 3)
    values[range(3), range(3)] = torch.tensor([2.0, 1.0, 1.0])
    left, right = (torch.linalg.qr(torch.randn(size, size))[0] for size in (5, 3))
    assert effective_rank(left @ values @ right) == pytest.approx(2**1.5, rel=1e-5)
    assert effective_rank(1e-12 * left @ values @ right) == pytest.approx(2**1.5, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 4])
def test_equal_singular_values_count_and_zeros_do_not(rank):
    basis = torch.linalg.qr(torch.randn(8, rank))[0]
    assert effective_rank(3 * basis @ basis.T) == pytest.approx(rank, rel=1e-3)
    assert effective_rank(torch.zeros(8, 8)) == 0


def test_a_weight_counts_when_bfloat16_tells_its_values_apart():
    """Between 1 and 2 bfloat16 has steps of 2^-7, rounded at half a step; a step is as large as the weight."""
    before = torch.tensor([[1.0, 1.0, 128.0], [0.0, -1.0, 1.0]])
    by = torch.tensor([[2**-7, 2**-9, 2**-7], [1e-30, 0.0, 2**-8 + 2**-12]])
    assert num_changed(before, before + by) == 3
