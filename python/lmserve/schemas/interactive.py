"""`POST /v1/chat/interactive`: the last of LMDeploy's routes that had sessions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import (
    ANONYMOUS,
    MAX_MESSAGES,
    MAX_TOKENS,
    MinTokens,
    SessionId,
    StopStrings,
    Text,
)
from lmserve.schemas.errors import ErrorObject
from lmserve.schemas.generate import Message
from lmserve.schemas.lmdeploy import LmdeploySampling


class InteractiveRequest(LmdeploySampling, frozen=True, kw_only=True):
    """One turn, with or without a session. Unknown keys are ignored."""

    prompt: Annotated[
        Text | Annotated[list[Message], Meta(max_length=MAX_MESSAGES)],
        Meta(description="A string is one user turn. A list holds messages.", examples=["Hi, how are you?"]),
    ]
    session_id: Annotated[
        SessionId, Meta(description="The id of the session. -1: a session that ends with this turn.", examples=[7])
    ] = ANONYMOUS
    interactive_mode: Annotated[
        bool,
        Meta(description="Keep the session after this turn. False: the session and its history end with this turn."),
    ] = False
    stream: Annotated[bool, Meta(description="Reply in lines. Each line is a JSON object.")] = False
    stop: Annotated[
        bool | StopStrings | None,
        Meta(
            description="Strings that end the text. They are not part of it. True has the effect of cancel; false has "
            "none."
        ),
    ] = None
    request_output_len: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None,
        Meta(description="Maximum number of tokens to generate. Null: as many as fit into the context."),
    ] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leave special tokens out of the text. Null: true.")
    ] = None
    spaces_between_special_tokens: Annotated[bool | None, Meta(description="Accepted, but has no effect.")] = None
    cancel: Annotated[
        bool | None, Meta(description="Cancel the session's running turn. The tokens generated so far are kept.")
    ] = None
    adapter_name: Annotated[Any, Meta(description="Not supported. A value other than null is a 400.")] = None
    image_url: Annotated[
        Any, Meta(description="Not supported: the models are text-only. A value other than null is a 400.")
    ] = None
    min_new_tokens: Annotated[
        MinTokens | None, Meta(description="Do not sample an end or stop token before this many tokens.")
    ] = None


class InteractiveReply(Struct, frozen=True, kw_only=True):
    """A line of the stream, or the whole reply."""

    text: Annotated[str, Meta(description="The text since the last frame; without `stream`, the whole text.")]
    tokens: Annotated[int, Meta(description="Tokens generated in this turn so far.")]
    input_tokens: Annotated[int, Meta(description="Tokens of this turn's input.")]
    history_tokens: Annotated[int, Meta(description="Tokens that the session had before this turn.")]
    finish_reason: Annotated[
        Literal["stop", "length", "abort", "error"] | None, Meta(description="Null in all lines but the last.")
    ]
    error: Annotated[ErrorObject | UnsetType, Meta(description="Present if finish_reason is `error`.")] = UNSET
