"""Frees the memory that an ended engine leaves in this process."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Final

STATUS: Final = Path("/proc/self/status")


def resident_memory() -> tuple[int, int] | None:
    """Bytes of this process that are in memory, and those of them that are pages of files; None: the system is silent.

    Pages of files, such as those of packed weights, may be shared with other processes, and the system may drop them.
    """
    try:
        fields = dict(line.split(":", 1) for line in STATUS.read_text("utf-8").splitlines() if ":" in line)
        total, of_files = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssFile"))
    except (OSError, KeyError, ValueError):
        return None
    return total, of_files


def give_back_memory() -> None:
    """Free what only cycles of objects hold, and give the allocator's free pages back to the system.

    Each model is loaded on a thread of its own, and glibc keeps a heap for each thread (malloc_trim(3)).
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
