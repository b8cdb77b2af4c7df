"""Copies of what is trained: laid out over ranks like the parameters, and whole where a file is to hold them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cpt_lightning.models.sharding import backbones_of, like_shard, release

Weights = dict[str, Tensor]
"""A tensor for every trained parameter, by its name."""


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: of all the backbone or of its adapters; in shards where there are."""
    for backbone in backbones_of(module):
        release(backbone)
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def copy_of(module: nn.Module) -> Weights:
    """The trained weights as they are now."""
    return {name: parameter.detach().clone() for name, parameter in trained(module).items()}


def laid_out(weights: Mapping[str, Tensor], module: nn.Module) -> Weights:
    """Whole tensors, on the devices and with the layout of the parameters whose names they bear.

    Raises:
        ValueError: Other parameters are trained now.
    """
    parameters = trained(module)
    for name in sorted(parameters.keys() ^ weights.keys()):
        raise ValueError(f"{name!r} is trained {'now, but was not' if name in parameters else 'no more, but was'}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{name!r} had the shape {tuple(weights[name].shape)}, now {tuple(parameter.shape)}")
    return {name: like_shard(weights[name].to(parameter.device), parameter) for name, parameter in parameters.items()}
