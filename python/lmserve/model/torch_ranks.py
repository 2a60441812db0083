"""What the processes of a tensor-parallel group do together: add, gather, agree (torch.distributed)."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Final, Self

import torch
from torch import Tensor, distributed

from lmserve.model.shares import Place, Share

# For all ranks to come, and for the slowest of them to read its weights.
JOIN: Final = timedelta(minutes=60)


class Ranks:
    """The group, as one of its processes sees it."""

    def __init__(self, share: Share, device: torch.device) -> None:
        self.share = share
        self._device = device

    @classmethod
    def join(cls, place: Place, device: torch.device) -> Self:
        """Wait for all ranks. They connect by the loopback interface alone, and find each other by a file."""
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, loopback)
        share = place.share
        store = distributed.FileStore(place.store, share.ranks)  # type: ignore[attr-defined]
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=share.rank,
            world_size=share.ranks,
            timeout=JOIN,
        )
        return cls(share, device)

    def add(self, x: Tensor) -> Tensor:
        """The sum over all ranks, which takes the place of x."""
        distributed.all_reduce(x)
        return x

    def gather_columns(self, x: Tensor, columns: int) -> Tensor | None:
        """Gather the columns of all ranks, side by side, on rank 0; None on the others.

        columns: of all together, split as `Share.rows` does.
        """
        share = self.share
        widest = -(-columns // share.ranks)
        own = x if x.shape[1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        if share.rank:
            distributed.gather(own.contiguous(), dst=0)
            return None
        parts = [torch.empty_like(own) for _ in range(share.ranks)]
        distributed.gather(own.contiguous(), parts, dst=0)
        bounds = (Share(rank, share.ranks).rows(columns) for rank in range(share.ranks))
        return torch.cat([part[:, : end - first] for part, (first, end) in zip(parts, bounds, strict=True)], dim=1)

    def least(self, value: int) -> int:
        """The least of all ranks' values."""
        shared = torch.tensor([value], dtype=torch.int64, device=self._device)
        distributed.all_reduce(shared, distributed.ReduceOp.MIN)
        return int(shared.item())
