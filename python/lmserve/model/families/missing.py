"""Which part of a model that is not supported there is no computation for, by the keys of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# The first key that is there and not 0 tells.
PARTS: Final = (
    (("is_encoder_decoder",), "an encoder beside the decoder"),
    (
        ("linear_num_value_heads", "mamba_d_state", "ssm_state_size", "state_size", "conv_L_cache", "rwkv_version"),
        "layers with a recurrent state",
    ),
    (("alibi", "n_positions"), "positions that are learned or of another kind than rotation"),
)


def missing_part(raw: Mapping[str, Any]) -> str | None:
    """What a model with this config.json needs and lmserve does not compute, where its keys tell."""
    inner = raw.get("text_config")
    for keys, part in PARTS:
        if any(source.get(key) for source in (raw, inner) if isinstance(source, Mapping) for key in keys):
            return part
    return None
