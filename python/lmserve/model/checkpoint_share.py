"""What each rank of a tensor-parallel group has of a checkpoint, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lmserve.model.checkpoint import Checkpoint
from lmserve.model.config import ModelConfig
from lmserve.model.errors import OptionError
from lmserve.model.shares import Share, split_config

MOST_RANKS: Final = 64


def own_share(checkpoint: Checkpoint, ranks: int) -> tuple[ModelConfig, Mapping[str, tuple[int, ...]]]:
    """The configuration that each of so many ranks runs, and the shapes of its tensors: rank 0's, which has the most.

    Raises OptionError if the model cannot be split among so many.
    """
    if ranks == 1:
        return checkpoint.config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if not 1 <= ranks <= MOST_RANKS:
        raise OptionError("tensor_parallel", f"tensor_parallel is {ranks}; it must be 1 to {MOST_RANKS}")
    config = split_config(checkpoint.config, Share(0, ranks))
    return config, checkpoint.family.expected_tensors(config)


def rank_device(device: str, rank: int) -> str:
    """The device of a rank: rank 0's, or the GPUs that follow it."""
    kind, colon, first = device.partition(":")
    return f"{kind}:{int(first) + rank}" if colon else device
