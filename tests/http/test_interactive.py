"""POST /v1/chat/interactive, over the real core."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import Running

from wire import error_of, wait_until

ROUTE = "/v1/chat/interactive"
KEYS = {"text", "tokens", "input_tokens", "history_tokens", "finish_reason"}


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def ask(prompt: Any = "Hello", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "seed": 5, "request_output_len": 8, "ignore_eos": True, **fields}


def say(client: httpx.Client, prompt: Any = "Hello", **fields: Any) -> dict[str, Any]:
    response = client.post(ROUTE, json=ask(prompt, **fields))
    assert response.status_code == 200, response.text
    reply = response.json()
    assert reply.keys() == KEYS
    return reply


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    *lines, rest = response.content.split(b"\n")
    assert rest == b""
    return [json.loads(line) for line in lines]


def test_a_turn_without_a_session(client: httpx.Client) -> None:
    reply = say(client)
    assert (reply["tokens"], reply["finish_reason"], reply["history_tokens"]) == (8, "length", 0)
    assert reply["input_tokens"] > 5
    assert say(client) == reply


def test_a_stream_of_lines(client: httpx.Client) -> None:
    whole = say(client, request_output_len=30)
    response = client.post(ROUTE, json=ask(request_output_len=30, stream=True))
    assert response.headers["content-type"] == "text/event-stream"
    lines = lines_of(response)
    assert all(line.keys() == KEYS for line in lines)
    assert "".join(line["text"] for line in lines) == whole["text"]
    assert [line["finish_reason"] for line in lines[:-1]] == [None] * (len(lines) - 1)
    assert lines[-1] | {"text": ""} == whole | {"text": ""}
    counts = [line["tokens"] for line in lines]
    assert counts == sorted(counts)
    assert {line["input_tokens"] for line in lines} == {whole["input_tokens"]}


def test_a_session_goes_on_in_interactive_mode_and_ends_without(real: Running, client: httpx.Client) -> None:
    first = say(client, session_id=901, interactive_mode=True)
    second = say(client, "And now?", session_id=901, interactive_mode=True)
    assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
    third = say(client, "And then?", session_id=901)
    assert third["history_tokens"] > second["history_tokens"]
    error_of(client.get("/v1/sessions/901"), 404, "session_not_found")
    assert say(client, session_id=901)["history_tokens"] == 0


def test_it_is_the_session_of_generate(client: httpx.Client) -> None:
    say(client, session_id=902, interactive_mode=True)
    body = {"instance_id": 902, "sequence_start": False, "prompt": "More?", "request_output_len": 2}
    usage = client.post("/generate", json=body).json()["usage"]
    assert usage["history_tokens"] > 10
    assert say(client, "", session_id=902, request_output_len=0)["finish_reason"] == "stop"
    error_of(client.get("/v1/sessions/902"), 404, "session_not_found")


def test_ending_nothing_is_no_error(client: httpx.Client) -> None:
    nothing = {"text": "", "tokens": 0, "input_tokens": 0, "history_tokens": 0, "finish_reason": "stop"}
    assert say(client, "", session_id=903, request_output_len=0) == nothing
    assert say(client, "", request_output_len=0) == nothing
    assert say(client, "", session_id=903, cancel=True) == nothing


def test_cancel(real: Running, client: httpx.Client) -> None:
    replies: list[dict[str, Any]] = []

    def run() -> None:
        with httpx.Client(base_url=real.url, timeout=60) as other:
            replies.append(say(other, session_id=904, interactive_mode=True, request_output_len=3500))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: real.core.stats()["running"] > 0, "the turn runs")
    say(client, "", session_id=904, cancel=True)
    thread.join(30)
    assert replies[0]["finish_reason"] == "abort"
    assert 0 < replies[0]["tokens"] < 3500
    assert say(client, "Go on", session_id=904)["history_tokens"] > replies[0]["tokens"]


def test_stop_words_and_the_least_length(client: httpx.Client) -> None:
    text = say(client, request_output_len=40)["text"]
    at = next(i for i, character in enumerate(text) if character.isascii() and i > 3 and character not in text[:i])
    reply = say(client, request_output_len=40, stop=text[at])
    assert (reply["text"], reply["finish_reason"]) == (text[:at], "stop")
    assert say(client, request_output_len=40, stop=[text[at]])["text"] == text[:at]


def test_what_does_not_fit_is_cut_and_said(client: httpx.Client) -> None:
    reply = say(client, "x" * 4000, request_output_len=500)
    assert reply["finish_reason"] == "length"
    assert 0 < reply["tokens"] < 100


def test_a_conversation_may_be_sent_whole(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    reply = say(client, [*messages, {"role": "user", "content": "Hello"}])
    assert reply["input_tokens"] > say(client)["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"cancel": True}, "session_id"),
        ({"adapter_name": "lora"}, "adapter_name"),
        ({"image_url": "http://127.0.0.1:9/cat.png"}, "image_url"),
        ({"min_new_tokens": 9}, "min_new_tokens"),
        ({"request_output_len": -1}, "request_output_len"),
        ({"session_id": -2}, "session_id"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_invalid_parameters_are_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error_of(client.post(ROUTE, json=ask(**fields)), 400, param=param)
