"""`GET /version` and `GET /props`: what runs here."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class VersionReply(Struct, frozen=True):
    """The version of lmserve."""

    version: str


class GenerationSettings(Struct, frozen=True):
    """The server's defaults for requests."""

    n_ctx: Annotated[int, Meta(description="Maximum number of tokens of a sequence, including history and output.")]


class Modalities(Struct, frozen=True):
    """What a message may contain besides text."""

    vision: Literal[False] = False
    audio: Literal[False] = False


class PropsReply(Struct, frozen=True, kw_only=True):
    """The served model, with llama.cpp's field names."""

    default_generation_settings: GenerationSettings
    model_alias: Annotated[str, Meta(description="The model's name in replies.")]
    chat_template: Annotated[str, Meta(description="Empty if the model has none.")]
    modalities: Modalities
    build_info: str
