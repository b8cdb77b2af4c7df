"""Fingerprints tell weights apart, however large."""

import torch
from torch import nn

from cpt_lightning.models.fingerprint import frozen_fingerprint, model_fingerprint


class Weights(nn.Module):
    """A layer, and a table of as many numbers as the 7B model's embeddings, which are one number in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.table = nn.Parameter(torch.zeros(1).expand(152064 * 3584), requires_grad=False)


def test_each_weight_counts_and_only_the_frozen_ones_where_they_are_asked_for():
    weights = Weights()
    whole, frozen = model_fingerprint(weights), frozen_fingerprint(weights)
    assert (model_fingerprint(weights), frozen_fingerprint(weights)) == (whole, frozen)
    with torch.no_grad():
        weights.layer.weight[1, 2] += 1e-6
    assert model_fingerprint(weights) != whole and frozen_fingerprint(weights) == frozen
    weights.table.data = torch.ones(1).expand(152064 * 3584)
    assert frozen_fingerprint(weights) != frozen


def test_weights_that_are_not_there_have_no_fingerprint_of_their_own():
    with torch.device("meta"):
        weights = nn.Linear(3, 2).requires_grad_(False)
    assert frozen_fingerprint(weights) is None
