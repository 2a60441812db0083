"""`GET /v1/usage`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class UsageLimits(Struct, frozen=True):
    """What the key may do; null: no limit."""

    weight: Annotated[int, Meta(description="Its share where keys compete, relative to the others' weights.")]
    max_in_flight: Annotated[int | None, Meta(description="Requests that wait or run at a time.")]
    tokens_per_minute: Annotated[int | None, Meta(description="What requests bring in and generate.")]
    max_sessions: int | None
    max_priority: Annotated[int | None, Meta(description="The most urgent `priority`; smaller is more urgent.")]


class UsageRemaining(Struct, frozen=True, omit_defaults=True):
    """What is left of the limits that there are."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_ms: Annotated[int | None, Meta(description="Until all tokens of a minute are there again.")] = None


class UsageReply(Struct, frozen=True, kw_only=True):
    """What the asking key has used since the server's start, and what it may still use."""

    object: Literal["usage"] = "usage"
    key: Annotated[str | None, Meta(description="The key's name; null where no key is needed.")]
    since: Annotated[int, Meta(description="The server's start, in seconds since 1970.")]
    requests: Annotated[int, Meta(description="Requests that ended, whatever their end, once they had begun.")]
    prompt_tokens: Annotated[int, Meta(description="Of these: histories and inputs.")]
    cached_tokens: Annotated[int, Meta(description="Of the prompts: what had not to be computed.")]
    completion_tokens: Annotated[int, Meta(description="Generated tokens, those of aborted requests included.")]
    in_flight: Annotated[int, Meta(description="Requests that have not ended.")]
    waiting: Annotated[int, Meta(description="Of these: those of which nothing has been computed yet.")]
    limits: UsageLimits
    remaining: UsageRemaining
