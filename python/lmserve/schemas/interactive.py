"""`POST /v1/chat/interactive`: the last of LMDeploy's routes that had sessions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import (
    ANONYMOUS,
    MAX_MESSAGES,
    MAX_TOKENS,
    MinP,
    MinTokens,
    RepetitionPenalty,
    Seed,
    SessionId,
    StopStrings,
    Temperature,
    Text,
    TopK,
    TopP,
)
from lmserve.schemas.errors import ErrorObject
from lmserve.schemas.generate import Message


class InteractiveRequest(Struct, frozen=True, kw_only=True):
    """One turn of a session, or one that has none. Unknown keys are ignored."""

    prompt: Annotated[
        Text | Annotated[list[Message], Meta(max_length=MAX_MESSAGES)],
        Meta(description="A string is one user turn; a list is messages.", examples=["Hi, how are you?"]),
    ]
    session_id: Annotated[SessionId, Meta(description="The session; -1: one of this turn alone.", examples=[7])] = (
        ANONYMOUS
    )
    interactive_mode: Annotated[
        bool, Meta(description="Keep the session. False: it ends with this turn, and its history with it.")
    ] = False
    stream: Annotated[bool, Meta(description="Reply in lines, each a JSON object.")] = False
    stop: Annotated[
        bool | StopStrings | None,
        Meta(description="Strings that end the text and are not part of it; true: as cancel; false: nothing."),
    ] = None
    request_output_len: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None,
        Meta(description="Most tokens to generate; null: what the context holds."),
    ] = None
    top_p: Annotated[TopP, Meta(description="Only the likeliest tokens whose probabilities add up to this.")] = 0.8
    top_k: Annotated[TopK, Meta(description="Only the k likeliest tokens; 0 or -1: all.")] = 40
    temperature: Annotated[Temperature, Meta(description="0 is greedy.")] = 0.8
    repetition_penalty: Annotated[
        RepetitionPenalty, Meta(description="Makes tokens of prompt and output less likely; 1 is off.")
    ] = 1.0
    ignore_eos: Annotated[bool, Meta(description="Never stop at an end token.")] = False
    skip_special_tokens: Annotated[bool | None, Meta(description="Leave special tokens out; null: true.")] = None
    spaces_between_special_tokens: Annotated[bool | None, Meta(description="Taken, and of no effect.")] = None
    cancel: Annotated[
        bool | None, Meta(description="Cancel the session's running turn; what it generated is kept.")
    ] = None
    adapter_name: Annotated[Any, Meta(description="Not supported: a 400, unless null.")] = None
    image_url: Annotated[Any, Meta(description="Not supported, for the model is text-only: a 400, unless null.")] = None
    seed: Annotated[Seed | None, Meta(description="The same seed gives the same tokens; null: random.")] = None
    min_new_tokens: Annotated[MinTokens | None, Meta(description="No end or stop token before so many.")] = None
    min_p: Annotated[MinP, Meta(description="Only tokens this likely, relative to the likeliest.")] = 0.0


class InteractiveReply(Struct, frozen=True, kw_only=True):
    """A line of the stream, or the whole reply."""

    text: Annotated[str, Meta(description="What is new; without `stream`, everything.")]
    tokens: Annotated[int, Meta(description="Tokens generated in this turn so far.")]
    input_tokens: Annotated[int, Meta(description="Tokens that this turn brought in.")]
    history_tokens: Annotated[int, Meta(description="Tokens of the session before this turn.")]
    finish_reason: Annotated[
        Literal["stop", "length", "abort", "error"] | None, Meta(description="Null until the last line.")
    ]
    error: Annotated[ErrorObject | UnsetType, Meta(description="With finish_reason `error`.")] = UNSET
