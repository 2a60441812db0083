"""Layers with a recurrent state in torch: the slots of states, and what reads and writes them, sequence by sequence.

States are fp32 whatever the activations are. The slot past the last belongs to no sequence: padding reads and writes
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lmserve.model.config import CacheConfig, ModelConfig
from lmserve.model.interface import I32
from lmserve.model.ops import ConvGate
from lmserve.model.torch_scan import ScanInputs, run, step


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Where a step's states are. A sequence whose `state_from` is negative begins from zeros.

    A state goes beyond the first `kept` of its sequence's tokens; the rest are guesses.
    """

    query_start: I32  # [S + 1]
    kept: I32  # [S]
    state_from: I32  # [S]
    state_to: I32  # [S]


class States:
    """The states of every recurrent layer, and the step that works on them."""

    def __init__(self, config: ModelConfig, cache: CacheConfig, device: torch.device) -> None:
        slots = cache.state_slots + 1 if config.recurrent else 0

        def zeros(*shape: int) -> Tensor:
            if device.type != "cpu":
                return torch.zeros(shape, device=device)
            # numpy's zeros take no memory before they are written, torch's do.
            return torch.from_numpy(np.zeros(shape, np.float32))

        self.spare_slot = cache.state_slots
        self._convs = [zeros(slots, layer.kernel - 1, layer.channels) for layer in config.recurrent]
        self._matrices = [zeros(slots, layer.heads, layer.rows, layer.columns) for layer in config.recurrent]
        self._bounds: list[tuple[int, int]] = []
        self._kept: list[int] = []  # the row after the last that goes into the state
        self._from: list[int] = []
        self._to: list[int] = []

    def begin(self, layout: StateLayout) -> None:
        """Prepare a step."""
        rows = layout.query_start.tolist()
        self._bounds = list(pairwise(rows))
        self._kept = (layout.query_start[:-1] + layout.kept).tolist()
        self._from, self._to = layout.state_from.tolist(), layout.state_to.tolist()

    def begin_pass(self, cu_seqlens: I32) -> None:
        """Prepare a pass over whole sequences, whose states are not kept."""
        rows = cu_seqlens.tolist()
        self._bounds = list(pairwise(rows))
        self._kept = rows[1:]
        self._from = self._to = [-1] * len(self._bounds)

    def conv(self, x: Tensor, layer: int, weight: Tensor, bias: Tensor | None, gate: ConvGate) -> Tensor:
        """`Ops.conv` of x [T, channels] (or [T, 3 * channels]), with weight [channels, 1, kernel]."""
        channels, _, kernel = weight.shape
        inputs = x
        if gate == "inputs":
            before, after, inputs = x.chunk(3, dim=-1)
            inputs = before * inputs
        out = torch.empty_like(inputs)
        states = self._convs[layer]
        for (start, end), kept, read, write in zip(self._bounds, self._kept, self._from, self._to, strict=True):
            past = states[read] if read >= 0 else states.new_zeros((kernel - 1, channels))
            seen = torch.cat((past, inputs[start:end].float()))
            if write >= 0:
                states[write] = seen[kept - start : kept - start + kernel - 1]
            summed = functional.conv1d(
                seen.T[None], weight.float(), None if bias is None else bias.float(), groups=channels
            )
            out[start:end] = summed[0].T.to(out.dtype)
        if gate == "silu":
            return functional.silu(out)
        return after * out if gate == "inputs" else out

    def scan(self, layer: int, inputs: ScanInputs) -> Tensor:
        """`Ops.scan`: [T, heads * columns], float32."""
        states = self._matrices[layer]
        out = torch.empty_like(inputs.value)
        spans = list(zip(self._bounds, self._from, self._to, self._kept, strict=True))
        # Those that decode go together.
        decoding = [span for span in spans if span[0][1] - span[0][0] == 1 and span[1] >= 0]
        if decoding:
            rows, read, write = (
                torch.tensor(each, device=out.device)
                for each in zip(*((s[0][0], s[1], s[2]) for s in decoding), strict=True)
            )
            moved, output = step(states.index_select(0, read), inputs.part(rows))
            states.index_copy_(0, write, moved)
            out[rows] = output
        for (start, end), begin, write_slot, kept in spans:
            if end - start == 1 and begin >= 0:
                continue
            state = states[begin] if begin >= 0 else torch.zeros_like(states[0])
            moved, out[start:kept] = run(state, inputs.part(slice(start, kept)))
            if write_slot >= 0:
                states[write_slot] = moved
            if kept < end:
                _, out[kept:end] = run(moved, inputs.part(slice(kept, end)))
        return out.flatten(1)
