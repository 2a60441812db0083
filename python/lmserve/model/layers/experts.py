"""Mixtures of experts: a router, the experts it chooses among, and what some families have beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.activation import SILU, Activation
from lmserve.model.expert_tensors import ExpertSources
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, PlainMlp, gated_mlp, plain_mlp
from lmserve.model.ops import Ops
from lmserve.model.router import Router

A = TypeVar("A")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class Experts(Generic[W]):
    """Loaded weights; `shared`: of the network that every token passes beside its experts, if there is one.

    `shared_gate`: of the linear layer whose sigmoid that network's output is multiplied with. `latent`: of the linear
    layers before and after experts that are not of the model's width.
    """

    router: W
    experts: W
    shared: GatedMlp[W] | PlainMlp[W] | None = None
    shared_gate: W | None = None
    activation: Activation = SILU
    latent: tuple[W, W] | None = None


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Numbers of a layer's experts: how many, and their width."""

    count: int
    inner: int


def load_router(
    load: Loader[A, W],
    name: str,
    router: Router,
    experts: int,
    hidden_size: int,
    *,
    bias: bool = False,
    correction: str | None = None,
    scale: str | None = None,
) -> W:
    """The router's matrix, and its bias; `correction` and `scale` name its numbers for each expert."""
    return load.ops.load_router(
        load.tensor(f"{name}.weight", (experts, hidden_size)),
        router.check(experts),
        bias=load.tensor(f"{name}.bias", (experts,)) if bias else None,
        correction=None if correction is None else load.tensor(correction, (experts,)),
        scale=None if scale is None else load.tensor(scale, (experts,)),
    )


def load_experts(
    load: Loader[A, W],
    sizes: ExpertSizes,
    hidden_size: int,
    activation: Activation = SILU,
    *,
    gate: bool = True,
    bias: bool = False,
    scaled_inputs: bool = False,
) -> W:
    """gate_proj, if there is one, up_proj and down_proj of all experts; see `lmserve.model.families.expert_tensors`."""
    count, inner = sizes.count, sizes.inner
    biases = None
    if bias:
        biases = (
            load.tensor("gate_proj.bias", (count, inner)),
            load.tensor("up_proj.bias", (count, inner)),
            load.tensor("down_proj.bias", (count, hidden_size)),
        )
    sources = ExpertSources(
        load.tensor("gate_proj.weight", (count, inner, hidden_size)) if gate else None,
        load.tensor("up_proj.weight", (count, inner, hidden_size)),
        load.tensor("down_proj.weight", (count, hidden_size, inner)),
        biases,
    )
    return load.ops.load_experts(sources, activation, scaled_inputs=scaled_inputs)


def mixture(ops: Ops[A, W], x: A, weights: Experts[W]) -> A:
    """What the chosen experts make of x, weighted and added, and what the shared network makes of it."""
    routing = ops.route(x, weights.router)
    if weights.latent is None:
        mixed = ops.experts(x, routing, weights.experts)
    else:
        before, after = weights.latent
        mixed = ops.linear(ops.experts(ops.linear(x, before), routing, weights.experts), after)
    if weights.shared is None:
        return mixed
    if isinstance(weights.shared, PlainMlp):
        shared = plain_mlp(ops, x, weights.shared, weights.activation)
    else:
        shared = gated_mlp(ops, x, weights.shared, weights.activation)
    if weights.shared_gate is not None:
        shared = ops.gate_rows(shared, ops.linear(x, weights.shared_gate))
    return ops.add(shared, mixed)
