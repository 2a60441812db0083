"""What to do with the KV cache of an idle session."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

MAX_HOLD_HOURS: Final = 24


class Retention(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Give either hold or drop. An unknown key is an error."""

    hold: Annotated[
        Annotated[str, Meta(pattern="^[0-9]{1,9}(ms|s|m|h)$", max_length=11)] | None,
        Meta(
            description="Evict the session and its KV cache only after those that nobody holds, for this time: a "
            f"number followed by ms, s, m or h, at most {MAX_HOLD_HOURS}h. 0s ends the hold.",
            examples=["10m"],
        ),
    ] = None
    drop: Annotated[bool, Meta(description="Free the session's KV cache now. Its token ids are kept.")] = False
