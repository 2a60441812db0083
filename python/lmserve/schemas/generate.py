"""`POST /generate`: LMDeploy's session API of August 2023."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import (
    ANONYMOUS,
    MAX_MESSAGES,
    MAX_TOKENS,
    Role,
    SessionId,
    SessionModel,
    StopString,
    Text,
)
from lmserve.schemas.errors import ErrorObject
from lmserve.schemas.lmdeploy import LmdeploySampling
from lmserve.schemas.retention import Retention


class Message(Struct, frozen=True):
    """One message of a whole conversation."""

    role: Role
    content: Text


class GenerateRequest(LmdeploySampling, frozen=True, kw_only=True):
    """One turn of a session. Unknown keys are ignored."""

    prompt: Annotated[
        Text | Annotated[list[Message], Meta(max_length=MAX_MESSAGES)],
        Meta(
            description="A string is one user turn and is rendered with the chat template. A list is a whole "
            "conversation.",
            examples=["Hi, how are you?"],
        ),
    ]
    model: SessionModel = None
    instance_id: Annotated[
        SessionId,
        Meta(description="The id of the session. -1: an anonymous session that ends with this turn.", examples=[7]),
    ] = ANONYMOUS
    sequence_start: Annotated[
        bool | UnsetType,
        Meta(
            description="True begins a new session and drops a live one with this id; if this field was left out, the "
            "reply then has a warning. False continues the session with its history.",
            extra_json_schema={"default": True},
        ),
    ] = UNSET
    sequence_end: Annotated[
        bool, Meta(description="Run this turn with the session's history, then drop the session.")
    ] = False
    stream: Annotated[
        bool, Meta(description="Reply in frames. Each frame is a JSON object followed by one NUL byte.")
    ] = False
    request_output_len: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_TOKENS,
            description="Maximum number of tokens to generate. 0 appends the turn and generates nothing.",
        ),
    ] = 512
    stop: Annotated[
        bool, Meta(description="Cancel the session's running turn. The tokens generated so far are kept.")
    ] = False
    stop_words: Annotated[
        Annotated[list[StopString], Meta(max_length=64)] | None,
        Meta(description="Strings that end the text. They are not part of it."),
    ] = None
    on_disconnect: Annotated[
        Literal["rollback", "keep"],
        Meta(
            description="What to do if the client disconnects: roll the turn back, or keep the tokens generated so far."
        ),
    ] = "rollback"
    on_overflow: Annotated[
        Literal["error", "truncate_output", "drop_oldest_turns"],
        Meta(description="What to do if history, input and output together exceed the context."),
    ] = "error"
    retention: Annotated[
        Retention | None,
        Meta(description="How long the session's KV cache will be needed after this turn. Null: unknown."),
    ] = None


class GenerateUsage(Struct, frozen=True):
    """Tokens of a turn."""

    prompt_tokens: Annotated[int, Meta(description="Tokens of history and input together.")]
    history_tokens: Annotated[int, Meta(description="Prompt tokens that are the session's history.")]
    cached_tokens: Annotated[int, Meta(description="Of the prompt: not computed again.")]
    completion_tokens: int


class GenerateReply(Struct, frozen=True, kw_only=True):
    """A frame of the stream, or the whole reply."""

    text: Annotated[str, Meta(description="The text since the last frame; without `stream`, the whole text.")]
    tokens: Annotated[int, Meta(description="Tokens generated in this turn so far.")]
    finish_reason: Annotated[
        Literal["stop", "length", "abort", "error"] | None, Meta(description="Null in all frames but the last.")
    ]
    usage: Annotated[GenerateUsage | UnsetType, Meta(description="Present in the last frame.")] = UNSET
    warnings: Annotated[
        list[str] | UnsetType,
        Meta(
            description="Present in the last frame, if there is something that the client should know: for example, "
            "that a live session was dropped."
        ),
    ] = UNSET
    error: Annotated[ErrorObject | UnsetType, Meta(description="Present if finish_reason is `error`.")] = UNSET
