"""`GET /version` and `GET /props`: what runs here."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class VersionReply(Struct, frozen=True):
    """The version of lmserve."""

    version: str


class GenerationSettings(Struct, frozen=True):
    """What a request gets unless it says otherwise, as far as it is the server's to say."""

    n_ctx: Annotated[int, Meta(description="Tokens that a sequence may hold, history and output together.")]


class Modalities(Struct, frozen=True):
    """What a message may hold besides text."""

    vision: Literal[False] = False
    audio: Literal[False] = False


class PropsReply(Struct, frozen=True, kw_only=True):
    """The served model, under llama.cpp's names."""

    default_generation_settings: GenerationSettings
    model_alias: Annotated[str, Meta(description="The name in replies.")]
    chat_template: Annotated[str, Meta(description="Empty where the model has none.")]
    modalities: Modalities
    build_info: str
