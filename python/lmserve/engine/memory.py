"""What an engine that has ended leaves behind in this process."""

from __future__ import annotations

import ctypes
import gc


def give_back_memory() -> None:
    """Free what only cycles of objects hold, and give the allocator's free pages back to the system.

    Each model is loaded on a thread of its own, and glibc keeps a heap for each thread (malloc_trim(3)).
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
