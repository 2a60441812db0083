"""`POST /generate`: LMDeploy's session API of August 2023."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import (
    ANONYMOUS,
    MAX_MESSAGES,
    MAX_TOKENS,
    MinP,
    RepetitionPenalty,
    Role,
    Seed,
    SessionId,
    StopString,
    Temperature,
    Text,
    TopK,
    TopP,
)
from lmserve.schemas.errors import ErrorObject
from lmserve.schemas.retention import Retention


class Message(Struct, frozen=True):
    """One message of a whole conversation."""

    role: Role
    content: Text


class GenerateRequest(Struct, frozen=True, kw_only=True):
    """One turn of a session. Unknown keys are ignored."""

    prompt: Annotated[
        Text | Annotated[list[Message], Meta(max_length=MAX_MESSAGES)],
        Meta(
            description="A string is one user turn, put through the chat template; a list is a whole conversation.",
            examples=["Hi, how are you?"],
        ),
    ]
    instance_id: Annotated[
        SessionId, Meta(description="The session. -1: an anonymous one that ends with its turn.", examples=[7])
    ] = ANONYMOUS
    sequence_start: Annotated[
        bool | UnsetType,
        Meta(
            description="First turn: a live session is dropped, of which the reply has a warning where this is left "
            "out. False: its history goes before the turn.",
            extra_json_schema={"default": True},
        ),
    ] = UNSET
    sequence_end: Annotated[bool, Meta(description="Run this turn with its history, then drop the session.")] = False
    stream: Annotated[bool, Meta(description="Reply in frames, each a JSON object and one NUL byte.")] = False
    request_output_len: Annotated[
        int, Meta(ge=0, le=MAX_TOKENS, description="Most tokens to generate; 0 appends the turn and generates nothing.")
    ] = 512
    top_p: Annotated[TopP, Meta(description="Only the likeliest tokens whose probabilities add up to this.")] = 0.8
    top_k: Annotated[TopK, Meta(description="Only the k likeliest tokens; 0 or -1: all.")] = 40
    temperature: Annotated[Temperature, Meta(description="0 is greedy.")] = 0.8
    repetition_penalty: Annotated[
        RepetitionPenalty, Meta(description="Makes tokens of prompt and output less likely; 1 is off.")
    ] = 1.0
    ignore_eos: Annotated[bool, Meta(description="Never stop at an end token.")] = False
    stop: Annotated[bool, Meta(description="Cancel the session's running turn; what it generated is kept.")] = False
    seed: Annotated[Seed | None, Meta(description="The same seed gives the same tokens; null: random.")] = None
    min_p: Annotated[MinP, Meta(description="Only tokens this likely, relative to the likeliest.")] = 0.0
    stop_words: Annotated[
        Annotated[list[StopString], Meta(max_length=64)] | None,
        Meta(description="Strings that end the text and are not part of it."),
    ] = None
    on_disconnect: Annotated[
        Literal["rollback", "keep"],
        Meta(description="If the client leaves: forget the turn, or keep what was generated so far."),
    ] = "rollback"
    on_overflow: Annotated[
        Literal["error", "truncate_output", "drop_oldest_turns"],
        Meta(description="If history, input and output exceed the context."),
    ] = "error"
    retention: Annotated[
        Retention | None, Meta(description="How long the session's KV will be needed after the turn; null: not said.")
    ] = None


class GenerateUsage(Struct, frozen=True):
    """Tokens of a turn."""

    prompt_tokens: Annotated[int, Meta(description="All that the model saw: history and input.")]
    history_tokens: Annotated[int, Meta(description="Of the prompt: the session's history.")]
    cached_tokens: Annotated[int, Meta(description="Of the prompt: not computed again.")]
    completion_tokens: int


class GenerateReply(Struct, frozen=True, kw_only=True):
    """A frame of the stream, or the whole reply."""

    text: Annotated[str, Meta(description="What is new; without `stream`, everything.")]
    tokens: Annotated[int, Meta(description="Tokens generated in this turn so far.")]
    finish_reason: Annotated[
        Literal["stop", "length", "abort", "error"] | None, Meta(description="Null until the last frame.")
    ]
    usage: Annotated[GenerateUsage | UnsetType, Meta(description="With the last frame.")] = UNSET
    warnings: Annotated[
        list[str] | UnsetType,
        Meta(description="With the last frame: what the client should know, as that a live session was dropped."),
    ] = UNSET
    error: Annotated[ErrorObject | UnsetType, Meta(description="With finish_reason `error`.")] = UNSET
