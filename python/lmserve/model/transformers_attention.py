"""The attention that models of transformers call in place of their own: over the paged cache of `TorchOps`.

transformers hands each attention layer's queries, keys and values to a function that is registered under a name (its
"attention interface"). The calls of one forward pass come in the order of the layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME: Final = "lmserve"

# (number of the call in its pass, module, query, key, value, what else the layer asks for) -> [1, T, heads, head_dim]
Attend = Callable[[int, Any, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


class _Pass(threading.local):
    attend: Attend | None = None
    calls: int = 0


_pass = _Pass()


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Forward passes of this thread call `attend` for each of their attentions."""
    _pass.attend, _pass.calls = attend, 0
    try:
        yield
    finally:
        _pass.attend = None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """[1, T, heads, head_dim] and no weights, of query [1, heads, T, head_dim], key and value [1, kv_heads, T, ...]."""
    if _pass.attend is None:
        raise RuntimeError("a model runs outside of a pass")
    number, _pass.calls = _pass.calls, _pass.calls + 1
    return _pass.attend(number, module, query, key, value, asked | {"attention_mask": attention_mask}), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def as_wide(value: Tensor, key: Tensor) -> Tensor:
    """The values with zeros behind them, where keys are wider (latent attention): the cache has one width for both."""
    return functional.pad(value, (0, key.shape[-1] - value.shape[-1]))
