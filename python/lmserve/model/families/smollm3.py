"""SmolLM3: Llama, of which every fourth layer does not rotate."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, gguf_fields, hf_fields, hf_windows
from lmserve.model.families.llama import Llama
from lmserve.model.gguf_source import GgufModel

DEFAULTS: dict[str, Any] = {"num_key_value_heads": 4, "use_sliding_window": False}
PERIOD = 4


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | raw
    fields = hf_fields("smollm3", raw, default_theta=2e6, tied=True)
    period = int(raw.get("no_rope_layer_interval") or PERIOD)
    rotated = raw.get("no_rope_layers") or [(index + 1) % period for index in range(fields["num_layers"])]
    bias = bool(raw.get("attention_bias", False))
    windows = hf_windows(raw)
    if raw.get("layer_types") is None:
        windows = [window if not rotates else None for window, rotates in zip(windows, rotated, strict=True)]
    return ModelConfig(
        **fields,
        attention=attention_layers(
            fields, windows=windows, ropes=[fields["rope"] if rotates else None for rotates in rotated]
        ),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _gguf_config(file: GgufModel) -> ModelConfig:
    fields = gguf_fields("smollm3", file)
    ropes = [fields["rope"] if (index + 1) % PERIOD else None for index in range(fields["num_layers"])]
    return ModelConfig(**fields, attention=attention_layers(fields, ropes=ropes))


FAMILY = Family(
    name="smollm3",
    kind="generate",
    hf_architectures=("SmolLM3ForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
    gguf_architecture="smollm3",
    gguf_config=_gguf_config,
    gguf_interleaved_rope=True,
)
