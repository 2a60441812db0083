"""The BERT encoder in torch: embeds token sequences, generates nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lmserve.model.checkpoint import Checkpoint
from lmserve.model.config import EncoderConfig
from lmserve.model.interface import F32, I32, LogitEdits
from lmserve.model.options import MemoryPlan
from lmserve.model.runner import allocate_buffers, runner_info
from lmserve.model.torch_attention import DTYPES

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class _Layer:
    query: _Linear
    key: _Linear
    value: _Linear
    attended: _Linear
    attention_norm: _LayerNorm
    inner: _Linear
    outer: _Linear
    norm: _LayerNorm


class EncoderRunner:
    """A `Runner` that only embeds. Sequences of a pass are padded to the longest."""

    def __init__(self, config: EncoderConfig, checkpoint: Checkpoint, plan: MemoryPlan) -> None:
        self.config = config
        self.buffers = allocate_buffers(plan)
        self._device, self._dtype = torch.device(plan.device), DTYPES[plan.dtype]
        self._checkpoint = checkpoint
        self._words, self._positions, types = (
            self._tensor(f"embeddings.{name}_embeddings.weight") for name in ("word", "position", "token_type")
        )
        # Every token is of the first segment.
        self._type = types[0]
        self._norm = self._layer_norm("embeddings.LayerNorm")
        self._layers = [self._layer(f"encoder.layer.{index}") for index in range(config.num_layers)]
        self.info = runner_info(checkpoint, plan, plan.weight_bytes)

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:  # noqa: ARG002
        """Refused: an encoder does not generate (`info.can_generate` says so)."""
        raise RuntimeError(f"{self.info.name} is an embedding model: it cannot generate")

    def collect(self) -> None:
        """Nothing is ever launched."""

    @torch.inference_mode()
    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        """[n, hidden] pooled, L2-normalised states of n sequences; see `Runner`.

        A pass has at most max_batch_tokens tokens, padding included, or one longer sequence.
        """
        sequences = np.split(token_ids, cu_seqlens[1:-1])
        # Like lengths together, so that little is padded.
        order = np.argsort(np.diff(cu_seqlens), kind="stable")
        embeddings = np.empty((len(sequences), self.config.hidden_size), np.float32)
        members: list[int] = []
        for index in order:
            if members and (len(members) + 1) * len(sequences[index]) > self.info.max_batch_tokens:
                embeddings[members] = self._embed_pass([sequences[member] for member in members])
                members = []
            members.append(int(index))
        embeddings[members] = self._embed_pass([sequences[member] for member in members])
        return embeddings

    def _embed_pass(self, sequences: list[I32]) -> F32:
        lengths = np.array([len(tokens) for tokens in sequences])
        seen = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
        padded = np.zeros(seen.shape, np.int64)
        padded[seen] = np.concatenate(sequences)
        mask = torch.from_numpy(seen).to(self._device)
        states = self._states(torch.from_numpy(padded).to(self._device), mask).float()
        if self.config.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        embeddings: F32 = functional.normalize(pooled, dim=-1).cpu().numpy()
        return embeddings

    def _states(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        n, length = token_ids.shape
        heads = (n, length, self.config.num_heads, -1)
        activation = ACTIVATIONS[self.config.activation]
        states = self._norm(functional.embedding(token_ids, self._words) + self._positions[:length] + self._type)
        for layer in self._layers:
            attended = functional.scaled_dot_product_attention(
                layer.query(states).view(heads).transpose(1, 2),
                layer.key(states).view(heads).transpose(1, 2),
                layer.value(states).view(heads).transpose(1, 2),
                attn_mask=mask[:, None, None, :],
            )
            attended = layer.attended(attended.transpose(1, 2).reshape(states.shape))
            states = layer.attention_norm(attended + states)
            states = layer.norm(layer.outer(activation(layer.inner(states))) + states)
        return states

    def _tensor(self, name: str) -> Tensor:
        values = np.array(self._checkpoint.tensors[name].dequantize(), copy=True)
        return torch.from_numpy(values).to(self._device, self._dtype)

    def _linear(self, name: str) -> _Linear:
        return _Linear(self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"))

    def _layer_norm(self, name: str) -> _LayerNorm:
        return _LayerNorm(self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"), self.config.layer_norm_eps)

    def _layer(self, name: str) -> _Layer:
        return _Layer(
            query=self._linear(f"{name}.attention.self.query"),
            key=self._linear(f"{name}.attention.self.key"),
            value=self._linear(f"{name}.attention.self.value"),
            attended=self._linear(f"{name}.attention.output.dense"),
            attention_norm=self._layer_norm(f"{name}.attention.output.LayerNorm"),
            inner=self._linear(f"{name}.intermediate.dense"),
            outer=self._linear(f"{name}.output.dense"),
            norm=self._layer_norm(f"{name}.output.LayerNorm"),
        )
