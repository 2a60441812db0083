"""The small set of operations with which model files are written.

An implementation is chosen once, when a model is loaded: `torch` (reference, every device and dtype) or `cpu` (the
crate's own kernels). It is constructed as `Implementation(config: ModelConfig, cache: CacheConfig, buffers:
StepBuffers)` and owns everything whose layout it decides: the KV cache, rope tables, loaded weights and scratch memory.

A step is `begin`, then the operations in the order of the model file, then `sample`, then `finish`. T, S, R are the
step's n_tokens, n_seqs, n_rows. Activations (A) and weights (W) are opaque to the model file. An operation changes
only the activations that it consumes, as its description says. A consumed activation must not be used again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmserve.model.activation import Activation
from lmserve.model.config import ModelConfig
from lmserve.model.expert_tensors import ExpertSources
from lmserve.model.interface import LogitEdits
from lmserve.model.router import Router
from lmserve.model.tensors import TensorSource

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

ConvGate = Literal["none", "silu", "inputs"]
ScanRule = Literal["delta", "delta_tiled", "mamba"]

A = TypeVar("A")
W = TypeVar("W")


class Ops(Protocol[A, W]):
    """Operations of a decoder. Called from one thread."""

    config: ModelConfig
    device: str  # "cpu", "cuda:0": for people
    dtype: str  # of activations: "fp32", "bf16", "fp16"

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights loaded so far."""

    def load_linear(self, sources: Sequence[TensorSource], bias: Sequence[TensorSource] | None = None) -> W:
        """Weight of `linear`: sources [out_i, in] stacked along the output (fused q, k, v or gate, up), in this order.

        bias: one [out_i] source for each weight source, or None.
        """

    def load_embedding(self, source: TensorSource, *, head: bool) -> W:
        """Weight [vocab, hidden] of `embed`; with `head` (tied embeddings) it is given to `sample` as well."""

    def load_rms_norm(self, source: TensorSource, eps: float, parts: int = 1) -> W:
        """Weight [width] of an RMS norm: x * rsqrt(mean(x^2) + eps) * weight.

        Each of `parts` of a row is normed separately, with its part of the weight; only `norm` takes such a norm.
        """

    def load_layer_norm(self, source: TensorSource, bias: TensorSource | None, eps: float) -> W:
        """Weight and bias [width] of a layer norm: (x - mean(x)) * rsqrt(var(x) + eps) * weight + bias."""

    def load_heads(self, source: TensorSource) -> W:
        """Weight [heads, out, in] of `heads`."""

    def load_sinks(self, source: TensorSource) -> W:
        """The sinks [heads] of a layer's attention."""

    def load_distances(self, source: TensorSource) -> W:
        """What a layer's attention adds to scores by how far a key lies from its query, [heads, 2 * n - 1]: column
        n - 1 + d is of keys d tokens after it.
        """

    def load_router(
        self,
        source: TensorSource,
        router: Router,
        *,
        bias: TensorSource | None = None,
        correction: TensorSource | None = None,
        scale: TensorSource | None = None,
    ) -> W:
        """Weight [experts, hidden] of `route`, and bias [experts] of its logits; kept in fp32.

        For each expert, correction: what is added to the score that chooses it; scale: a factor of its weight.
        """

    def load_experts(self, sources: ExpertSources, activation: Activation, *, scaled_inputs: bool = False) -> W:
        """The experts of a layer. scaled_inputs: weights are multiplied with their inputs, and not their outputs."""

    def load_conv(self, source: TensorSource, bias: TensorSource | None = None) -> W:
        """Weight [channels, 1, kernel] and bias [channels] of `conv`."""

    def load_scan(
        self,
        decay: TensorSource,
        bias: TensorSource,
        skip: TensorSource | None = None,
        limits: tuple[float, float] = (0.0, math.inf),
    ) -> W:
        """Numbers [heads] of `scan`: what it calls decay, bias and skip, and the least and the most that dt may be."""

    def begin(self, n_tokens: int, n_seqs: int, n_rows: int) -> None:
        """Start a step over the first T, S, R entries of the buffers; the operations up to `finish` belong to it."""

    def begin_embed(self, token_ids: I32, cu_seqlens: I32, places: I32 | None = None) -> None:
        """Start a pass over n whole sequences (token_ids [T], cu_seqlens [n + 1]) from position 0 on; it ends with
        `pool`.

        `rope_and_cache` and `attention` then work on the pass's own keys and values: no block of the KV cache is
        touched.
        """

    def embed(self, w: W, scale: float = 1.0) -> A:
        """[T, hidden] embeddings of the step's token ids, times `scale`."""

    def embed_places(self, w: W) -> A:
        """[T, hidden] rows `places` of a table, of a pass over whole sequences."""

    def norm(self, x: A, w: W) -> A:
        """The norm of each row of x, of x's shape; of each of its parts as wide as w, where w is narrower."""

    def add_norm(self, x: A, residual: A, w: W, *, scale: float = 1.0) -> tuple[A, A]:
        """(the norm of the sum, the sum) of residual + x * scale. Consumes residual."""

    def add(self, x: A, residual: A, *, scale: float = 1.0) -> A:
        """residual + x * scale. Consumes residual."""

    def scale(self, x: A, factor: float) -> A:
        """x * factor. Consumes x."""

    def linear(self, x: A, w: W) -> A:
        """x [n, in] times the weight transposed, plus its bias: [n, out]."""

    def rope_and_cache(
        self, qkv: A, layer: int, q_norm: W | None = None, k_norm: W | None = None, v_norm: W | None = None
    ) -> A:
        """Split qkv [T, (heads + 2 * kv_heads) * head_dim] into q | k | v, rotate q and k, write k and v to the cache.

        What the layer is, its entry of the configuration's `attention` says; one that shares another's keys and values
        is given q alone. A norm comes first: of each head where it is head_dim wide, else of all heads of a token
        together. Rotation pairs element i with i + head_dim / 2. Token t goes to `slots[t]`. Consumes qkv; returns q,
        [T, heads * head_dim].
        """

    def heads(self, x: A, w: W, passed: int = 0) -> A:
        """[n, heads * (out + passed)] of x [n, heads * width]: the first `in` columns of each head times its own
        weight transposed, then the `passed` columns after them as they are.
        """

    def latent_and_cache(self, q: A, kv: A, layer: int, norm: W) -> A:
        """Of a layer with latent attention: norm the latent of kv [T, head_dim], rotate what follows it and the ends of
        the heads of q [T, heads * head_dim], and write kv to the cache as key and value. Consumes q and kv; returns q.
        """

    def attention(self, q: A, layer: int, sinks: W | None = None, distances: W | None = None) -> A:
        """Attention of q [T, heads * head_dim] over the layer's cache: [T, heads * head_dim].

        Token t of sequence s sees the cache positions 0 ..= positions[t] of `block_tables[s]`, where the layer has a
        window the last so many of them; a layer that is not causal, of whole sequences, those after it too. A sink is
        one more score of its head, whose value is zero. Distances are of whole sequences alone.
        """

    def gated(self, gate_up: A, activation: Activation) -> A:
        """activation(gate) * up of gate_up [n, 2 * width] = gate | up: [n, width]."""

    def activate(self, x: A, activation: Activation, factor: A | None = None, start: int = 0) -> A:
        """activation(x) [n, width], times the columns start .. start + width of `factor`, if there is one."""

    def route(self, x: A, w: W) -> A:
        """[n, 2 * top_k] of x [n, hidden], in fp32: numbers of the experts that w chooses, then their weights."""

    def experts(self, x: A, routing: A, w: W) -> A:
        """[n, hidden] of x [n, hidden]: the sum over the experts of `routing` of each's weight times
        down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate, in the order of the choice.
        """

    def conv(self, x: A, layer: int, w: W, gate: ConvGate = "none") -> A:
        """Causal convolution of each channel of x [T, channels] over a sequence's last `kernel` tokens: of x's shape.

        `layer` is an entry of the configuration's `recurrent`. gate: "silu": silu of the outcome; "inputs": x is
        b | c | input, [T, 3 * channels], and the outcome c * conv(b * input).
        """

    def scan(self, x: A, gates: A, layer: int, w: W, rule: ScanRule) -> A:
        """A recurrence over the matrices [rows, columns] of a layer's heads: [T, heads * columns].

        For each token, S becomes e^(decay * dt) S + k u, and the output is q S, with dt = softplus(gate + bias).
        "mamba" (Mamba-2, Dao and Gu 2024): x is v | k | q, gates [T, heads] are of dt, u is dt * v, and skip * v comes
        to the output. "delta" (gated delta rule, Yang et al. 2024): x is q | k | v, gates [T, 2 * heads] are b | dt, q
        and k are divided by their lengths and q by sqrt(rows), and u is sigmoid(b) * (v - k e^(decay * dt) S).

        There may be fewer heads of q and k than of v; the first goes with the first few of v, and so on, but in
        "delta_tiled" head h of v goes with head h % n of n. `layer` is an entry of the configuration's `recurrent`.
        """

    def gate_rows(self, x: A, gates: A) -> A:
        """Each row of x times sigmoid(its row of gates [n, 1]). Consumes x."""

    def rows(self, x: A) -> A:
        """[R, width]: the rows `sample_rows` of x [T, width]."""

    def sample(self, x: A, head: W, edits: LogitEdits | None) -> None:
        """Start writing `sampled` (and the logprob arrays) from x [R, hidden], the sampled rows after the final norm.

        Logits are x times head transposed, scaled and capped as the configuration says; `lmserve.model.sampler` defines
        what is sampled from them.
        """

    def finish(self) -> None:
        """Wait until the outputs of `sample` are in the buffers."""

    def pool(self, x: A, pooling: str) -> F32:
        """[n, hidden] of x [T, hidden] after `begin_embed`: each sequence pooled; see `embedding.POOLINGS`."""

    def logits(self, x: A, head: W) -> F32:
        """[R, vocab] raw logits of x [R, hidden], for tests and evaluation. Does not consume x."""


class DraftOps(Ops[A, W], Protocol[A, W]):
    """Operations that also compute a head which guesses a token ahead, after a step's rows were sampled.

    A step is `begin`, the operations of the model, `begin_draft` in place of `sample`, the operations of the head, then
    `draft`.
    """

    def begin_draft(self, x: A, head: W, edits: LogitEdits | None) -> None:
        """`sample`, after which the step goes on."""

    def embed_next(self, w: W, scale: float = 1.0) -> A:
        """[T, hidden]: the rows of the tokens that follow the step's ones, times `scale`; sampled ones are known."""

    def join(self, a: A, b: A) -> A:
        """[n, width a + width b]: the columns of both."""

    def draft(self, x: A, head: W) -> None:
        """Write `drafts`: the tokens of the largest logits that head makes of x [R, hidden]."""
