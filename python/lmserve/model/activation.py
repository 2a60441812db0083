"""The functions between the linear layers of feed-forward networks, by the names that config.json gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lmserve.model.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Activation:
    """silu; sigmoid; gelu; gelu_tanh, gelu approximated with tanh; relu; relu2: max(x, 0)^2; or xielu (Huang and
    Schlag, 2024).

    xielu has parameters p, n and b: b * x, plus p * x^2 above 0 and n * (e^x - 1 - x) below.

    clamped_swiglu (gpt-oss) has parameters alpha and limit: x * sigmoid(alpha * x) of x up to limit; what it is
    multiplied with is within limit of 0, plus 1.
    """

    name: str
    parameters: tuple[float, ...] = ()


SILU: Final = Activation("silu")
SIGMOID: Final = Activation("sigmoid")
GELU: Final = Activation("gelu")
GELU_TANH: Final = Activation("gelu_tanh")
RELU: Final = Activation("relu")
RELU_SQUARED: Final = Activation("relu2")

NAMES: Final = {
    "silu": SILU,
    "swish": SILU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_new": GELU_TANH,
    "relu": RELU,
    "relu2": RELU_SQUARED,
}


def named_activation(name: object) -> Activation:
    """The activation that config.json's hidden_act names. Raises CheckpointError for one that there is not."""
    found = NAMES.get(str(name))
    if found is None:
        raise CheckpointError(f"config.json: activation {name!r} is not supported ({', '.join(NAMES)} are)")
    return found
