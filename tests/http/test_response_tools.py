"""/v1/responses/input_tokens and /v1/responses/compact, over the real core."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from conftest import MODEL, Running, serve_core
from lmserve import _core
from lmserve.engine.text import TextLayer
from lmserve.keys import Keyring
from test_responses import ROUTE, ask, respond, text_of, validate
from tiny_engine import TEMPLATE, byte_tokenizer, formula_engine

from wire import error_of

COUNT = f"{ROUTE}/input_tokens"
COMPACT = f"{ROUTE}/compact"


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def counted(client: httpx.Client, source: Any, **fields: Any) -> int:
    response = client.post(COUNT, json={"input": source, **fields})
    assert response.status_code == 200, response.text
    validate(client, "InputTokensReply", response.json())
    return response.json()["input_tokens"]


def test_the_count_is_what_the_request_then_has(real: Running, client: httpx.Client) -> None:
    before = real.core.stats()
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]
    for fields in ({}, {"instructions": "Be brief."}, {"tools": tools}, {"tools": tools, "tool_choice": "none"}):
        count = counted(client, "One", **fields)
        assert real.core.stats()["sessions"] == before["sessions"]
        assert respond(client, "One", store=False, **fields)["usage"]["input_tokens"] == count
    first = respond(client, "One", instructions="Be brief.")
    sessions = real.core.stats()["sessions"]
    count = counted(client, "Two", previous_response_id=first["id"])
    assert count > first["usage"]["total_tokens"]
    assert real.core.stats()["sessions"] == sessions
    assert respond(client, "Two", previous_response_id=first["id"])["usage"]["input_tokens"] == count


def test_the_sdk_counts(real: Running) -> None:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk:
        reply = sdk.responses.input_tokens.count(model=MODEL, input="Hello", instructions="Be brief.")
        assert reply.object == "response.input_tokens"
        assert reply.input_tokens > len("Hello")


def test_what_cannot_be_counted(client: httpx.Client) -> None:
    error_of(client.post(COUNT, json={"input": "x" * 5000}), 400, "context_length_exceeded")
    error_of(client.post(COUNT, json={}), 400, param="input")
    error_of(client.post(COUNT, json={"input": "x", "temperature": 1}), 400, param="temperature")
    error_of(client.post(COUNT, json={"input": "x", "model": "nobody"}), 404, "model_not_found")
    body = {"input": "x", "previous_response_id": "resp_0000000000000000"}
    error_of(client.post(COUNT, json=body), 404, "previous_response_not_found", "previous_response_id")


CONVERSATION = [
    {"role": "user", "content": "My name is Ada."},
    {"role": "assistant", "content": "Hello, Ada!"},
    {"role": "user", "content": "I like tea."},
]


def test_a_conversation_made_short_is_the_next_input(real: Running, client: httpx.Client) -> None:
    sessions = real.core.stats()["sessions"]
    short = client.post(COMPACT, json={"model": MODEL, "input": CONVERSATION}).json()
    validate(client, "CompactReply", short)
    assert real.core.stats()["sessions"] == sessions
    *said, item = short["output"]
    assert [message["content"][0]["text"] for message in said] == ["My name is Ada.", "I like tea."]
    assert item["type"] == "compaction"
    form, _, text = item["encrypted_content"].partition(".")
    summary = base64.urlsafe_b64decode(text).decode()
    assert form == "lmserve1"
    assert summary
    new = {"role": "user", "content": "Go on."}
    answered = respond(client, [*short["output"], new])
    # The model reads the same as if the summary were a message.
    told = {"role": "user", "content": f"Summary of our conversation so far:\n\n{summary}"}
    plain = respond(client, [*CONVERSATION[::2], told, new])
    assert text_of(answered) == text_of(plain)
    items = client.get(f"{ROUTE}/{answered['id']}/input_items", params={"order": "asc"}).json()["data"]
    assert [each["type"] for each in items] == ["message", "message", "compaction", "message"]


def test_a_stored_conversation_is_made_short(client: httpx.Client) -> None:
    first = respond(client, "One")
    second = respond(client, "Two", previous_response_id=first["id"])
    short = client.post(COMPACT, json={"previous_response_id": second["id"]}).json()
    assert [each["content"][0]["text"] for each in short["output"][:-1]] == ["One", "Two"]
    assert short["usage"]["input_tokens"] > second["usage"]["total_tokens"]
    assert short["usage"]["input_tokens_details"]["cached_tokens"] >= second["usage"]["total_tokens"] - 16
    # The conversation is as it was.
    assert respond(client, "Three", previous_response_id=second["id"])["usage"]["input_tokens"]


def test_the_sdk_compacts(real: Running) -> None:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk:
        short = sdk.responses.compact(model=MODEL, input=CONVERSATION)  # type: ignore[arg-type]
        assert short.object == "response.compaction"
        assert short.output[-1].type == "compaction"
        given: Any = [*short.output, {"role": "user", "content": "Go on."}]
        assert sdk.responses.create(model=MODEL, input=given, max_output_tokens=5).output_text


def test_what_cannot_be_made_short(client: httpx.Client) -> None:
    error_of(client.post(COMPACT, json={}), 400, "missing_field", "input")
    error_of(client.post(COMPACT, json={"input": "x" * 5000}), 400, "context_length_exceeded")
    body = {"previous_response_id": "resp_0000000000000000"}
    error_of(client.post(COMPACT, json=body), 404, "previous_response_not_found", "previous_response_id")


def test_keys_do_not_count_or_compact_each_others_responses() -> None:
    text = TextLayer(byte_tokenizer(), _core.ChatTemplate(TEMPLATE, b"{}"))
    with serve_core(formula_engine(), text, keys=Keyring.of("a", "b")) as running:
        a, b = (httpx.Client(base_url=running.url, headers={"x-api-key": key}, timeout=60) for key in "ab")
        with a, b:
            first = a.post(ROUTE, json=ask()).json()
            for route in (COUNT, COMPACT):
                body = {"input": "x", "previous_response_id": first["id"]}
                error_of(b.post(route, json=body), 404, "previous_response_not_found")
                assert a.post(route, json=body).status_code == 200
