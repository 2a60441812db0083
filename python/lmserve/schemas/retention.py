"""What becomes of a session's KV cache while nobody uses it."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

MAX_HOLD_HOURS: Final = 24


class Retention(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Either a time to hold it, or drop. An unknown key is an error."""

    hold: Annotated[
        Annotated[str, Meta(pattern="^[0-9]{1,9}(ms|s|m|h)$", max_length=11)] | None,
        Meta(
            description="Keep the session and its KV so long, where others can make room: a number and ms, s, m or h; "
            f"at most {MAX_HOLD_HOURS}h. 0s: no longer.",
            examples=["10m"],
        ),
    ] = None
    drop: Annotated[bool, Meta(description="Give up the session's KV now; its tokens stay.")] = False
