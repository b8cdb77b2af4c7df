"""``--trainer.strategy fsdp2``: weights, gradients and optimizer spread over all ranks (ZeRO), by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from cpt_lightning.models.sharding import (
    backbones_of,
    exchange_gradients,
    gather,
    is_sharded,
    like_shard,
    like_shards,
    release,
    shard,
    whole,
)

COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": None, "32-true": None}
"""What weights are gathered in, by the Trainer's precision; ``None`` is what they are kept in."""


class FSDP2(ModelParallelStrategy):
    """Every rank keeps a share of weights, gradients and optimizer, and holds the whole weights only while it computes.

    Shares go over all ranks of all nodes. A training step gathers the weights once and exchanges gradients once per
    optimizer step; a rollout or an evaluation gathers once, and decodes without waiting for other ranks.

    Args:
        cpu_offload: Keep the shares in main memory; the optimizer steps there.
        **kwargs: ``process_group_backend`` and ``timeout`` of Lightning's ``ModelParallelStrategy``.
    """

    def __init__(self, cpu_offload: bool = False, **kwargs: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **kwargs)
        self.cpu_offload = cpu_offload
        self._exchange_is_blocked = False

    @property
    def receives_weights(self) -> bool:
        """Whether this rank gets its share from rank 0, and so need not read the checkpoint."""
        return self.global_rank > 0

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizers' state over, as it does to any strategy with one file."""
        return True

    # -- set-up --------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Joins the other ranks; all of them, on every node, share the data."""
        # Lightning's "auto" would spread weights over a node and data over nodes.
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Spreads every backbone over the ranks before there is an optimizer.

        Raises:
            ValueError: A precision that this strategy does not have.
        """
        precision = self.precision_plugin.precision
        if precision not in COMPUTE_DTYPES:
            raise ValueError(f"trainer.precision={precision}: strategy fsdp2 has {', '.join(COMPUTE_DTYPES)}")
        assert self.lightning_module is not None
        self.precision_plugin.convert_module(self.lightning_module)  # in place
        for backbone in backbones_of(self.lightning_module):
            if not is_sharded(backbone):
                mesh = self.device_mesh["data_parallel"]
                shard(backbone, mesh, COMPUTE_DTYPES[precision], self.cpu_offload)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Moves what is not sharded; shards are where they belong."""
        if not self.cpu_offload:
            super().model_to_device()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Makes optimizers over the shards."""
        self._release()
        super().setup_optimizers(trainer)

    # -- steps ---------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step on the whole weights."""
        self._gather()
        output = super().training_step(*args, **kwargs)
        if not self.lightning_module.automatic_optimization:
            self._release()
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step on the whole weights, which stay for the next one."""
        self._gather()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step on the whole weights, which stay for the next one."""
        self._gather()
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step on the whole weights, which stay for the next one."""
        self._gather()
        return super().predict_step(*args, **kwargs)

    def on_validation_end(self) -> None:
        """Evaluated: what goes on works on shards."""
        self._release()

    def on_test_end(self) -> None:
        """Evaluated: what goes on works on shards."""
        self._release()

    def on_predict_end(self) -> None:
        """Evaluated: what goes on works on shards."""
        self._release()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Exchanges gradients, unless more micro-batches come before the optimizer's step."""
        if not self._exchange_is_blocked:
            exchange_gradients(self.lightning_module.model)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients of the backward passes within stay on their rank, and are added up."""
        self._exchange_is_blocked = True
        try:
            yield
        finally:
            self._exchange_is_blocked = False

    def _gather(self) -> None:
        gather(self.lightning_module.model)

    def _release(self) -> None:
        release(self.lightning_module.model)

    # -- checkpoints: one file, as from a single process -----------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights, on rank 0 in main memory; every rank must ask."""
        self._release()
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimizer, on rank 0 in main memory; every rank must ask."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state = optimizer.state_dict()
        return {**state, "state": {number: self._whole(part) for number, part in state["state"].items()}}

    def _whole(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        kept = {}
        for name, value in tensors.items():
            value = whole(value)  # one at a time, so that no rank holds all of them
            if self.is_global_zero:
                kept[name] = value.cpu() if isinstance(value, Tensor) else value
        return kept

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, as any strategy loads it: every rank takes its share from the one file."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes this rank's share of the weights."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(like_shards(checkpoint["state_dict"], self.lightning_module), strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's share of the optimizers' state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {
                number: {
                    name: like_shard(value, parameters[number])
                    if isinstance(value, Tensor) and value.shape == parameters[number].shape
                    else value
                    for name, value in part.items()
                }
                for number, part in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})


StrategyRegistry.register("fsdp2", FSDP2, description="Weights, gradients and optimizer spread over all ranks (FSDP2)")
StrategyRegistry.register("fsdp2_offload", FSDP2, description="The same, kept in main memory", cpu_offload=True)
