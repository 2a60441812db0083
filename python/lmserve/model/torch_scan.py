"""Recurrences over a matrix for each head in torch: token by token, and in chunks for prompts. See `Ops.scan`.

All is fp32. Of a recurrence S becomes e^g S + k u, and the output is q S. Within a chunk, with G the sum of g from its
first token on, the state before token i is e^(G_(i-1)) S_0 plus the sum over j < i of e^(G_(i-1) - G_j) k_j u_j. In the
delta rule u_i holds what the state before it gives for k_i, so all u of a chunk are the solution of a triangular
system.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lmserve.model.config import RecurrentLayer
from lmserve.model.ops import ScanRule
from lmserve.model.torch_weight import TorchWeight

EPS = 1e-6
CHUNK = 64


@dataclass(frozen=True, slots=True)
class ScanInputs:
    """What a recurrence reads, of each token (T or another first dimension) and head."""

    query: Tensor  # [T, heads, rows]
    key: Tensor  # [T, heads, rows]
    value: Tensor  # [T, heads, columns]
    decay: Tensor  # [T, heads]: g
    beta: Tensor  # [T, heads]: what u is multiplied with
    delta: bool
    skip: Tensor | None  # [heads]

    def part(self, rows: slice | Tensor) -> ScanInputs:
        """Of some tokens."""
        return ScanInputs(
            self.query[rows],
            self.key[rows],
            self.value[rows],
            self.decay[rows],
            self.beta[rows],
            self.delta,
            self.skip,
        )


@dataclass(frozen=True, slots=True)
class TorchScan(TorchWeight):
    """Weight: the decay [heads], negative; bias: of the time step. All float32."""

    skip: Tensor | None = None
    limits: tuple[float, float] = (0.0, math.inf)

    def inputs(self, x: Tensor, gates: Tensor, layer: RecurrentLayer, rule: ScanRule) -> ScanInputs:
        """What the recurrence reads of x and gates."""
        x, gates, heads, rows = x.float(), gates.float(), layer.heads, layer.rows
        inner = heads * layer.columns
        keys = (x.shape[1] - inner) // 2
        assert self.bias is not None
        step = functional.softplus(gates[:, -heads:] + self.bias).clamp(*self.limits)
        beta = step if rule == "mamba" else torch.sigmoid(gates[:, :heads])
        if rule == "mamba":
            value, key, query = torch.split(x, [inner, keys, keys], dim=1)
        else:
            query, key, value = torch.split(x, [keys, keys, inner], dim=1)
        query, key = (part.reshape(len(x), -1, rows) for part in (query, key))
        if rule != "mamba":
            query, key = unit(query) * rows**-0.5, unit(key)
        copies = heads // query.shape[1]
        if rule == "delta_tiled":
            query, key = (part.repeat(1, copies, 1) for part in (query, key))
        else:
            query, key = (part.repeat_interleave(copies, 1) for part in (query, key))
        value = value.reshape(len(x), heads, -1)
        return ScanInputs(query, key, value, step * self.weight, beta, rule != "mamba", self.skip)


def unit(x: Tensor) -> Tensor:
    """x [..., n] divided by its length."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def step(state: Tensor, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """One token of each of n sequences: the states [n, heads, rows, columns] behind it, and its outputs [n, heads,
    columns].
    """
    state = state * inputs.decay.exp()[..., None, None]
    change = inputs.value
    if inputs.delta:
        change = change - torch.einsum("nhr,nhrc->nhc", inputs.key, state)
    change = change * inputs.beta[..., None]
    state = state + inputs.key[..., None] * change[..., None, :]
    return state, _skipped(torch.einsum("nhr,nhrc->nhc", inputs.query, state), inputs)


def run(state: Tensor, inputs: ScanInputs, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """All tokens of a sequence: the state [heads, rows, columns] behind them, and their outputs [T, heads, columns]."""
    outputs = []
    for first in range(0, len(inputs.query), chunk):
        part = inputs.part(slice(first, first + chunk))
        if len(part.query) == 1:
            states, output = step(state[None], part)
            state = states[0]
        else:
            state, output = _chunk(state, part)
        outputs.append(output)
    return state, torch.cat(outputs)


def _chunk(state: Tensor, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    query, key, value = (part.transpose(0, 1) for part in (inputs.query, inputs.key, inputs.value))
    beta = inputs.beta.T[..., None]
    total = inputs.decay.T.cumsum(-1)  # [heads, L]
    since = (total[:, :, None] - total[:, None, :]).tril()
    decay = since.exp().tril()  # [heads, L, L]: from token j to token i
    change = value * beta
    if inputs.delta:
        known = total.exp()[..., None] * (key @ state)
        system = (key @ key.transpose(1, 2)) * decay * beta
        change = torch.linalg.solve_triangular(system, (value - known) * beta, upper=False, unitriangular=True)
    output = total.exp()[..., None] * (query @ state) + ((query @ key.transpose(1, 2)) * decay) @ change
    last = total[:, -1:]
    rest = (last - total).exp()[..., None]
    state = last.exp()[..., None] * state + (key * rest).transpose(1, 2) @ change
    return state, _skipped(output.transpose(0, 1), inputs)


def _skipped(output: Tensor, inputs: ScanInputs) -> Tensor:
    return output if inputs.skip is None else output + inputs.skip[:, None] * inputs.value
