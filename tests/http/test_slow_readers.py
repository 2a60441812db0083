"""Clients that read slowly or never: what waits for them is bounded, and what they read is right."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import httpx
import pytest
from conftest import MODEL, Running, serve_core
from tiny_engine import formula_engine

from wire import events_of, frames_of, wait_until

REPEAT = 8192  # characters of a token: what fills the buffers of both sides' systems takes few of them
TOKENS = 3900
WITHIN_LIMITS = 900  # tokens


@pytest.fixture(scope="module")
def wordy() -> Iterator[Running]:
    with serve_core(formula_engine(repeat=REPEAT)) as running:
        yield running


@pytest.fixture
def web(wordy: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=wordy.url, timeout=60) as client:
        yield client


@contextmanager
def opened(running: Running, path: str, body: dict[str, Any]) -> Iterator[HTTPResponse]:
    """A reply of which the head has been read, by a client that buffers little."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(running.address)
        http = HTTPConnection("unused")
        http.sock = connection
        http.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = http.getresponse()
        assert response.status == 200
        yield response


def generated(web: httpx.Client) -> int:
    """Tokens of all requests, once they have ended."""
    wait_until(lambda: web.get("/v1/usage").json()["in_flight"] == 0, "no request runs", 30)
    return web.get("/v1/usage").json()["completion_tokens"]


def long_turn(tokens: int, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "x", "temperature": 0, "ignore_eos": True, "stream": True, "request_output_len": tokens}
    return body | fields


@pytest.mark.parametrize(("on_disconnect", "turns"), [("rollback", 1), ("keep", 2)])
def test_a_client_that_never_reads_is_as_one_that_left(
    wordy: Running, web: httpx.Client, on_disconnect: str, turns: int
) -> None:
    first = {"prompt": "x", "instance_id": turns, "request_output_len": 1, "ignore_eos": True}
    assert web.post("/generate", json=first).status_code == 200
    before = generated(web)
    session = {"instance_id": turns, "sequence_start": False, "on_disconnect": on_disconnect}
    with opened(wordy, "/generate", long_turn(TOKENS, **session)) as response:
        assert 0 < generated(web) - before < TOKENS
        assert web.get(f"/v1/sessions/{turns}").json()["turns"] == turns
        # Now it reads after all.
        frames = frames_of(response.read())
    assert [frame["finish_reason"] for frame in frames] == [None] * (len(frames) - 1) + ["error"]
    assert frames[-1]["error"]["code"] == "reader_too_slow"
    text = "".join(frame["text"] for frame in frames)
    assert 0 < len(text) < 8 * 1024 * 1024
    following = {"prompt": "x", "instance_id": turns, "sequence_start": False, "request_output_len": 1}
    assert web.post("/generate", json=following).status_code == 200


def test_a_client_that_reads_late_gets_all_in_fewer_frames(wordy: Running, web: httpx.Client) -> None:
    whole = web.post("/generate", json=long_turn(WITHIN_LIMITS, stream=False)).json()
    with opened(wordy, "/generate", long_turn(WITHIN_LIMITS)) as response:
        generated(web)
        frames = frames_of(response.read())
    assert "".join(frame["text"] for frame in frames) == whole["text"]
    assert frames[-1]["finish_reason"] == "length"
    assert frames[-1]["tokens"] == WITHIN_LIMITS
    assert 1 < len(frames) < 0.8 * WITHIN_LIMITS


def test_answers_to_several_prompts_wait_no_more_than_one(wordy: Running, web: httpx.Client) -> None:
    before = generated(web)
    body = {"model": MODEL, "prompt": [[97], [98], [99]], "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    with opened(wordy, "/v1/completions", body) as response:
        assert 0 < generated(web) - before < 3 * TOKENS
        events = events_of(response.read())
    assert events[-1]["error"]["code"] == "reader_too_slow"
    assert {event["choices"][0]["index"] for event in events[:-1]} <= {0, 1, 2}
