"""Examples of streams, in each form that replies have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

Form = Literal["events", "named events", "frames", "lines"]

STREAMS: Final[Mapping[Form, str]] = {
    "events": "text/event-stream",
    "named events": "text/event-stream",
    "frames": "application/octet-stream",
    # LMDeploy called its lines server-sent events.
    "lines": "text/event-stream",
}


def stream_of(example: Mapping[str, Any], form: Form) -> str:
    """A stream of one frame."""
    text = msgspec.json.encode(example).decode()
    match form:
        case "events":
            return f"data: {text}\n\ndata: [DONE]\n\n"
        case "named events":
            return f"event: {example['type']}\ndata: {text}\n\n"
        case "frames":
            return f"{text}\0"
        case "lines":
            return f"{text}\n"
