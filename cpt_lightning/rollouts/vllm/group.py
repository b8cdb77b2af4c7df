"""Which ranks share an engine, on which devices it computes, and how they find it."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cpt_lightning.rollouts.vllm.process import Address


@dataclass(frozen=True)
class Meeting:
    """What a rank needs to know of an engine that another one began.

    Args:
        address: Where it is.
        buffer: Path of the memory through which weights go.
        devices: Names of its GPUs, as ``CUDA_VISIBLE_DEVICES`` has them; none on a CPU.
    """

    address: Address
    buffer: str
    devices: list[str]


class EngineGroup:
    """Consecutive ranks that share an engine. Whichever comes first begins it: none waits for one that does not come.

    Args:
        size: How many ranks.
        device: Of this rank.

    Raises:
        ValueError: The ranks do not come in groups of that size, or this one does not see the others' GPUs.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if world % size:
            raise ValueError(
                f"sampler.tensor_parallel_size={size}: an engine computes on the GPUs of {size} ranks, and the number "
                f"of ranks, {world}, is no multiple of it; choose trainer.devices so, or a tensor_parallel_size that "
                f"divides {world}"
            )
        self.size = size
        self.place = rank % size
        self.devices = _devices_from(device, self.place, size)
        self._first = rank - self.place
        # What ranks meet at anyway: unlike a broadcast it wants nobody to be there at the same time.
        shared: dist.Store = dist.HashStore() if size == 1 else dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"engines of ranks from {self._first}", shared)
        self._number = self._store.add(f"by rank {self.place}", 1)  # each rank comes to the group's engines in order

    def comes_first(self) -> bool:
        """Whether it is for this rank to begin the engine; asked once."""
        return self._store.add(f"{self._number} comers", 1) == 1

    def publish(self, meeting: Meeting) -> None:
        """Lets the others know."""
        self._store.set(f"{self._number} meeting", json.dumps(asdict(meeting)))

    def look_up(self, time_limit_s: float) -> Meeting:
        """What the first one published.

        Raises:
            RuntimeError: It did not, within the time limit.
            ValueError: The engine is on another machine, or on other GPUs than those of its ranks.
        """
        key = f"{self._number} meeting"
        try:
            self._store.wait([key], timedelta(seconds=time_limit_s))
        except dist.DistStoreError as error:
            raise RuntimeError(f"sampling engine: none was begun within time_limit_s={time_limit_s:g}") from error
        found = json.loads(self._store.get(key))
        meeting = Meeting(**{**found, "address": Address(**found["address"])})
        if meeting.address.node != platform.node():
            raise ValueError(
                f"sampler.tensor_parallel_size={self.size}: the {self.size} ranks from {self._first} share an engine, "
                f"but are on the machines {meeting.address.node} and {platform.node()}; choose a tensor_parallel_size "
                "that divides the number of ranks of each"
            )
        if meeting.devices != self.devices:
            raise ValueError(
                f"sampler.tensor_parallel_size={self.size}: the {self.size} ranks from {self._first} share an engine, "
                f"whose GPUs would be {meeting.devices} by one of them and {self.devices} by another; choose GPUs by "
                "CUDA_VISIBLE_DEVICES, and trainer.devices by their number"
            )
        return meeting


def _devices_from(device: torch.device, place: int, size: int) -> list[str]:
    """Names of the GPUs of a group in which this rank with its device has a place."""
    if device.type != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    first = (device.index or 0) - place
    if first < 0 or first + size > len(names):
        raise ValueError(
            f"sampler.tensor_parallel_size={size}: a rank needs to see the GPUs of all {size} ranks that share its "
            f"engine, and this one sees {names}; leave CUDA_VISIBLE_DEVICES the same on all ranks of a machine"
        )
    return names[first : first + size]


def environment(devices: list[str]) -> dict[str, str]:
    """Variables of the engine's process: it sees the devices of its ranks alone, and schedules in its own process."""
    # Its temporary files go with it, but for what it has compiled.
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_engine_{os.getuid()}"
    chosen = {
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if devices:
        return {**chosen, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
    # Not bound to cores, on which the training computes too; of keys and values one gigabyte.
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**chosen, **{name: os.environ.get(name, value) for name, value in defaults.items()}}
