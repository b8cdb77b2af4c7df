"""``--trainer.strategy fsdp2``: weights, gradients and optimizer spread over all ranks (ZeRO), by FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cpt_lightning.checkpoint_files import standing
from cpt_lightning.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from cpt_lightning.models import Backbone
from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.models.sharding import (
    all_whole,
    backbones_of,
    exchange_block_by_block,
    exchange_gradients,
    gather,
    is_sharded,
    like_shard,
    like_shards,
    release,
    shard,
    sharded_left_out,
)
from cpt_lightning.sharded_checkpoints import PARTS, Place, fill, save_shards

COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": None, "32-true": None}
"""What weights are gathered in, by the Trainer's precision; ``None`` is what they are kept in."""


class FSDP2(ModelParallelStrategy):
    """Every rank keeps a share of weights, gradients and optimizer, and holds the whole weights only while it computes.

    Shares go over all ranks of all nodes. An optimizer step's passes gather the weights once; a rollout or an
    evaluation gathers once, and decodes without waiting for other ranks. Of the gradients a rank holds its share, and
    for a moment those of a decoder layer; where an update goes back through the rollout's own pass, in which ranks may
    differ (``RFT`` with one update per rollout and no micro-batches), it holds all of them until they are exchanged.

    Args:
        cpu_offload: Keep the shares in main memory; the optimizer steps there.
        save_distributed_checkpoint: Let every rank write its shares, into a folder that all nodes see, in place of
            one file for which rank 0 gathers them. Either is gone on from with any strategy and number of ranks.
        **kwargs: ``process_group_backend`` and ``timeout`` of Lightning's ``ModelParallelStrategy``.
    """

    def __init__(self, cpu_offload: bool = False, save_distributed_checkpoint: bool = False, **kwargs: Any) -> None:
        if cpu_offload and torch.cuda.is_available():  # shards are exchanged in main memory, whole weights on GPUs
            kwargs.setdefault("process_group_backend", "cpu:gloo,cuda:nccl")
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)
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
            ValueError: A precision that this strategy does not have, or a plugin that would write no shards.
        """
        precision = self.precision_plugin.precision
        if precision not in COMPUTE_DTYPES:
            raise ValueError(f"trainer.precision={precision}: strategy fsdp2 has {', '.join(COMPUTE_DTYPES)}")
        if self._save_distributed_checkpoint and type(self.checkpoint_io) not in (
            TorchCheckpointIO,
            AtomicCheckpointIO,
        ):
            raise ValueError(
                f"trainer.plugins has a {type(self.checkpoint_io).__name__}, which save_distributed_checkpoint would "
                "not use: leave one of them out"
            )
        assert self.lightning_module is not None
        self.precision_plugin.convert_module(self.lightning_module)  # in place
        for backbone in backbones_of(self.lightning_module):
            if not is_sharded(backbone):
                self.spread(backbone)
        exchange_block_by_block(self.lightning_module.model, self.lightning_module.ranks_go_back_alike)
        super().setup(trainer)

    def spread(self, backbone: QwenVL) -> None:
        """Spreads a backbone over the ranks, in place; rank 0 has its weights."""
        dtype = COMPUTE_DTYPES[self.precision_plugin.precision]
        shard(backbone, self.device_mesh["data_parallel"], dtype, self.cpu_offload)

    def model_to_device(self) -> None:
        """Moves what is not sharded; shards are where they belong."""
        assert self.lightning_module is not None
        with sharded_left_out(self.lightning_module) if self.cpu_offload else nullcontext():
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

    # -- checkpoints: one file, as from a single process, or a folder of shards -------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights: whole, on rank 0 in main memory, or this rank's shards; every rank must ask."""
        self._release()
        assert self.lightning_module is not None
        return self._as_saved(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer: whole, on rank 0 in main memory, or this rank's shards; every rank must ask."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state = optimizer.state_dict()
        return {**state, "state": {number: self._as_saved(part) for number, part in state["state"].items()}}

    def _as_saved(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return dict(tensors) if self._save_distributed_checkpoint else all_whole(tensors, keep=self.is_global_zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Saves one file from rank 0, or a folder to which all ranks write.

        Raises:
            ValueError: A folder of shards is to be written elsewhere than in a file system.
        """
        if not self._save_distributed_checkpoint:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        path = self.broadcast(str(filepath))
        if storage_options is not None or "://" in path:
            raise ValueError(
                f"{path}: shards are written to folders only; leave save_distributed_checkpoint out, or mount it"
            )
        save_shards(checkpoint, Path(path))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, whichever strategy saved it: one file as it is, of a folder what belongs to this rank."""
        folder = standing(checkpoint_path)
        if not folder.is_dir():
            return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        parts = PARTS if self.optimizers else ("state_dict",)
        return fill(folder, read_checkpoint(checkpoint_path, parts=()), parts, self._share_to_fill())

    def _share_to_fill(self) -> Callable[[Place, Tensor], Tensor]:
        assert self.lightning_module is not None
        shards: dict[Place, Any] = {("state_dict", name): t for name, t in self.lightning_module.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shards |= {("optimizer_states", index, number): each for number, each in enumerate(parameters)}

        def empty(place: Place, meta: Tensor) -> Tensor:
            mine = shards.get(place[:3])
            if isinstance(mine, DTensor) and mine.shape == meta.shape:
                return torch.empty_like(mine, dtype=meta.dtype)
            return torch.empty_like(meta, device="cpu")

        return empty

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


def check_strategy(strategy: Strategy, backbone: Backbone) -> None:
    """Refuses to split what must stay whole, to split by other means than ours, and processes that last for one call.

    Four-bit weights know their scales by an attribute of the tensor, which no sharding takes along. Under other
    strategies a rank would clip by the norm of its own share of the gradient, and sample from its share of weights.

    Raises:
        ValueError: Says what would go wrong, and what to set instead.
    """
    splits = isinstance(strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy)
    if not splits and isinstance(strategy.launcher, _MultiProcessingLauncher):  # also of ddp_fork and ddp_notebook
        raise ValueError(
            "trainer.strategy=ddp_spawn and its like end their processes with each validate, fit and test, and the "
            "next would begin with the untrained base again; set trainer.strategy to ddp, in a script rather than a "
            "notebook"
        )
    if not splits:
        return
    name, along_stream = type(strategy).__name__, backbone.lora.along_stream
    if backbone.tuning == "qlora":
        raise ValueError(
            f"backbone.tuning=qlora: {name} would split four-bit weights and lose their scales; set trainer.strategy "
            "to auto or ddp, or backbone.tuning to lora"
        )
    if along_stream != "shared":
        raise ValueError(
            f"backbone.lora.along_stream={along_stream}: {name} splits adapters and weights over ranks, which are "
            "exchanged and merged whole; set trainer.strategy to auto or ddp, or along_stream to shared"
        )
    if not isinstance(strategy, FSDP2):
        raise ValueError(
            f"trainer.strategy={name}: every rank would clip by the norm of its own share of the gradient, and sample "
            "without the whole weights; set trainer.strategy to fsdp2"
        )


StrategyRegistry.register("fsdp2", FSDP2, description="Weights, gradients and optimizer spread over all ranks (FSDP2)")
StrategyRegistry.register("fsdp2_offload", FSDP2, description="The same, kept in main memory", cpu_offload=True)
