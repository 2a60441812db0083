"""The `torch` operations of a head that guesses a token ahead."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmserve.model.interface import LogitEdits
from lmserve.model.torch_ops import TorchOps
from lmserve.model.torch_upload import on_device
from lmserve.model.torch_weight import TorchWeight


class TorchDraftOps(TorchOps):
    """`DraftOps` with A = Tensor and W = TorchWeight. Call it under `torch.inference_mode()`."""

    _next_ids: Tensor  # of the step's tokens, those that follow them

    def begin(self, n_tokens: int, n_seqs: int, n_rows: int) -> None:
        super().begin(n_tokens, n_seqs, n_rows)
        last = self._buffers.query_start[1 : n_seqs + 1].astype(np.int64) - 1
        following = self._buffers.next_tokens[:n_seqs].clip(0).astype(np.int64)
        self._next_ids = torch.roll(self.token_ids, -1).long()
        self._next_ids[on_device(last, self._device)] = on_device(following, self._device)

    def begin_draft(self, x: Tensor, head: TorchWeight, edits: LogitEdits | None) -> None:
        """See `DraftOps`."""
        if len(x):
            sampled = self.sample_logits(self.raw_logits(x, head), edits)
            # A row whose logits are no numbers ends its sequence.
            self._next_ids[self.sample_rows] = sampled.clamp(min=0)

    def embed_next(self, w: TorchWeight, scale: float = 1.0) -> Tensor:
        """See `DraftOps`."""
        rows = w.rows(self._next_ids)
        return rows if scale == 1 else rows * scale

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """See `DraftOps`."""
        return torch.cat((a, b), dim=-1)

    def draft(self, x: Tensor, head: TorchWeight) -> None:
        """See `DraftOps`."""
        if len(x):
            self._send(self._buffers.drafts, np.arange(len(x)), self.linear(x, head).argmax(-1))
