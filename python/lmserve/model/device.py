"""What this machine has, asked without torch: free memory, and GPUs through the CUDA driver itself."""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache
from pathlib import Path

from lmserve.model import cgroup

MEMINFO = Path("/proc/meminfo")


def available_memory() -> int:
    """Bytes of RAM that this process may still take: those that the kernel and its control groups have available."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if MEMINFO.is_file():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in fields:
            available = int(fields["MemAvailable"].split()[0]) * 1024
    left = cgroup.memory_left()
    return available if left is None else min(available, left)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, within the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup.cpu_quota()
    return cores if quota is None else min(cores, max(1, math.ceil(quota)))


@cache
def cuda_memory(index: int) -> int | None:
    """Total bytes of memory of the GPU with this index, or None where the CUDA driver shows no such GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, total = ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or index >= count.value:
        return None
    if driver.cuDeviceTotalMem_v2(ctypes.byref(total), index):
        return None
    return total.value
