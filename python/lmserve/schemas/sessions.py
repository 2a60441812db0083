"""`/v1/sessions`: the conversations that live on the server."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import MAX_MESSAGES, MAX_TOKENS, NamedSession, SessionModel, StopStrings, Text
from lmserve.schemas.generate import GenerateUsage, Message
from lmserve.schemas.retention import Retention
from lmserve.schemas.sampling import OutputLimit, SamplingRequest

MAX_PAGE: Final = 1000

Turns = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]


class SessionTotals(Struct, frozen=True, kw_only=True):
    """What the committed turns have used, including turns that a rewind has removed."""

    prompt_tokens: Annotated[int, Meta(description="Tokens of history and input, summed over all turns.")]
    cached_tokens: Annotated[int, Meta(description="Prompt tokens that came from the KV cache.")]
    computed_tokens: Annotated[int, Meta(description="Prompt tokens that were computed.")]
    generated_tokens: int
    seconds: Annotated[float, Meta(description="Time from each turn's arrival to its end, summed over all turns.")]


class SessionCard(Struct, frozen=True, kw_only=True):
    """A session as of its last committed turn."""

    id: int | str
    object: Literal["session"] = "session"
    turns: Annotated[int, Meta(description="Number of committed turns.")]
    tokens: Annotated[int, Meta(description="Tokens of all committed turns. They are the next turn's history.")]
    cached_tokens: Annotated[
        int | UnsetType,
        Meta(
            description="How many of these tokens are in the KV cache, so that the next turn does not compute them. "
            "Absent in lists."
        ),
    ] = UNSET
    busy: Annotated[bool, Meta(description="Whether a turn is running. The numbers above do not include it.")]
    read_only: Annotated[
        bool,
        Meta(
            description="True if a damaged log has lost the turns that came after these. Rewind or fork the session to "
            "continue it."
        ),
    ] = False
    created: Annotated[int, Meta(description="Seconds since 1970.")]
    age: Annotated[float, Meta(description="Seconds since the session began.")]
    idle: Annotated[float, Meta(description="Seconds since its last turn was committed.")]
    held: Annotated[
        float,
        Meta(
            description="Seconds left of the hold. Until then the session is evicted only after those that nobody "
            "holds."
        ),
    ] = 0
    usage: SessionTotals


class SessionList(Struct, frozen=True, kw_only=True):
    """A page of sessions in the order of their ids: numbers first, then names."""

    object: Literal["list"] = "list"
    data: list[SessionCard]
    has_more: bool
    last_id: Annotated[
        int | str | None, Meta(description="Send it as `after` to get the next page. Null if this page is empty.")
    ]


class SessionTurn(Struct, frozen=True, kw_only=True):
    """A turn as the model read and generated it, including special tokens and all other text of the chat template."""

    input: str
    output: str
    input_ids: list[int] | UnsetType = UNSET
    output_ids: list[int] | UnsetType = UNSET


class Transcript(Struct, frozen=True, kw_only=True):
    """The committed turns of a session, the oldest first."""

    id: int | str
    object: Literal["session.transcript"] = "session.transcript"
    turns: list[SessionTurn]


class ForkRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new session that continues from the present or an earlier turn of this one. An unknown key is an error."""

    session_id: Annotated[
        NamedSession, Meta(description="The id of the new session. No live session may have this id.", examples=[8])
    ]
    turns: Annotated[Turns | None, Meta(description="Number of turns that the new session begins with. Null: all.")] = (
        None
    )


class RewindRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The turn to go back to. An unknown key is an error."""

    turns: Annotated[Turns, Meta(description="Number of turns to keep, counted from the oldest.", examples=[1])]


class AppendRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Messages to append to the session's history without an answer. An unknown key is an error."""

    prompt: Annotated[
        Text | Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)],
        Meta(
            description="One user turn, or a list of messages. The server renders them with the chat template.",
            examples=["My name is Ada."],
        ),
    ]
    create: Annotated[bool, Meta(description="Create the session if it does not exist.")] = False
    on_disconnect: Annotated[
        Literal["rollback", "keep"],
        Meta(description="What to do if the client disconnects before the end: roll the turn back, or keep it."),
    ] = "rollback"
    on_overflow: Annotated[
        Literal["error", "drop_oldest_turns"],
        Meta(description="What to do if history and input together exceed the context."),
    ] = "error"


class TurnRequest(SamplingRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The next turn of a session. Null is the same as absent; an unknown key is an error."""

    model: SessionModel = None
    prompt: Annotated[
        Text | None,
        Meta(description="One user turn. The server renders it with the chat template.", examples=["My name is Ada."]),
    ] = None
    messages: Annotated[
        Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None,
        Meta(description="The new messages, instead of prompt."),
    ] = None
    create: Annotated[bool | None, Meta(description="Create the session if it does not exist.")] = None
    end: Annotated[bool | None, Meta(description="Drop the session after this turn.")] = None
    stream: Annotated[bool | None, Meta(description="Reply in frames, as /generate does.")] = None
    max_tokens: Annotated[
        OutputLimit,
        Meta(
            description="Maximum number of tokens to generate. Null: the model's default, or as many as fit into the "
            "context."
        ),
    ] = None
    stop: Annotated[StopStrings | None, Meta(description="Strings that end the text. They are not part of it.")] = None
    on_disconnect: Annotated[
        Literal["rollback", "keep"] | None,
        Meta(
            description="What to do if the client disconnects: roll the turn back, or keep the tokens generated so "
            "far. Null: rollback."
        ),
    ] = None
    on_overflow: Annotated[
        Literal["error", "truncate_output", "drop_oldest_turns"] | None,
        Meta(description="What to do if history, input and output together exceed the context. Null: error."),
    ] = None
    retention: Annotated[
        Retention | None,
        Meta(description="How long the session's KV cache will be needed after this turn. Null: unknown."),
    ] = None


class Appended(Struct, frozen=True, kw_only=True):
    """The turn is committed and is in the KV cache."""

    id: int | str
    object: Literal["session.append"] = "session.append"
    usage: GenerateUsage


class Cancelled(Struct, frozen=True, kw_only=True):
    """Whether a running turn was cancelled."""

    id: int | str
    object: Literal["session.cancel"] = "session.cancel"
    cancelled: Annotated[
        bool, Meta(description="False if no turn was running. The tokens that a cancelled turn has generated are kept.")
    ]


class Deleted(Struct, frozen=True, kw_only=True):
    """The session has ended."""

    id: int | str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True
