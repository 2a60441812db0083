"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

LoraName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][\w.:/-]*$")]


class LoadLoraRequest(Struct, frozen=True, kw_only=True):
    """An adapter to load. Unknown keys are ignored."""

    lora_name: Annotated[LoraName, Meta(description="The name that requests choose it by, as model.", examples=["sql"])]
    lora_path: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=4096,
            description="Its folder, below the folder of --lora-dir: relative to that, or absolute.",
            examples=["sql-v2"],
        ),
    ]


class UnloadLoraRequest(Struct, frozen=True, kw_only=True):
    """An adapter to unload. Unknown keys are ignored."""

    lora_name: Annotated[LoraName, Meta(description="The adapter's name.", examples=["sql"])]
    lora_int_id: Annotated[Any, Meta(description="vLLM's number of it has no effect.")] = None
