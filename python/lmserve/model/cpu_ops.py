"""The `cpu` implementation of `Ops`: it records what a model file does, for the native decoder to run in every step.

A step is then one call into the core, without the GIL: no torch, and no Python between embedding and sampled token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from lmserve._core import CpuArrays, CpuModel, CpuProgram
from lmserve.model.activation import Activation
from lmserve.model.config import CacheConfig, ModelConfig
from lmserve.model.expert_tensors import ExpertSources, split
from lmserve.model.interface import F32, I32, LogitEdits, StepBuffers
from lmserve.model.linears import Linears
from lmserve.model.ops import ConvGate, ScanRule
from lmserve.model.options import head_format
from lmserve.model.repacked import repacked
from lmserve.model.rope import position_tables
from lmserve.model.router import Router
from lmserve.model.tensors import QUANTIZED_TYPES, REPACKED_TYPES, TensorSource

# (type, bytes, rows, columns, bias) of a matrix.
Part = tuple[str, NDArray[np.uint8], int, int, NDArray[np.float32] | None]
# Bytes of experts as floats that are given to the core at a time.
FLOATS_AT_ONCE = 256 << 20


class CpuOps:
    """`Ops` with A and W the numbers of recorded values and of loaded weights."""

    device = "cpu"
    dtype = "fp32"

    def __init__(
        self, config: ModelConfig, cache: CacheConfig, buffers: StepBuffers, *, threads: int, quantize: str | None
    ) -> None:
        """Allocate the cache, whose dtype is "fp32", "fp16" or "int8".

        quantize: "q8", "q4" or "none" (fp32) for all matrices; None keeps each as it is stored.
        The environment variable LMSERVE_CPU_ISA, such as "avx2", limits it to older instructions.
        """
        tables = position_tables(config.attention, cache.max_model_len)
        self.config = config
        self.core = CpuModel(
            vocab_size=config.vocab_size,
            layers=config.attention,
            recurrent=config.recurrent,
            state_slots=cache.state_slots,
            positions=cache.max_model_len,
            ropes=[(cos.reshape(-1), sin.reshape(-1)) for cos, sin in tables.ropes],
            query_scales=tables.query_scales,
            places=tables.places,
            logits_scale=None if config.logits_scale == 1 else config.logits_scale,
            logits_softcap=config.logits_softcap,
            kv_dtype=cache.dtype,
            block_size=cache.block_size,
            num_blocks=cache.num_blocks,
            num_window_blocks=cache.num_window_blocks,
            threads=threads,
            isa=os.environ.get("LMSERVE_CPU_ISA"),
        )
        self.arrays = CpuArrays(buffers)
        self.program = CpuProgram(self.core)
        self.kept: Callable[[], None] = lambda: None  # called when a weight is packed, and written where one is
        self.head = -1  # the weight that the last recorded `sample` takes its logits from
        self._quantize = quantize
        self._vocab_size = config.vocab_size
        self._loads = 0
        self.linears: Linears[int] = Linears()

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights loaded so far."""
        return self.core.weight_bytes

    def load_linear(self, sources: Sequence[TensorSource], bias: Sequence[TensorSource] | None = None) -> int:
        biases: Sequence[TensorSource | None] = [None] * len(sources) if bias is None else bias
        is_head = len(sources) == 1 and sources[0].shape[0] == self._vocab_size
        number = self._add_linear(sources, biases, head_format(self._quantize) if is_head else self._quantize)
        self.linears.add(number, sources)
        return number

    def load_embedding(self, source: TensorSource, *, head: bool) -> int:
        del head  # rows are looked up in the layout of a linear layer
        return self._add_linear([source], [None], head_format(self._quantize))

    def load_rms_norm(self, source: TensorSource, eps: float, parts: int = 1) -> int:
        return self.core.add_norm(_floats(source), eps, parts=parts)

    def load_layer_norm(self, source: TensorSource, bias: TensorSource | None, eps: float) -> int:
        return self.core.add_norm(_floats(source), eps, bias=None if bias is None else _floats(bias), centered=True)

    def load_heads(self, source: TensorSource) -> int:
        label = self._label(source)
        number = self.core.map_heads(label)
        if number is None:
            parts = [self._part(head, None, self._quantize) for head in split(source)]
            number = self.core.add_heads(parts, self._quantize)
            self._keep(number, label)
        return number

    def load_sinks(self, source: TensorSource) -> int:
        return self.core.add_sinks(_floats(source))

    def load_distances(self, source: TensorSource) -> int:
        return self.core.add_distances(_floats(source), source.shape[0])

    def load_router(
        self,
        source: TensorSource,
        router: Router,
        *,
        bias: TensorSource | None = None,
        correction: TensorSource | None = None,
        scale: TensorSource | None = None,
    ) -> int:
        # Whatever the other weights are rounded to: which experts are chosen hangs on it.
        rows, columns = source.shape
        part = ("F32", _bytes(source.dequantize()), rows, columns, None if bias is None else _floats(bias))
        numbers = (None if given is None else _floats(given) for given in (correction, scale))
        return self.core.add_router(part, router, *numbers)

    def load_experts(self, sources: ExpertSources, activation: Activation, *, scaled_inputs: bool = False) -> int:
        given = [source for source in (sources.gate, sources.up, sources.down) if source is not None]
        number = self.core.add_experts(activation.name, activation.parameters, scaled_inputs=scaled_inputs)
        label = self._label(*given)
        if self.core.map_experts(number, label, sources.gate is not None):
            return number
        weights = [split(source) for source in given]
        biases = [[None] * len(weights[0])] * 3 if sources.biases is None else [split(bias) for bias in sources.biases]
        # A few at a time: those that become floats first take more memory for all than there may be.
        step = max(1, FLOATS_AT_ONCE // (12 * weights[0][0].shape[0] * weights[0][0].shape[1]))
        for first in range(0, len(weights[0]), step):
            some = slice(first, first + step)
            parts: list[Sequence[Part | None]] = [
                [self._part(source, bias, self._quantize) for source, bias in zip(each[some], own[some], strict=True)]
                for each, own in zip(weights, biases[-len(weights) :], strict=True)
            ]
            if sources.gate is None:
                parts.insert(0, [None] * len(parts[0]))
            self.core.extend_experts(number, list(zip(*parts, strict=True)), self._quantize)
        self._keep(number, label)
        return number

    def load_conv(self, source: TensorSource, bias: TensorSource | None = None) -> int:
        return self.core.add_conv(_floats(source), source.shape[-1], None if bias is None else _floats(bias))

    def load_scan(
        self,
        decay: TensorSource,
        bias: TensorSource,
        skip: TensorSource | None = None,
        limits: tuple[float, float] = (0.0, math.inf),
    ) -> int:
        return self.core.add_scan(_floats(decay), _floats(bias), None if skip is None else _floats(skip), limits)

    def begin(self, n_tokens: int, n_seqs: int, n_rows: int) -> None:
        """Start recording a step, whatever its sizes."""
        del n_tokens, n_seqs, n_rows
        self.program = CpuProgram(self.core)

    def begin_embed(self, token_ids: I32, cu_seqlens: I32, places: I32 | None = None) -> None:
        """Start recording a pass over whole sequences, whatever they are."""
        del token_ids, cu_seqlens, places
        self.program = CpuProgram(self.core)

    def embed(self, w: int, scale: float = 1.0) -> int:
        return self.program.embed(w, scale)

    def embed_places(self, w: int) -> int:
        return self.program.embed_places(w)

    def norm(self, x: int, w: int) -> int:
        return self.program.norm(x, w)

    def add_norm(self, x: int, residual: int, w: int, *, scale: float = 1.0) -> tuple[int, int]:
        return self.program.add_and_norm(x, residual, w, scale)

    def add(self, x: int, residual: int, *, scale: float = 1.0) -> int:
        return self.program.add(x, residual, scale)

    def scale(self, x: int, factor: float) -> int:
        return self.program.scale(x, factor)

    def linear(self, x: int, w: int) -> int:
        return self.program.linear(x, w)

    def rope_and_cache(
        self, qkv: int, layer: int, q_norm: int | None = None, k_norm: int | None = None, v_norm: int | None = None
    ) -> int:
        return self.program.rope_and_cache(qkv, layer, (q_norm, k_norm, v_norm))

    def heads(self, x: int, w: int, passed: int = 0) -> int:
        return self.program.heads(x, w, passed)

    def latent_and_cache(self, q: int, kv: int, layer: int, norm: int) -> int:
        return self.program.latent_cache(q, kv, layer, norm)

    def attention(self, q: int, layer: int, sinks: int | None = None, distances: int | None = None) -> int:
        return self.program.attention(q, layer, sinks, distances)

    def gated(self, gate_up: int, activation: Activation) -> int:
        return self.program.activate(gate_up, activation.name, activation.parameters, gated=True)

    def activate(self, x: int, activation: Activation, factor: int | None = None, start: int = 0) -> int:
        return self.program.activate(x, activation.name, activation.parameters, factor=factor, start=start)

    def route(self, x: int, w: int) -> int:
        return self.program.route(x, w)

    def experts(self, x: int, routing: int, w: int) -> int:
        return self.program.experts(x, routing, w)

    def conv(self, x: int, layer: int, w: int, gate: ConvGate = "none") -> int:
        return self.program.conv(x, layer, w, gate)

    def scan(self, x: int, gates: int, layer: int, w: int, rule: ScanRule) -> int:
        return self.program.scan(x, gates, layer, w, rule)

    def gate_rows(self, x: int, gates: int) -> int:
        return self.program.gate_rows(x, gates)

    def rows(self, x: int) -> int:
        return self.program.rows(x)

    def sample(self, x: int, head: int, edits: LogitEdits | None) -> None:
        """End the recording of a step."""
        del edits
        self.program.finish(x)
        self.head = head

    def begin_draft(self, x: int, head: int, edits: LogitEdits | None) -> None:
        """See `DraftOps`."""
        del edits
        self.program.begin_draft(x)
        self.head = head

    def embed_next(self, w: int, scale: float = 1.0) -> int:
        return self.program.embed_next(w, scale)

    def join(self, a: int, b: int) -> int:
        return self.program.join(a, b)

    def draft(self, x: int, head: int) -> None:
        """End the recording of a step whose rows are sampled."""
        self.program.draft(x, head)

    def end_embed(self, x: int) -> None:
        """End the recording of a pass over whole sequences, of which x is to be pooled."""
        self.program.finish(x)

    def finish(self) -> None:
        """A step has run when its call returns."""

    def pool(self, x: int, pooling: str) -> NoReturn:
        """Not while recording; `CpuRunner.embed` pools."""
        raise NotImplementedError(f"value {x} is recorded, and has no rows yet of which to take the {pooling}")

    def logits(self, x: int, head: int) -> NoReturn:
        """Not while recording; `CpuRunner.logits` has those of the last step."""
        raise NotImplementedError(f"value {x} is recorded, and has no logits of weight {head} yet")

    def _add_linear(
        self, sources: Sequence[TensorSource], biases: Sequence[TensorSource | None], quantize: str | None
    ) -> int:
        label = self._label(*sources)
        number = self.core.map_linear(label)
        if number is None:
            parts = [self._part(source, bias, quantize) for source, bias in zip(sources, biases, strict=True)]
            number = self.core.add_linear(parts, quantize)
            self._keep(number, label)
        return number

    def _label(self, *sources: TensorSource) -> str:
        """What a packed weight is called in a file. Names may occur twice, but the order of loading is always one."""
        self._loads += 1
        return " ".join([str(self._loads), *(f"{source.name}{list(source.shape)}" for source in sources)])

    def _keep(self, number: int, label: str) -> None:
        self.core.keep(number, label)
        self.kept()

    @staticmethod
    def _part(source: TensorSource, bias: TensorSource | None, quantize: str | None) -> Part:
        dtype, values = _stored(source, quantize)
        rows, columns = source.shape
        return dtype, values, rows, columns, None if bias is None else _floats(bias)


def _stored(source: TensorSource, quantize: str | None) -> tuple[str, NDArray[np.uint8]]:
    """A weight's type and bytes as the core packs them: as stored, or as floats to be rounded."""
    if quantize is not None and source.dtype in QUANTIZED_TYPES:
        return "F32", _bytes(source.dequantize())
    if source.dtype in REPACKED_TYPES:
        blocks = repacked(source)
        if blocks is None:
            return "F32", _bytes(source.dequantize())
        return REPACKED_TYPES[source.dtype], _bytes(blocks)
    raw = source.raw()
    if source.dtype == "MXFP4" and not _fits_half_precision(raw):
        return "F32", _bytes(source.dequantize())
    return source.dtype, _bytes(raw)


def _fits_half_precision(blocks: NDArray[np.uint8]) -> bool:
    """Whether half precision has the scales of all blocks of MXFP4 but zeros: powers of two from 2^-24 to 2^15."""
    each = blocks.reshape(-1, 17)
    exponents = each[:, 0]
    odd = (exponents < 128 - 24) | (exponents > 128 + 15)
    return not odd.any() or not (each[odd, 1:] & 0x77).any()


def _bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _floats(source: TensorSource) -> F32:
    return np.ascontiguousarray(source.dequantize(), dtype=np.float32).reshape(-1)
