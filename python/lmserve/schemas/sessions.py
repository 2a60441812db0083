"""`/v1/sessions`: the conversations that live on the server."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import MAX_MESSAGES, MAX_TOKENS, NamedSession, StopStrings, Text
from lmserve.schemas.generate import GenerateUsage, Message
from lmserve.schemas.retention import Retention
from lmserve.schemas.sampling import OutputLimit, SamplingRequest

MAX_PAGE: Final = 1000

Turns = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]


class SessionTotals(Struct, frozen=True, kw_only=True):
    """What the committed turns have used, those that a rewind took back included."""

    prompt_tokens: Annotated[int, Meta(description="All that the model saw: history and input of every turn.")]
    cached_tokens: Annotated[int, Meta(description="Of the prompts: not computed again.")]
    computed_tokens: Annotated[int, Meta(description="Of the prompts: computed.")]
    generated_tokens: int
    seconds: Annotated[float, Meta(description="From the turns' arrivals to their ends.")]


class SessionCard(Struct, frozen=True, kw_only=True):
    """A session at its last committed turn."""

    id: int | str
    object: Literal["session"] = "session"
    turns: Annotated[int, Meta(description="Committed turns.")]
    tokens: Annotated[int, Meta(description="Tokens of the committed turns: the next turn's history.")]
    cached_tokens: Annotated[
        int | UnsetType,
        Meta(description="Of these, the ones that the next turn need not compute again. Not in a list."),
    ] = UNSET
    busy: Annotated[bool, Meta(description="A turn runs; it is no part of the numbers above.")]
    read_only: Annotated[
        bool, Meta(description="A damaged log lost what came behind these turns: rewind the session, or fork it.")
    ] = False
    created: Annotated[int, Meta(description="Seconds since 1970.")]
    age: Annotated[float, Meta(description="Seconds since the session began.")]
    idle: Annotated[float, Meta(description="Seconds since its last turn was committed.")]
    held: Annotated[float, Meta(description="Seconds for which it makes room after all that nobody holds.")] = 0
    usage: SessionTotals


class SessionList(Struct, frozen=True, kw_only=True):
    """A page of sessions, in order of their ids: numbers, then names."""

    object: Literal["list"] = "list"
    data: list[SessionCard]
    has_more: bool
    last_id: Annotated[int | str | None, Meta(description="The next page's `after`; null if this one is empty.")]


class SessionTurn(Struct, frozen=True, kw_only=True):
    """A turn as the model saw and gave it: what the chat template wrote is there, special tokens included."""

    input: str
    output: str
    input_ids: list[int] | UnsetType = UNSET
    output_ids: list[int] | UnsetType = UNSET


class Transcript(Struct, frozen=True, kw_only=True):
    """The committed turns of a session, oldest first."""

    id: int | str
    object: Literal["session.transcript"] = "session.transcript"
    turns: list[SessionTurn]


class ForkRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A second conversation that goes on from where the first one is, or was. An unknown key is an error."""

    session_id: Annotated[NamedSession, Meta(description="The new session; none of this id may live.", examples=[8])]
    turns: Annotated[Turns | None, Meta(description="Fork after so many turns; null: after the last.")] = None


class RewindRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to go back to. An unknown key is an error."""

    turns: Annotated[Turns, Meta(description="Turns to keep, the oldest ones.", examples=[1])]


class AppendRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes behind the session's history, without an answer. An unknown key is an error."""

    prompt: Annotated[
        Text | Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)],
        Meta(description="One user turn, or messages; put through the chat template.", examples=["My name is Ada."]),
    ]
    create: Annotated[bool, Meta(description="Begin the session if there is none.")] = False
    on_disconnect: Annotated[
        Literal["rollback", "keep"], Meta(description="If the client leaves before the end: forget the turn, or not.")
    ] = "rollback"
    on_overflow: Annotated[
        Literal["error", "drop_oldest_turns"], Meta(description="If history and input exceed the context.")
    ] = "error"


class TurnRequest(SamplingRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The next turn of a session. Null is the same as absent; an unknown key is an error."""

    prompt: Annotated[
        Text | None, Meta(description="One user turn, put through the chat template.", examples=["My name is Ada."])
    ] = None
    messages: Annotated[
        Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None,
        Meta(description="In the place of prompt: the messages that are new."),
    ] = None
    create: Annotated[bool | None, Meta(description="Begin the session if there is none.")] = None
    end: Annotated[bool | None, Meta(description="Drop the session after this turn.")] = None
    stream: Annotated[bool | None, Meta(description="Reply in frames, as /generate.")] = None
    max_tokens: Annotated[
        OutputLimit, Meta(description="Most tokens to generate; null: the model's own, or what the context has left.")
    ] = None
    stop: Annotated[StopStrings | None, Meta(description="Strings that end the text and are not part of it.")] = None
    on_disconnect: Annotated[
        Literal["rollback", "keep"] | None,
        Meta(description="If the client leaves: forget the turn (null), or keep what was generated so far."),
    ] = None
    on_overflow: Annotated[
        Literal["error", "truncate_output", "drop_oldest_turns"] | None,
        Meta(description="If history, input and output exceed the context; null: error."),
    ] = None
    retention: Annotated[
        Retention | None, Meta(description="How long the session's KV will be needed after the turn; null: not said.")
    ] = None


class Appended(Struct, frozen=True, kw_only=True):
    """The turn is committed, and its KV is in the cache."""

    id: int | str
    object: Literal["session.append"] = "session.append"
    usage: GenerateUsage


class Cancelled(Struct, frozen=True, kw_only=True):
    """What became of the running turn."""

    id: int | str
    object: Literal["session.cancel"] = "session.cancel"
    cancelled: Annotated[bool, Meta(description="False: no turn ran. What a cancelled one generated is kept.")]


class Deleted(Struct, frozen=True, kw_only=True):
    """The session is gone."""

    id: int | str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True
