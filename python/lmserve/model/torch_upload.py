"""Small arrays on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """The values as a tensor of the device. On CUDA the call does not wait for the copy, nor for what runs there."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return host.to(device)
    # torch keeps the pinned copy until the device has read it.
    return host.pin_memory().to(device, non_blocking=True)
