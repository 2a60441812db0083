"""The request log: one line per request, with its key, route, status, tokens and times."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal
from urllib.parse import quote

import msgspec

from lmserve.engine.stream import RequestRecord

Form = Literal["text", "json", "off"]

logger = logging.getLogger("lmserve.requests")

# What asks again and again, and is of no interest while all is well.
PROBES: Final = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/metrics"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request. Times in seconds; None: it did not come so far, or there is none.

    `ended_ns`: when its reply ended, in nanoseconds since 1970.
    """

    id: str
    key: str | None
    client: str | None
    method: str
    path: str
    status: int
    session: int | str | None
    batch: str | None  # whose line it is
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float | None
    first_token_s: float | None
    duration_s: float
    ended_ns: int


def is_probe(entry: Entry) -> bool:
    """Whether the request only found that the server is well."""
    return entry.path in PROBES and entry.status < 400


def total(records: Iterable[RequestRecord]) -> RequestRecord:
    """The records of one request's streams as one: all their tokens, the longest wait, the earliest token."""
    known = list(records)
    waits = [record.queued for record in known if record.queued is not None]
    firsts = [record.first_token for record in known if record.first_token is not None]
    return RequestRecord(
        prompt_tokens=sum(record.prompt_tokens for record in known),
        cached_tokens=sum(record.cached_tokens for record in known),
        completion_tokens=sum(record.completion_tokens for record in known),
        queued=max(waits, default=None),
        first_token=min(firsts, default=None),
    )


def write(form: Form, entry: Entry) -> None:
    """Log the entry, at level DEBUG where it only says that the server is well."""
    if form == "off":
        return
    level = logging.DEBUG if is_probe(entry) else logging.INFO
    if logger.isEnabledFor(level):
        logger.log(level, "%s", _json(entry) if form == "json" else _text(entry))


def _json(entry: Entry) -> str:
    fields = msgspec.to_builtins(entry)
    ended = datetime.fromtimestamp(fields.pop("ended_ns") / 1e9, UTC)
    return msgspec.json.encode({"time": ended.isoformat(timespec="milliseconds"), **fields}).decode()


def _text(entry: Entry) -> str:
    words = [f"{entry.method} {entry.path} {entry.status} {entry.duration_s:.3f}s"]
    if entry.prompt_tokens or entry.completion_tokens:
        words.append(f"in={entry.prompt_tokens} cached={entry.cached_tokens} out={entry.completion_tokens}")
    for name, seconds in (("queue", entry.queue_s), ("first", entry.first_token_s)):
        if seconds is not None:
            words.append(f"{name}={seconds:.3f}s")
    # A session's name may have spaces in it.
    session = None if entry.session is None else quote(str(entry.session))
    named = (("session", session), ("batch", entry.batch), ("key", entry.key), ("client", entry.client))
    words += [f"{name}={value}" for name, value in named if value is not None]
    return " ".join([*words, f"id={entry.id}"])
