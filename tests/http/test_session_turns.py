"""The next turn of a session by `/v1/sessions/{id}/turns`, and the warning where /generate drops a session unasked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import MAX_MODEL_LEN, Running

from wire import error_of, frames_of

ids = itertools.count(93_000)


@pytest.fixture
def web(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@pytest.fixture
def session() -> int:
    return next(ids)


def run(web: httpx.Client, session: int, **fields: Any) -> dict[str, Any]:
    reply = web.post(f"/v1/sessions/{session}/turns", json={"max_tokens": 6, "seed": 1, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def generate(web: httpx.Client, session: int, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "Hello", "instance_id": session, "request_output_len": 6, "seed": 1, **fields}
    reply = web.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_turns_go_on_without_flags(web: httpx.Client, session: int) -> None:
    other = next(ids)
    error_of(web.post(f"/v1/sessions/{session}/turns", json={"prompt": "one"}), 404, "session_not_found")
    settings = {"temperature": 0.8, "top_p": 0.8, "top_k": 40}
    first = run(web, session, prompt="one", create=True, **settings)
    second = run(web, session, messages=[{"role": "user", "content": "two"}], **settings)
    expected = [generate(web, other, prompt=prompt, sequence_start=at == 0) for at, prompt in enumerate(("one", "two"))]
    assert [first["text"], second["text"]] == [reply["text"] for reply in expected]
    assert second["usage"]["history_tokens"] == first["usage"]["prompt_tokens"] + first["tokens"]
    assert web.get(f"/v1/sessions/{session}").json()["turns"] == 2
    # `create` begins none where one lives, and `end` drops it.
    assert run(web, session, prompt="three", create=True)["usage"]["history_tokens"] > 0
    assert run(web, session, prompt="four", end=True)["usage"]["history_tokens"] > 0
    assert web.get(f"/v1/sessions/{session}").status_code == 404


def test_a_stream_of_a_turn_is_one_of_generate(web: httpx.Client, session: int) -> None:
    whole = run(web, session, prompt="one", create=True)
    assert web.delete(f"/v1/sessions/{session}").status_code == 200
    body = {"prompt": "one", "create": True, "max_tokens": 6, "seed": 1, "stream": True}
    reply = web.post(f"/v1/sessions/{session}/turns", json=body)
    assert reply.headers["content-type"] == "application/octet-stream"
    frames = frames_of(reply.content)
    assert "".join(frame["text"] for frame in frames) == whole["text"]
    assert frames[-1]["tokens"] == whole["tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"messages": []},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "max_new_tokens": 3},
        {"prompt": "x", "instance_id": 3},
        {"prompt": "x", "stop": True},
    ],
)
def test_what_is_no_turn_is_refused(web: httpx.Client, session: int, fields: dict[str, Any]) -> None:
    reply = web.post(f"/v1/sessions/{session}/turns", json={"create": True, **fields})
    assert reply.status_code == 400, reply.text
    assert web.get(f"/v1/sessions/{session}").status_code == 404


def test_a_turn_fits_as_it_is_told_to(web: httpx.Client, session: int) -> None:
    asked = {"prompt": "one", "max_tokens": MAX_MODEL_LEN, "ignore_eos": True, "create": True}
    error_of(web.post(f"/v1/sessions/{session}/turns", json=asked), 400, "context_length_exceeded")
    cut = run(web, session, **asked, on_overflow="truncate_output")
    assert (cut["finish_reason"], cut["usage"]["prompt_tokens"] + cut["tokens"]) == ("length", MAX_MODEL_LEN)


@pytest.mark.parametrize("stream", [False, True])
def test_generate_warns_where_a_live_session_is_dropped_by_default(
    web: httpx.Client, session: int, stream: bool
) -> None:
    assert "warnings" not in generate(web, session)
    assert "warnings" not in generate(web, session, sequence_start=False)
    body = {"prompt": "Hello", "instance_id": session, "request_output_len": 6, "stream": stream}
    reply = web.post("/generate", json=body)
    frames = frames_of(reply.content) if stream else [json.loads(reply.content)]
    assert all("warnings" not in frame for frame in frames[:-1])
    (warning,) = frames[-1]["warnings"]
    assert f"dropped session {session} with its 2 turns" in warning
    assert f"/v1/sessions/{session}/turns" in warning
    # It was begun anew all the same, as the default says. Who asks for that is not warned.
    assert frames[-1]["usage"]["history_tokens"] == 0
    assert "warnings" not in generate(web, session, sequence_start=True)
    assert "warnings" not in generate(web, -1)
