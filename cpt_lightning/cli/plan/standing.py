"""What is in a device's memory whatever it computes, and what strategies spread of it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning import Callback

from cpt_lightning.callbacks import Influence
from cpt_lightning.callbacks.analysis.measuring import Measuring
from cpt_lightning.callbacks.methods.kept_weights import KeptWeights
from cpt_lightning.cli.plan.engine import WeightlessEngine
from cpt_lightning.cli.plan.phases import Phase
from cpt_lightning.cli.plan.weights import OptimizerCost, bytes_of, pixel_bytes, stored_bytes
from cpt_lightning.models.adapters import adapter_weights, has_adapters
from cpt_lightning.models.memory import weight_bytes
from cpt_lightning.models.qwen_vl import output_weight
from cpt_lightning.modules.reference import HeldToReference
from cpt_lightning.types import Prompts


class Standing:
    """Weights, reference, optimizer, and what callbacks keep.

    Args:
        engine: With the model.
        callbacks: Of the run.
    """

    def __init__(self, engine: WeightlessEngine, callbacks: Sequence[Callback] = ()) -> None:
        self.engine = engine
        self.module, self.devices, self.model = engine.module, engine.devices, engine.model
        self.callbacks = callbacks
        self.num_trainable = sum(weight.numel() for weight in engine.trainable)
        self.dtype = engine.trainable[0].dtype
        self.gradients = weight_bytes(self.model, trainable_only=True)
        self.optimizer = OptimizerCost.of(self.module, self.dtype, self.devices.foreach)

    def phase(self, name: str, gathers: Sequence[str] = ("policy",), /, **kinds: int) -> Phase:
        """A part of the run, with what stands by; of shards, those of the models named are gathered meanwhile."""
        standing = {
            "weights": self.share(stored_bytes(self.model, self.module.backbone)),
            "reference": self.share(self.reference),
            "optimizer": self.share(self.num_trainable * self.optimizer.state),
            "callbacks": self.share(self._sets + self._copies) + self._output_matrices,
        }
        if self.devices.is_sharded:
            policy = weight_bytes(self.model)
            whole = {"policy": policy, "reference": self.reference, "base": policy}
            scale = (self.devices.autocast or self.dtype).itemsize / self.dtype.itemsize
            standing["gathered weights"] = int(sum(whole[model] for model in gathers) * scale)
        shown = {kind.replace("_", " "): size for kind, size in {**standing, **kinds}.items() if size}
        return Phase(name, shown)

    def backward_phase(self, name: str, peak: int, prompts: Prompts, **kinds: int) -> Phase:
        """A part of the run that goes back.

        Args:
            name: Of the part.
            peak: Bytes at most of what the engine computes, gradients included.
            prompts: That are on the device.
            kinds: What is there besides.
        """
        exchanged = bytes_of(self.engine.exchanged)
        whole = min(self.gradients - exchanged, peak)
        # FSDP2 copies a layer's gradients before it exchanges them.
        num_layers = len(self.model.model.language_model.layers)
        return self.phase(
            name,
            gradients=whole + self.share(exchanged),
            gradients_in_exchange=exchanged // num_layers,
            gradient_buckets=self.buckets,
            activations_and_log_probs=peak - whole,
            batch=pixel_bytes(prompts),
            **kinds,
        )

    def share(self, whole: float) -> int:
        """A device's own of what strategies spread."""
        if self.devices.is_offloaded:
            return 0
        return int(whole / self.devices.world_size if self.devices.is_sharded else whole)

    @property
    def reference(self) -> int:
        """Bytes of a second model, or second adapters."""
        if not isinstance(self.module, HeldToReference) or not self.module.kl_coef:
            return 0
        if not has_adapters(self.model):
            return weight_bytes(self.model)
        is_base = self.module.reference_kind == "base"
        return 0 if is_base else bytes_of(adapter_weights(self.model))

    @property
    def buckets(self) -> int:
        """Bytes of the copies through which DDP exchanges gradients."""
        return self.gradients if self.devices.strategy == "ddp" else 0

    @property
    def left_gradients(self) -> int:
        """Bytes of gradients between two steps: automatic optimization leaves those of the last one lying."""
        return self.share(self.gradients) if self.module.automatic_optimization else 0

    @property
    def has_copy_of_base(self) -> bool:
        """Whether what measures against the base holds a second model; else it switches the adapters off."""
        return not has_adapters(self.model) or self.module.along_stream == "renewed"

    @property
    def _sets(self) -> int:
        """Bytes of tensors beside every trained weight."""
        keepers = [callback for callback in self.callbacks if isinstance(callback, KeptWeights)]
        sizes = [(dtype or self.dtype).itemsize for callback in keepers for dtype in callback.sets]
        return self.num_trainable * sum(sizes)

    @property
    def _copies(self) -> int:
        """Bytes of the base, which callbacks share."""
        needed = self.has_copy_of_base and any(isinstance(callback, Measuring) for callback in self.callbacks)
        return stored_bytes(self.model, self.module.backbone) if needed else 0

    @property
    def _output_matrices(self) -> int:
        """Bytes of the output matrix before an update that is measured, where it is trained or in shards."""
        weight = output_weight(self.model)
        num_copies = sum(isinstance(callback, Influence) for callback in self.callbacks)
        return bytes_of([weight] * num_copies) if weight.requires_grad or self.devices.is_sharded else 0
