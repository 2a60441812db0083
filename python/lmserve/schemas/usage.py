"""`GET /v1/usage`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class UsageLimits(Struct, frozen=True):
    """The key's limits. Null: no limit."""

    weight: Annotated[
        int, Meta(description="The key's share of the server while keys compete, relative to other keys' weights.")
    ]
    max_in_flight: Annotated[
        int | None, Meta(description="Maximum number of requests that wait or run at the same time.")
    ]
    tokens_per_minute: Annotated[
        int | None, Meta(description="Maximum number of tokens a minute, of prompts and outputs together.")
    ]
    max_sessions: int | None
    max_priority: Annotated[
        int | None,
        Meta(description="The most urgent `priority` that the key may use. A smaller number is more urgent."),
    ]


class UsageRemaining(Struct, frozen=True, omit_defaults=True):
    """What is left of each limit that is set."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_ms: Annotated[
        int | None, Meta(description="Milliseconds until the full tokens of a minute are available again.")
    ] = None


class UsageReply(Struct, frozen=True, kw_only=True):
    """What the requesting key has used since the server's start, and what it may still use."""

    object: Literal["usage"] = "usage"
    key: Annotated[str | None, Meta(description="The key's name. Null if the server needs no key.")]
    since: Annotated[int, Meta(description="The server's start, in seconds since 1970.")]
    requests: Annotated[int, Meta(description="Requests that have started and ended, with or without success.")]
    prompt_tokens: Annotated[int, Meta(description="Prompt tokens of these requests: histories and inputs.")]
    cached_tokens: Annotated[int, Meta(description="Prompt tokens that came from the KV cache.")]
    completion_tokens: Annotated[int, Meta(description="Generated tokens, including those of aborted requests.")]
    in_flight: Annotated[int, Meta(description="Requests that have not ended.")]
    waiting: Annotated[int, Meta(description="Requests in flight of which nothing has been computed yet.")]
    limits: UsageLimits
    remaining: UsageRemaining
