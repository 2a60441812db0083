"""What tests share: reading replies, and the shape of errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx


def frames_of(body: bytes) -> list[dict[str, Any]]:
    """The frames of a streamed /generate reply; each ends with one NUL byte, and nothing comes after the last."""
    *frames, rest = body.split(b"\0")
    assert rest == b""
    assert all(frames)
    for frame in frames:
        assert frame.isascii()
        # Exactly what Python's json.dumps writes.
        assert json.dumps(json.loads(frame)).encode() == frame
    return [json.loads(frame) for frame in frames]


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of a server-sent stream; the last is [DONE]."""
    *events, last, rest = body.split(b"\n\n")
    assert rest == b""
    assert last == b"data: [DONE]"
    assert all(event.startswith(b"data: ") for event in events)
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def error_of(
    response: httpx.Response, status: int, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The error object, once the reply has OpenAI's shape and the true status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    error = body["error"]
    assert isinstance(error, dict)
    assert error.keys() >= {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    if response.request.url.path == "/generate":
        assert body["object"] == "error"
        assert body["message"] == error["message"]
    elif response.request.url.path.startswith("/v1/messages"):
        assert body.keys() == {"type", "error"}
        assert body["type"] == "error"
    else:
        assert body.keys() == {"error"}
    if code is not None:
        assert error["code"] == code, error
    if param is not None:
        assert error["param"] == param, error
    return error


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)
