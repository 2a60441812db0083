"""POST /v1/messages and /v1/messages/count_tokens, by the `anthropic` SDK and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import jsonschema
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.keys import Keyring
from pydantic import BaseModel
from tiny_engine import formula_engine

ROUTE = "/v1/messages"
HELLO: Any = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@pytest.fixture
def sdk(real: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=real.url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 40, "messages": HELLO, "temperature": 0, **fields}


def create(sdk: anthropic.Anthropic, **fields: Any) -> anthropic.types.Message:
    return sdk.messages.create(**by_sdk(**fields))


def by_sdk(**fields: Any) -> dict[str, Any]:
    """The SDK has no argument for the temperature any more."""
    body = ask(**fields)
    return body | {"extra_body": {"temperature": body.pop("temperature")}}


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events, once each is named as its data says."""
    *events, rest = body.decode().split("\n\n")
    assert rest == ""
    parsed = []
    for event in events:
        name, data = event.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
    return parsed


def error_of(response: httpx.Response, status: int, kind: str, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body["type"] == "error"
    assert body.keys() == {"type", "error"}
    assert body["error"]["type"] == kind
    assert body["error"]["message"]
    if param is not None:
        assert body["error"]["param"] == param
    return body["error"]


def test_whole_reply(sdk: anthropic.Anthropic) -> None:
    message = create(sdk)
    assert message.id.startswith("msg_")
    assert (message.role, message.type, message.model) == ("assistant", "message", MODEL)
    (block,) = message.content
    assert block.type == "text"
    assert block.text
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.stop_sequence is None
    assert message.usage.output_tokens > 0
    count = sdk.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == count
    again = create(sdk)
    assert again.usage.cache_read_input_tokens > 0
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == count


def test_stream(sdk: anthropic.Anthropic) -> None:
    whole = create(sdk)
    with sdk.messages.stream(**by_sdk()) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.cache_read_input_tokens == whole.usage.cache_read_input_tokens or whole.usage.input_tokens


def test_the_order_of_events(client: httpx.Client) -> None:
    response = client.post(ROUTE, json=ask(stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response.content)
    kinds = [event["type"] for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 5
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert events[-2]["usage"]["output_tokens"] >= deltas
    document = client.get("/openapi.json").json()
    schema = {"$ref": "#/components/schemas/MessageEvent", "components": document["components"]}
    for event in events:
        jsonschema.Draft202012Validator(schema).validate(event)


def test_stop_sequences(client: httpx.Client) -> None:
    message = client.post(ROUTE, json=ask()).json()
    text = message["content"][0]["text"]
    at = next(i for i, character in enumerate(text) if character.isascii() and i > 3 and character not in text[:i])
    body = ask(stop_sequences=["never said", text[at]])
    stopped = client.post(ROUTE, json=body).json()
    assert stopped["content"][0]["text"] == text[:at]
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", text[at])
    last = events_of(client.post(ROUTE, json=body | {"stream": True}).content)[-2]
    assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": text[at]}
    assert client.post(ROUTE, json=ask(max_tokens=3)).json()["stop_reason"] == "max_tokens"


def chat(client: httpx.Client, messages: list[dict[str, Any]], **fields: Any) -> str:
    body = {"model": MODEL, "messages": messages, "max_tokens": 40, "temperature": 0, **fields}
    return client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("blocks", [False, True])
def test_it_is_the_conversation_of_chat_completions(client: httpx.Client, blocks: bool) -> None:
    def content(text: str) -> Any:
        return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}] if blocks else text

    messages = [
        {"role": "user", "content": content("One")},
        {"role": "user", "content": content("Two")},
        {"role": "assistant", "content": content("Three")},
        {"role": "user", "content": content("Four")},
    ]
    reply = client.post(ROUTE, json=ask(messages=messages, system=content("Be brief."))).json()
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One\n\nTwo"},
        {"role": "assistant", "content": "Three"},
        {"role": "user", "content": "Four"},
    ]
    assert reply["content"][0]["text"] == chat(client, expected)


def test_an_answer_that_is_begun_is_continued(client: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    reply = client.post(ROUTE, json=ask(messages=messages)).json()
    assert reply["content"][0]["text"] == chat(client, messages, continue_final_message=True)


class Colour(BaseModel):
    name: Literal["red", "green"]
    known: bool


def test_structured_text(sdk: anthropic.Anthropic, client: httpx.Client) -> None:
    message = sdk.messages.parse(
        model=MODEL, messages=HELLO, max_tokens=3000, output_format=Colour, extra_body={"temperature": 0}
    )
    assert isinstance(message.parsed_output, Colour)
    config = {"format": {"type": "json_schema", "schema": {"enum": [1, 23]}}}
    reply = client.post(ROUTE, json=ask(output_config=config)).json()
    assert json.loads(reply["content"][0]["text"]) in (1, 23)
    body = ask(output_config={"format": {"type": "json_schema", "schema": {"$ref": "#/x"}}})
    error_of(client.post(ROUTE, json=body), 400, "invalid_request_error", "output_config.format")
    older = ask(output_format=config["format"])
    assert json.loads(client.post(ROUTE, json=older).json()["content"][0]["text"]) in (1, 23)
    error_of(client.post(ROUTE, json=older | ask(output_config=config)), 400, "invalid_request_error", "output_format")


def test_the_key_may_be_sent_as_anthropics_sdk_does() -> None:
    with serve_core(formula_engine(), keys=Keyring.of("secret")) as running:
        for key, works in (("secret", True), ("guess", False)):
            with anthropic.Anthropic(base_url=running.url, api_key=key, max_retries=0) as sdk:
                if works:
                    assert create(sdk).content
                    continue
                with pytest.raises(anthropic.AuthenticationError) as refused:
                    create(sdk)
                assert refused.value.body["error"]["type"] == "authentication_error"
        headers = {"x-api-key": "secret"}
        assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{running.url}/v1/models", headers=headers | {"authorization": "Bearer x"}).status_code == 401


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"system": [{"type": "document"}]}, "system[0].type"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences"),
        ({"temperature": 1.5}, "temperature"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"n": 2}, "n"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, None),
    ],
)
def test_invalid_parameters_are_named(client: httpx.Client, fields: dict[str, Any], param: str | None) -> None:
    error_of(client.post(ROUTE, json=ask(**fields)), 400, "invalid_request_error", param)


def test_errors_have_the_sdks_classes(sdk: anthropic.Anthropic, client: httpx.Client) -> None:
    with pytest.raises(anthropic.NotFoundError):
        create(sdk, model="gpt-x")
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        create(sdk, temperature=7)
    error_of(client.post(ROUTE, json=ask(model="gpt-x")), 404, "not_found_error", "model")
    error_of(client.post("/v1/messages/count_tokens", json={"model": MODEL}), 400, "invalid_request_error", "messages")
    error_of(client.get(ROUTE), 405, "invalid_request_error")


def test_replies_are_as_described(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for name, instance in (("MessagesRequest", ask()), ("MessageReply", client.post(ROUTE, json=ask()).json())):
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(instance)
