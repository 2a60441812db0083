"""What lies below the model's memory: how much of host memory and disk keeps blocks and states, and for which model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmserve.config import ServeConfig
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.errors import OptionError
from lmserve.model.fingerprint import fingerprint
from lmserve.model.options import MemoryPlan
from lmserve.model.rope import original_length

# Where the states of sessions go beside their log.
FOLDER = "kv"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """Sizes of the tiers in bytes, 0: none; known before a weight is read."""

    host_blocks: int = 0
    host_states: int = 0
    folder: Path | None = None
    disk: int = 0
    flag: str = "--kv-disk"  # that named the folder

    def __bool__(self) -> bool:
        return bool(self.host_blocks or self.host_states or self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """What `lmserve._core.Engine` is told of the tiers below the model's memory."""

    host_blocks: int
    host_states: int
    folder: Path | None
    disk: int
    flag: str
    fingerprint: bytes  # of all that decides what a token's keys and values are, and how they are stored
    tenants: dict[int, bytes]  # each tenant's 32 bytes that name it for good; what others compute is not kept


def plan_tiers(config: ServeConfig, checkpoint: Checkpoint, memory: MemoryPlan) -> TierPlan:
    """The tiers of a model. Raises OptionError for one that the model or its operations have no use for."""
    asked = [name for name in ("kv_host_memory", "kv_disk", "state_memory") if getattr(config, name)]
    if checkpoint.kind != "generate":
        return TierPlan()
    if asked and memory.ops != "cpu":
        message = f"{asked[0]} is given; with torch's operations, keys and values stay in the model's memory"
        raise OptionError(asked[0], message)
    if asked and memory.num_window_blocks:
        message = f"{asked[0]} is given; this model has layers with a window, whose blocks stay in the model's memory"
        raise OptionError(asked[0], message)
    if config.state_memory and not memory.state_slots:
        message = f"state_memory is {config.state_memory}; this model has no recurrent state"
        raise OptionError("state_memory", message)
    plan = TierPlan(host_blocks=config.kv_host_memory, host_states=config.state_memory)
    if memory.ops != "cpu" or not config.prefix_cache:
        return plan
    if config.kv_disk is not None:
        folder, size = config.kv_disk
        return TierPlan(host_blocks=plan.host_blocks, host_states=plan.host_states, folder=folder, disk=size)
    copied = config.record is None and not config.in_processes
    if config.session_dir is not None and memory.state_slots and config.state_disk and copied:
        return TierPlan(
            host_blocks=plan.host_blocks,
            host_states=plan.host_states,
            folder=config.session_dir / FOLDER,
            disk=config.state_disk,
            flag="--session-dir",
        )
    return plan


def tiers_of(plan: TierPlan, config: ServeConfig, checkpoint: Checkpoint, memory: MemoryPlan) -> Tiers | None:
    """What the core must know of the tiers; None: there are none. Raises OSError if the checkpoint cannot be read."""
    if not plan:
        return None
    formats = f"{memory.ops} {memory.dtype} {memory.quantize} {memory.kv_dtype}"
    if original_length(checkpoint.config.attention, memory.max_model_len):
        formats += " long"
    if memory.mtp:
        formats += " mtp"
    return Tiers(
        host_blocks=plan.host_blocks,
        host_states=plan.host_states,
        folder=plan.folder,
        disk=plan.disk,
        flag=plan.flag,
        fingerprint=fingerprint(checkpoint) + formats.encode(),
        tenants=dict(config.keyring.durable_names()),
    )
