"""How a Trainer's options spread a run over devices, and how much memory GPUs have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GPUS = {
    "H200": 141, "H100": 80, "A100": 80, "A100-40": 40, "A100-80": 80, "L40S": 48, "A6000": 48, "L4": 24, "A10": 24,
    "V100-16": 16, "V100": 32, "T4": 16, "RTX4090": 24, "RTX3090": 24,
}  # fmt: skip
"""Memory by name, in GB as the maker counts it."""
USABLE = 0.94
"""Share of a GPU that tensors get; the rest is the CUDA context, libraries' workspaces and gaps between tensors."""

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None, "bf16-true": None}
"""What products are computed in, by the Trainer's precision."""


@dataclass
class Devices:
    """Where a run lives.

    Args:
        strategy: The Trainer's.
        world_size: Devices, over all nodes.
        precision: The Trainer's.
        foreach: Whether the optimizer updates all weights at once, as torch does on a GPU.
    """

    strategy: str = "auto"
    world_size: int = 1
    precision: str = "32-true"
    foreach: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in ("auto", "single_device", "ddp", "fsdp2", "fsdp2_offload"):
            raise ValueError(f"trainer.strategy={self.strategy}: plans are for auto, ddp, fsdp2 and fsdp2_offload")
        if self.precision not in AUTOCAST:
            raise ValueError(f"trainer.precision={self.precision}: plans are for {', '.join(AUTOCAST)}")
        if self.strategy == "auto" and self.world_size > 1:
            self.strategy = "ddp"  # as the Trainer does

    @property
    def is_sharded(self) -> bool:
        """Whether each device keeps a share of the weights."""
        return self.strategy.startswith("fsdp2")

    @property
    def is_offloaded(self) -> bool:
        """Whether the shares are in main memory."""
        return self.strategy == "fsdp2_offload"

    @property
    def autocast(self) -> torch.dtype | None:
        """What products are computed in, if not in the weights' own dtype."""
        return AUTOCAST[self.precision]

    def share(self, prompts: int) -> int:
        """The most of a batch's prompts that a device gets."""
        return -(-prompts // self.world_size)


def gpu_bytes(gpu: str) -> int:
    """Memory of a GPU given by name or size.

    >>> gpu_bytes("80GB") == gpu_bytes("H100") == 80 * 10**9
    True

    Raises:
        ValueError: It is neither.
    """
    size = {name.lower(): str(gigabytes) for name, gigabytes in GPUS.items()}.get(gpu.lower(), gpu)
    number = size.lower().removesuffix("gb").strip()
    try:
        return int(float(number) * 10**9)
    except ValueError:
        raise ValueError(f"plan.gpu={gpu!r}: give a size such as 80GB, or one of {', '.join(GPUS)}") from None
