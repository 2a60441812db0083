"""The model loop: opens checkpoints and runs steps. Importing it does not import torch."""

from lmserve.model.checkpoint import Checkpoint, open_checkpoint
from lmserve.model.errors import CheckpointError, OptionError
from lmserve.model.load import load_runner
from lmserve.model.options import MemoryPlan, RunnerOptions, plan_memory

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MemoryPlan",
    "OptionError",
    "RunnerOptions",
    "load_runner",
    "open_checkpoint",
    "plan_memory",
]
