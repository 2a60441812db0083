"""What the core reports about sessions, and the settings of their log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Struct

Fsync = Literal["always", "interval", "never"]
SessionId = int | str  # a number, never its digits


class SessionLog(Struct, frozen=True, kw_only=True):
    """Where sessions are written down, so that they outlive the process."""

    folder: str  # no two servers share it
    fsync: Fsync = "interval"  # before a turn's reply ends, once a second, or whenever the system does it
    fingerprint: bytes  # 32 bytes that name model, tokenizer and chat template
    model: str  # for messages
    tenants: dict[int, bytes]  # each tenant's 32 bytes that name it for good; no session of another is written


class SessionWriter(Protocol):
    """Writes sessions down for other servers, too. The core calls it on a thread of its own."""

    def write(self, changes: Sequence[tuple[int, SessionId, tuple[Any, ...] | None]], /) -> list[tuple[str, str]]:
        """Changes of sessions, each with its tenant; None: the session has ended.

        A record is whether it says all of the session, its turns and tokens then, what they have used, and its bytes.
        Returns what became of each, and why: `kept`, `whole` (it is wanted whole), `overtaken` by another server, or
        `failed`.
        """

    def probe(self) -> str | None:
        """Why the store still fails; None: it is well."""


class Loss(Struct, frozen=True, kw_only=True):
    """What damaged records of a log took from a session."""

    tenant: int | None  # None: the server knows no such tenant
    id: SessionId
    kept_turns: int  # it is read-only after them; 0: it is gone
    last_turn: int  # the last that is lost; not above kept_turns: a rewind or the session's end is

    def __str__(self) -> str:
        if self.kept_turns == 0:
            return f"session {self.id} is lost" + (f" with its {self.last_turn} turns" if self.last_turn > 1 else "")
        first = self.kept_turns + 1
        turns = f"turn {first}" if self.last_turn <= first else f"turns {first} to {self.last_turn}"
        lost = f"{turns} lost" if self.last_turn >= first else "a rewind of it, or its end, is lost"
        return f"session {self.id}: {lost}; it is read-only at turn {self.kept_turns}"


class LogReport(Struct, frozen=True, kw_only=True):
    """What a session log has, and what it has lost."""

    version: int  # of the format
    model: str | None  # None: the log was never begun
    sessions: int
    turns: int
    tokens: int
    bytes: int  # of whole records
    torn: int  # bytes of a record at the end that was written in part
    damaged: int  # bytes of records that are damaged
    losses: list[Loss]
    unnamed: int  # missing records of unknown sessions
    kept: str | None  # the file beside the log that keeps what was torn or damaged

    @property
    def is_whole(self) -> bool:
        """Whether all that was committed is there."""
        return not (self.damaged or self.losses or self.unnamed)


class StorageFault(Struct, frozen=True):
    """Why nothing can be written down now."""

    code: str  # storage_full or storage_failed
    message: str


def log_report_of(json: bytes) -> LogReport:
    return msgspec.json.decode(json, type=LogReport)


class SessionUsage(Struct, frozen=True):
    """What the committed turns of a session have used."""

    prompt_tokens: int = 0  # history and input of every turn
    cached_tokens: int = 0  # of these, not computed again
    computed_tokens: int = 0  # of these, computed
    generated_tokens: int = 0
    time_ms: int = 0  # from the turns' arrivals to their ends


class StateTurn(NamedTuple):
    """A committed turn of a session, without its token ids."""

    input_tokens: int
    output_tokens: int
    open: bool  # it left the assistant's message open
    logprobs: bytes | None  # of its output, 32-bit floats, little-endian; None: not recorded


class SessionState(NamedTuple):
    """All that makes a session."""

    tokens: bytes  # token ids of all turns, 32-bit integers, little-endian
    turns: list[StateTurn]
    seed: int
    system_tokens: int
    adapter: bytes | None = None  # SHA-256 of the adapter that computed it; None: the model alone


class SessionInfo(Struct, frozen=True, kw_only=True):
    """A session without its tokens. Times are in milliseconds since 1970."""

    id: SessionId
    turns: int  # committed
    tokens: int  # of the committed turns
    busy: bool  # a turn runs
    created_ms: int
    used_ms: int
    lost_turn: int = 0  # the last of the turns that a damaged log lost, which makes it read-only; 0: none
    hold_until_ms: int = 0  # until then it is evicted only after those that are not held; 0: it is not held
    usage: SessionUsage = SessionUsage()
    cached_tokens: int | None = None  # of `tokens`, those that the next turn need not compute; None: not asked for


class TranscriptTurn(Struct, frozen=True):
    """One committed turn as the model saw and gave it: special tokens are written out."""

    input: str
    output: str
    input_ids: list[int]
    output_ids: list[int]


def session_info_of(values: Mapping[str, Any]) -> SessionInfo:
    return msgspec.convert(values, SessionInfo)
