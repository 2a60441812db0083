"""The reference implementation of `Ops`: plain torch on CPU and CUDA, in fp32, bf16 or fp16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lmserve.model import sampler
from lmserve.model.activation import Activation
from lmserve.model.config import AttentionLayer, CacheConfig, ModelConfig
from lmserve.model.interface import F32, I32, LogitEdits, StepBuffers
from lmserve.model.ops import ConvGate, ScanRule
from lmserve.model.rope import position_tables
from lmserve.model.sampler import SamplingRows
from lmserve.model.torch_activation import activate, gated
from lmserve.model.torch_attention import (
    Attention,
    PagedAttention,
    PassAttention,
    SdpaAttention,
    StepLayout,
    WholeAttention,
)
from lmserve.model.torch_experts import TorchExperts, TorchRouter
from lmserve.model.torch_loading import TorchLoader
from lmserve.model.torch_scan import TorchScan
from lmserve.model.torch_state import StateLayout, States
from lmserve.model.torch_upload import on_device
from lmserve.model.torch_varlen import VarlenAttention, varlen_fits
from lmserve.model.torch_weight import TorchWeight

STEP_INPUTS = (
    "token_ids",
    "positions",
    "slots",
    "query_start",
    "context_lens",
    "block_tables",
    "sample_rows",
    "window_slots",
    "window_tables",
)


class TorchOps(TorchLoader):
    """`Ops` with A = Tensor and W = TorchWeight. Call it under `torch.inference_mode()`."""

    def __init__(
        self,
        config: ModelConfig,
        cache: CacheConfig,
        buffers: StepBuffers,
        *,
        device: str = "cpu",
        dtype: str = "fp32",
        attention: Callable[[ModelConfig, CacheConfig, torch.device], PagedAttention] | None = None,
        copy_inputs: bool | None = None,
        packed: bool = False,
    ) -> None:
        """Allocate cache, tables and inputs.

        attention: None chooses by device and dtype. copy_inputs: a step reads a copy of the buffers, which `pad` needs;
        None does so off the CPU. packed: see `TorchLoader`.
        """
        super().__init__(device, dtype, packed=packed)
        self.config = config
        self._buffers = buffers
        self._host = {name: torch.from_numpy(getattr(buffers, name)) for name in STEP_INPUTS}
        self._copied = self._device.type != "cpu" if copy_inputs is None else copy_inputs
        # At fixed addresses: captured graphs read the same memory in every step.
        self._inputs = {name: host.to(self._device, copy=self._copied) for name, host in self._host.items()}
        tables = position_tables(config.attention, cache.max_model_len)
        self._ropes = [self._on_device(rope) for rope in tables.ropes]
        self._query_scales = self._on_device(tables.query_scales)
        self._places = tables.places
        if attention is None:
            attention = VarlenAttention if varlen_fits(config, cache, self._device) else SdpaAttention
        self.cache = attention(config, cache, self._device)
        self._states = States(config, cache, self._device)
        self._max_model_len = cache.max_model_len
        self._block_size = cache.block_size
        self._padding = self._padding_inputs(cache.block_size) if self._copied else {}
        self._attention: Attention = self.cache
        self._outputs: list[tuple[NDArray[Any], NDArray[np.intp], Tensor]] = []
        # Of the step, or pass: the tokens' ids and positions, and which of them are sampled.
        self.token_ids = self.positions = self.sample_rows = torch.empty(0, dtype=torch.int64)
        # Of the step's tokens: cos and sin of each rope, and the scales of queries.
        self._step_ropes: list[tuple[Tensor, Tensor]] = []
        self._step_scales: list[Tensor] = []
        self._not_finite = torch.empty(0)  # [T, 1] 0, or NaN for a token with a query, key or value that is none
        self._pass_starts = torch.empty(0, dtype=torch.int64)
        self._pass_places = torch.empty(0, dtype=torch.int64)

    def begin(self, n_tokens: int, n_seqs: int, n_rows: int) -> None:
        self.upload(n_tokens, n_seqs, n_rows)
        buffers = self._buffers
        query_start = buffers.query_start[: n_seqs + 1]
        self._prepare(n_tokens, n_rows, query_start, buffers.context_lens[:n_seqs])
        if len(buffers.adapters):
            sampled = buffers.sample_rows[:n_rows]
            self.adapters.begin(buffers.adapters[:n_seqs], query_start, sampled, self._device)
        if self.config.recurrent:
            self._copy_blocks(n_seqs)
            slots = buffers.state_from[:n_seqs], buffers.state_to[:n_seqs]
            self._states.begin(StateLayout(query_start, buffers.state_tokens[:n_seqs], *slots))

    def upload(self, n_tokens: int, n_seqs: int, n_rows: int) -> None:
        """Copy a step's inputs to the device; `begin` does so itself."""
        if self._copied:
            for name, length in _lengths(n_tokens, n_seqs, n_rows).items():
                self._inputs[name][:length].copy_(self._host[name][:length], non_blocking=True)

    def pad(self, n_seqs: int, size: int) -> None:
        """Fill an uploaded decode step of n_seqs sequences up to `size` with ones that touch only the spare block."""
        first, last = _lengths(n_seqs, n_seqs, n_seqs), _lengths(size, size, size)
        for name, padding in self._padding.items():
            self._inputs[name][first[name] : last[name]].copy_(padding[first[name] : last[name]], non_blocking=True)

    def begin_decode(self, size: int) -> None:
        """Start a step over `size` uploaded sequences of one token each: nothing in it depends on host memory."""
        self.adapters.end()
        longest = np.full(size, self._max_model_len, np.int32)
        self._prepare(size, size, np.arange(size + 1, dtype=np.int32), longest)

    def begin_embed(self, token_ids: I32, cu_seqlens: I32, places: I32 | None = None) -> None:
        self.adapters.end()
        # A copy: torch takes no read-only array.
        self.token_ids = torch.from_numpy(token_ids.copy()).to(self._device)
        starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        self._rotate_at(torch.from_numpy(np.arange(len(token_ids)) - starts).to(self._device))
        self._pass_starts = torch.from_numpy(cu_seqlens.astype(np.int64)).to(self._device)
        if places is not None:
            self._pass_places = torch.from_numpy(places).to(self._device)
        whole = not all(layer.causal for layer in self.config.attention)
        self._attention = (WholeAttention if whole else PassAttention)(self.config, cu_seqlens)
        self._states.begin_pass(cu_seqlens)

    def embed(self, w: TorchWeight, scale: float = 1.0) -> Tensor:
        rows = w.rows(self.token_ids)
        return rows if scale == 1 else rows * scale

    def embed_places(self, w: TorchWeight) -> Tensor:
        return w.rows(self._pass_places)

    def norm(self, x: Tensor, w: TorchWeight) -> Tensor:
        if w.parts > 1:
            own = x.view(*x.shape[:-1], w.parts, -1)
            return functional.rms_norm(own, own.shape[-1:], None, w.eps).view(x.shape) * w.weight
        shape = w.weight.shape
        parts = x.view(*x.shape[:-1], x.shape[-1] // shape[0], *shape)
        if w.centered:
            return functional.layer_norm(parts, shape, w.weight, w.bias, w.eps).view(x.shape)
        return functional.rms_norm(parts, shape, w.weight, w.eps).view(x.shape)

    def add_norm(self, x: Tensor, residual: Tensor, w: TorchWeight, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        total = residual.add_(x, alpha=scale)
        return self.norm(total, w), total

    def add(self, x: Tensor, residual: Tensor, *, scale: float = 1.0) -> Tensor:
        return residual.add_(x, alpha=scale)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x.mul_(factor)

    def linear(self, x: Tensor, w: TorchWeight) -> Tensor:
        return self.adapters.add(x, w.linear(x), w)

    def rope_and_cache(
        self,
        qkv: Tensor,
        layer: int,
        q_norm: TorchWeight | None = None,
        k_norm: TorchWeight | None = None,
        v_norm: TorchWeight | None = None,
    ) -> Tensor:
        shape = self.config.attention[layer]
        query = self._heads(qkv[:, : shape.q_size], shape, q_norm)
        if shape.shares is None:
            key, value = qkv[:, shape.q_size :].chunk(2, dim=-1)
            key, value = self._heads(key, shape, k_norm), self._heads(value, shape, v_norm)
            self._attention.write(layer, self._rotate(key, layer), value)
        query = self._rotate(query, layer)
        if self._device.type == "cpu":
            # torch's attention for CPUs gives numbers for rows whose scores are none, at some sizes.
            self._not_finite = (qkv * 0).sum(-1, keepdim=True)
        temperature = self._places[layer][1]
        return query if temperature is None else query * self._step_scales[temperature].to(query.dtype)

    def cache_and_attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, sinks: Tensor | None = None
    ) -> Tensor:
        """Write key and value [T, kv_heads, head_dim], rotated already, and attend with query [T, heads, head_dim].

        [T, heads * head_dim]. For models of transformers, which bring everything but the attention.
        """
        self._attention.write(layer, key, value)
        if self._device.type == "cpu":
            rows = [tensor.flatten(1) * 0 for tensor in (query, key, value)]
            self._not_finite = torch.cat(rows, dim=1).sum(-1, keepdim=True)
        return self.attention(query, layer, None if sinks is None else TorchWeight(sinks))

    def heads(self, x: Tensor, w: TorchWeight, passed: int = 0) -> Tensor:
        heads, _, inputs = w.weight.shape
        columns = x.view(len(x), heads, -1)
        out = torch.einsum("nhi,hoi->nho", columns[..., :inputs], w.weight)
        return torch.cat((out, columns[..., inputs : inputs + passed]), dim=-1).flatten(1)

    def latent_and_cache(self, q: Tensor, kv: Tensor, layer: int, norm: TorchWeight) -> Tensor:
        shape = self.config.attention[layer]
        query, rank = q.view(len(q), shape.num_heads, shape.head_dim), shape.latent_rank
        latent, rotated = self.norm(kv[:, :rank], norm), self._rotate(kv[:, None, rank:], layer)
        key = torch.cat((latent[:, None], rotated), dim=-1)
        self._attention.write(layer, key, key)
        if self._device.type == "cpu":
            self._not_finite = (q * 0).sum(-1, keepdim=True) + (kv * 0).sum(-1, keepdim=True)
        query = torch.cat((query[..., :rank], self._rotate(query[..., rank:], layer)), dim=-1)
        temperature = self._places[layer][1]
        return query if temperature is None else query * self._step_scales[temperature].to(query.dtype)

    def attention(
        self, q: Tensor, layer: int, sinks: TorchWeight | None = None, distances: TorchWeight | None = None
    ) -> Tensor:
        added = None if distances is None else distances.weight
        attended = self._attention.attend(layer, q, None if sinks is None else sinks.weight, added)
        return attended + self._not_finite if self._device.type == "cpu" else attended

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return gated(gate_up, activation)

    def activate(self, x: Tensor, activation: Activation, factor: Tensor | None = None, start: int = 0) -> Tensor:
        return activate(x, activation, None if factor is None else factor[:, start : start + x.shape[-1]])

    def route(self, x: Tensor, w: TorchWeight) -> Tensor:
        assert isinstance(w, TorchRouter)
        return w.route(x)

    def experts(self, x: Tensor, routing: Tensor, w: TorchWeight) -> Tensor:
        assert isinstance(w, TorchExperts)
        return w.apply(x, routing)

    def conv(self, x: Tensor, layer: int, w: TorchWeight, gate: ConvGate = "none") -> Tensor:
        return self._states.conv(x, layer, w.weight, w.bias, gate)

    def scan(self, x: Tensor, gates: Tensor, layer: int, w: TorchWeight, rule: ScanRule) -> Tensor:
        assert isinstance(w, TorchScan)
        return self._states.scan(layer, w.inputs(x, gates, self.config.recurrent[layer], rule)).to(x.dtype)

    def gate_rows(self, x: Tensor, gates: Tensor) -> Tensor:
        return x.mul_(torch.sigmoid(gates))

    def rows(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.sample_rows)

    def sample(self, x: Tensor, head: TorchWeight, edits: LogitEdits | None) -> None:
        self.sample_logits(self.raw_logits(x, head), edits)

    def raw_logits(self, x: Tensor, head: TorchWeight) -> Tensor:
        """Float32 logits [R, vocab] of x [R, hidden]."""
        logits = self.linear(x, head).float()
        scale, softcap = self.config.logits_scale, self.config.logits_softcap
        if scale != 1:
            logits = logits * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def sample_logits(self, logits: Tensor, edits: LogitEdits | None) -> Tensor:
        """What `sample` does, from float32 logits [R, vocab]; gives the sampled tokens [R]."""
        buffers, n_rows = self._buffers, len(logits)
        sampled = sampler.sample(logits, SamplingRows.of(buffers, n_rows), edits)
        self._send(buffers.sampled, np.arange(n_rows), sampled)
        wanted = np.flatnonzero(buffers.logprobs[:n_rows] >= 0)
        if len(wanted):
            index = on_device(wanted, self._device)
            own, top_ids, top_logprobs = sampler.token_logprobs(logits.index_select(0, index), sampled[index])
            self._send(buffers.sampled_logprob, wanted, own)
            self._send(buffers.top_ids, wanted, top_ids)
            self._send(buffers.top_logprobs, wanted, top_logprobs)
        return sampled

    def finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        for target, rows, values in self._outputs:
            target[rows] = values.numpy()
        self._outputs.clear()

    def pool(self, x: Tensor, pooling: str) -> F32:
        states, starts = x.float(), self._pass_starts
        pooled: F32
        if pooling in ("cls", "last"):
            pooled = states[starts[:-1] if pooling == "cls" else starts[1:] - 1].cpu().numpy()
            return pooled
        lengths = starts.diff()
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=self._device), lengths)
        weights = states.new_ones(len(states))
        if pooling == "weighted":
            weights = torch.arange(1, len(states) + 1, device=self._device) - starts[:-1][owner]
        sums, total = (
            states.new_zeros((len(lengths), values.shape[1])).index_add_(0, owner, values)
            for values in (states * weights[:, None], weights[:, None].float())
        )
        pooled = (sums / total).cpu().numpy()
        return pooled

    def logits(self, x: Tensor, head: TorchWeight) -> F32:
        values: F32 = self.raw_logits(x, head).cpu().numpy()
        return values

    def _prepare(self, n_tokens: int, n_rows: int, query_start: I32, context_lens: I32) -> None:
        n_seqs = len(context_lens)
        lengths = _lengths(n_tokens, n_seqs, n_rows)
        step = {name: tensor[: lengths[name]] for name, tensor in self._inputs.items()}
        self.token_ids, self.sample_rows = step["token_ids"], step["sample_rows"].long()
        self._rotate_at(step["positions"])
        self._attention = self.cache
        self.cache.begin(
            StepLayout(
                query_start=query_start,
                context_lens=context_lens,
                block_tables=self._buffers.block_tables[:n_seqs],
                device_query_start=step["query_start"],
                device_context_lens=step["context_lens"],
                device_block_tables=step["block_tables"],
                slots=step["slots"].long(),
                window_tables=self._buffers.window_tables[:n_seqs],
                device_window_tables=step["window_tables"],
                window_slots=step["window_slots"].long(),
            )
        )

    def _copy_blocks(self, n_seqs: int) -> None:
        buffers, size = self._buffers, self._block_size
        for sequence in np.flatnonzero(buffers.copied_blocks[:n_seqs] >= 0):
            position = buffers.positions[buffers.query_start[sequence]]
            own = buffers.block_tables[sequence, position // size]
            self.cache.copy_block(int(buffers.copied_blocks[sequence]), int(own))

    def _padding_inputs(self, block_size: int) -> dict[str, Tensor]:
        padding = {name: torch.zeros_like(tensor) for name, tensor in self._inputs.items()}
        for name in ("query_start", "sample_rows"):
            torch.arange(len(padding[name]), out=padding[name])
        padding["context_lens"].fill_(1)
        padding["slots"].fill_(self.cache.spare_block * block_size)
        padding["block_tables"].fill_(self.cache.spare_block)
        padding["window_slots"].fill_(self.cache.spare_window_block * block_size)
        padding["window_tables"].fill_(self.cache.spare_window_block)
        return padding

    def _on_device(self, tables: Any) -> Any:
        if isinstance(tables, np.ndarray):
            return torch.from_numpy(tables).to(self._device)
        return [self._on_device(table) for table in tables]

    def _rotate_at(self, positions: Tensor) -> None:
        self.positions = positions
        self._step_ropes = [(cos[positions][:, None, :], sin[positions][:, None, :]) for cos, sin in self._ropes]
        self._step_scales = [scales[positions][:, None, None] for scales in self._query_scales]

    def _heads(self, rows: Tensor, shape: AttentionLayer, norm: TorchWeight | None) -> Tensor:
        """[T, heads, head_dim], each head normed, or all of a token together."""
        return (rows if norm is None else self.norm(rows, norm)).reshape(len(rows), -1, shape.head_dim)

    def _rotate(self, heads: Tensor, layer: int) -> Tensor:
        rope = self._places[layer][0]
        if rope is None:
            return heads
        cos, sin = self._step_ropes[rope]
        low, high = heads.float().chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(heads.dtype)

    def _send(self, target: NDArray[Any], rows: NDArray[np.intp], values: Tensor) -> None:
        self._outputs.append((target, rows, values.to("cpu", non_blocking=True)))


def _lengths(n_tokens: int, n_seqs: int, n_rows: int) -> dict[str, int]:
    """How many entries of each of STEP_INPUTS a step uses."""
    return {
        "token_ids": n_tokens,
        "positions": n_tokens,
        "slots": n_tokens,
        "query_start": n_seqs + 1,
        "context_lens": n_seqs,
        "block_tables": n_seqs,
        "sample_rows": n_rows,
        "window_slots": n_tokens,
        "window_tables": n_seqs,
    }
