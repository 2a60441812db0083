"""Architecture of a decoder with mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from lmserve.model.config import LARGEST, ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.router import Router

MOST_EXPERTS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig(ModelConfig):
    """`sparse` says for each layer whether it has experts: `num_experts` of width `expert_size`, chosen by `router`.

    The others have a feed-forward network of width intermediate_size. `shared_size`: width of the network that every
    token passes beside its experts; None: there is none.
    """

    num_experts: int
    expert_size: int
    router: Router
    sparse: tuple[bool, ...]
    shared_size: int | None = None

    def __post_init__(self) -> None:
        # A dataclass with slots is another class than the one that super() without arguments would look in.
        ModelConfig.__post_init__(self)
        largest = LARGEST["intermediate_size"]
        sizes = ("num_experts", self.num_experts, MOST_EXPERTS), ("expert_size", self.expert_size, largest)
        for name, size, most in (*sizes, ("shared_size", self.shared_size or 1, largest)):
            if not 1 <= size <= most:
                raise CheckpointError(f"{name} is {size}; it must be at least 1 and at most {most}")
        self.router.check(self.num_experts)
