"""The shape of every error reply: OpenAI's."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class ErrorObject(Struct, frozen=True):
    """Why a request failed. It may have further keys: numbers that a client can use, such as `context_length`."""

    message: Annotated[str, Meta(description="What went wrong, the limit, and what was given.")]
    type: Annotated[str, Meta(examples=["invalid_request_error"])]
    param: Annotated[str | None, Meta(description="The field at fault, if there is one.", examples=["temperature"])]
    code: Annotated[str, Meta(description="Machine-readable reason.", examples=["invalid_value"])]


class ErrorReply(Struct, frozen=True):
    """An error reply, on every route."""

    error: ErrorObject


class GenerateErrorReply(Struct, frozen=True):
    """An error reply of /generate: the usual one, with the keys that LMDeploy's clients read."""

    error: ErrorObject
    message: str
    object: Annotated[str, Meta(examples=["error"])]
