"""What this machine has, asked without torch: free memory, and GPUs through the CUDA driver itself."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_memory() -> int:
    """Bytes of RAM that this process may still take: what the kernel calls available, within the container's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if MEMINFO.is_file():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in fields:
            available = int(fields["MemAvailable"].split()[0]) * 1024
    for path in CGROUP_LIMITS:
        if path.is_file():
            limit = path.read_text(encoding="ascii").strip()
            if limit.isdecimal():
                available = min(available, int(limit))
    return available


def usable_cores() -> int:
    """Cores that this process may use: its affinity, within the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if CGROUP_QUOTA.is_file():
        quota, period = CGROUP_QUOTA.read_text(encoding="ascii").split()
        if quota.isdecimal():
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


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
