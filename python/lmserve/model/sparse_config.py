"""Architecture of a decoder with mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from lmserve.model.config import LARGEST, ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.router import Router

MOST_EXPERTS = 1 << 16


def check_experts(num_experts: int, expert_size: int, shared_size: int | None, router: Router) -> None:
    """Raises CheckpointError for a size that is out of bounds, or a router that does not fit so many experts."""
    largest = LARGEST["intermediate_size"]
    sizes = ("num_experts", num_experts, MOST_EXPERTS), ("expert_size", expert_size, largest)
    for name, size, most in (*sizes, ("shared_size", shared_size or 1, largest)):
        if not 1 <= size <= most:
            raise CheckpointError(f"{name} is {size}; it must be at least 1 and at most {most}")
    router.check(num_experts)


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
        check_experts(self.num_experts, self.expert_size, self.shared_size, self.router)
