"""How much memory of a device is held at most: a GPU's, or main memory for the CPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from cpt_lightning.modules.accounting import host_rss

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux keeps a process's most memory so far, and where it is told to forget it (proc(5))."""


class DeviceMemory:
    """The memory of a device.

    Of a GPU what tensors hold, and not what the allocator keeps for the next ones; on the CPU all that this process
    holds of main memory, of which elsewhere than on Linux only that of now, or the most so far, is known.

    Args:
        device: Whose.
        num_processes: On this machine, which share its main memory.
    """

    def __init__(self, device: torch.device, num_processes: int = 1) -> None:
        self.device = device
        self.num_processes = num_processes
        self.is_gpu = device.type == "cuda"

    def forget_peak(self) -> None:
        """The peak begins anew."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif RESET.exists():
            RESET.write_text("5")

    @property
    def peak(self) -> int:
        """Bytes at most since then."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        if not RESET.exists():
            return host_rss()
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[0])

    @property
    def total(self) -> int:
        """All that there is for a process."""
        if self.is_gpu:
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.num_processes
