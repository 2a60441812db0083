"""/v1/responses, by the `openai` SDK and by hand, over the real core."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import msgspec
import openai
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.api.responses.store import ResponseStore, StoredResponse, new_response_id, session_of
from lmserve.errors import LmserveError
from lmserve.keys import Keyring
from lmserve.schemas.response_reply import StoredMessage, StoredPart
from pydantic import BaseModel
from tiny_engine import formula_engine

from wire import error_of, wait_until

ROUTE = "/v1/responses"


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@pytest.fixture
def sdk(real: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def ask(source: Any = "Hello there", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": source, "max_output_tokens": 12, "seed": 5, "ignore_eos": True, **fields}


def respond(client: httpx.Client, source: Any = "Hello there", **fields: Any) -> dict[str, Any]:
    response = client.post(ROUTE, json=ask(source, **fields))
    assert response.status_code == 200, response.text
    return response.json()


def text_of(response: dict[str, Any]) -> str:
    (message,) = response["output"]
    (part,) = message["content"]
    return part["text"]


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events, once each is named as its data says and they are numbered."""
    *events, rest = body.decode().split("\n\n")
    assert rest == ""
    parsed = []
    for number, event in enumerate(events):
        name, data = event.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
        assert parsed[-1]["sequence_number"] == number
    return parsed


def validate(client: httpx.Client, name: str, instance: Any) -> None:
    document = client.get("/openapi.json").json()
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(instance)


def test_whole_reply(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(
        model=MODEL, input="Hello there", instructions="Be brief.", max_output_tokens=9, metadata={"a": "b"}, top_p=0.5
    )
    assert response.id.startswith("resp_")
    assert response.output_text
    assert response.status in ("completed", "incomplete")
    assert (response.instructions, response.metadata, response.top_p) == ("Be brief.", {"a": "b"}, 0.5)
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert sdk.responses.retrieve(response.id) == response
    items = sdk.responses.input_items.list(response.id).data
    assert [(item.role, item.content[0].text) for item in items] == [("user", "Hello there")]
    sdk.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)


def test_why_it_ended(client: httpx.Client) -> None:
    cut = respond(client, max_output_tokens=3)
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert cut["output"][0]["status"] == "incomplete"
    stopped = respond(client, max_output_tokens=4000, ignore_eos=False)
    assert (stopped["status"], stopped["incomplete_details"]) == ("completed", None)
    assert stopped["output"][0]["status"] == "completed"
    validate(client, "ResponseReply", cut)
    validate(client, "ResponseReply", stopped)


def test_the_sdk_streams(sdk: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "input": "Hello there", "max_output_tokens": 500}
    extra = {"seed": 3}
    whole = sdk.responses.create(**options, extra_body=extra)
    with sdk.responses.stream(**options, extra_body=extra) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "response.output_text.delta" in kinds
    assert sdk.responses.retrieve(final.id).output_text == whole.output_text


def test_the_order_of_events(client: httpx.Client) -> None:
    response = client.post(ROUTE, json=ask(stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response.content)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 5
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    text = "".join(event["delta"] for event in events if "delta" in event)
    final = events[-1]["response"]
    assert text == text_of(final) == events[-4]["text"] == events[-3]["part"]["text"]
    assert events[-2]["item"] == final["output"][0]
    assert final == client.get(f"{ROUTE}/{final['id']}").json()
    whole = respond(client)
    assert text_of(whole) == text
    own = {"id", "output", "created_at", "usage"}
    assert {k: v for k, v in final.items() if k not in own} == {k: v for k, v in whole.items() if k not in own}
    for event in events:
        validate(client, "ResponseEvent", event)


def test_logprobs(client: httpx.Client) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 30}
    logprobs = respond(client, **fields)["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 30
    assert logprobs[0]["top_logprobs"][0] == {"token": "A", "logprob": -1.0, "bytes": [65]}
    events = events_of(client.post(ROUTE, json=ask(**fields, stream=True)).content)
    assert [token for event in events if "delta" in event for token in event["logprobs"]] == logprobs
    assert events[-4]["logprobs"] == logprobs


class Colour(BaseModel):
    name: Literal["red", "green"]
    known: bool


def test_structured_text(sdk: openai.OpenAI, client: httpx.Client) -> None:
    parsed = sdk.responses.parse(model=MODEL, input="Hello", text_format=Colour, temperature=0)
    assert isinstance(parsed.output_parsed, Colour)
    schema = {"type": "json_schema", "name": "n", "schema": {"enum": ["a", "b"]}}
    first = respond(client, text={"format": schema}, ignore_eos=False)
    assert json.loads(text_of(first)) in ("a", "b")
    assert first["text"]["format"] == schema | {"description": None, "strict": None}
    assert first["status"] == "completed"
    validate(client, "ResponseReply", first)
    second = respond(client, "Two", previous_response_id=first["id"])
    assert second["text"] == {"format": {"type": "text"}}
    some = respond(client, text={"format": {"type": "json_object"}}, max_output_tokens=200)
    assert text_of(some).startswith("{")


def test_going_on_is_token_exact_and_computes_nothing_again(real: Running, client: httpx.Client) -> None:
    first = respond(client, "One", instructions="Be brief.", max_output_tokens=40)
    second = respond(client, "Two", previous_response_id=first["id"])
    history = first["usage"]["total_tokens"]
    assert second["usage"]["input_tokens"] > history
    assert history - 16 <= second["usage"]["input_tokens_details"]["cached_tokens"] <= history
    tokens = real.core.session_tokens(0, session_of(second["id"]))
    assert tokens[:history] == real.core.session_tokens(0, session_of(first["id"]))
    # The same as one session of the other route.
    body = {"model": MODEL, "session_id": 7_001_193, "seed": 5, "ignore_eos": True}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"}]
    client.post("/v1/chat/completions", json=body | {"messages": messages, "max_tokens": 40})
    chat = client.post(
        "/v1/chat/completions",
        json=body | {"messages": [{"role": "user", "content": "Two"}], "max_tokens": 12},
    ).json()
    assert chat["choices"][0]["message"]["content"] == text_of(second)
    assert tokens == real.core.session_tokens(0, 7_001_193)


def test_a_response_may_be_continued_twice(client: httpx.Client) -> None:
    first = respond(client, "One")
    left, right = (respond(client, "Two", previous_response_id=first["id"]) for _ in range(2))
    assert left["id"] != right["id"]
    assert text_of(left) == text_of(right)
    other = respond(client, "Three", previous_response_id=first["id"], seed=6)
    assert text_of(other) != text_of(left)
    third = respond(client, "Four", previous_response_id=left["id"], stream=False)
    assert third["usage"]["input_tokens"] > left["usage"]["input_tokens"]
    unseeded = [
        text_of(respond(client, "Two", previous_response_id=first["id"], seed=None, max_output_tokens=30))
        for _ in range(2)
    ]
    assert unseeded[0] != unseeded[1]


def test_instructions_are_not_repeated(client: httpx.Client) -> None:
    first = respond(client, "One", instructions="Be brief.")
    plain = respond(client, "Two", previous_response_id=first["id"])
    same = respond(client, "Two", previous_response_id=first["id"], instructions="Be brief.")
    other = respond(client, "Two", previous_response_id=first["id"], instructions="Be long.")
    assert same["usage"]["input_tokens"] == plain["usage"]["input_tokens"]
    assert other["usage"]["input_tokens"] > plain["usage"]["input_tokens"]
    again = respond(client, "Three", previous_response_id=plain["id"], instructions="Be brief.")
    plain = respond(client, "Three", previous_response_id=plain["id"])
    assert again["usage"]["input_tokens"] == plain["usage"]["input_tokens"]


def test_input_as_items(sdk: openai.OpenAI, client: httpx.Client) -> None:
    first = sdk.responses.create(model=MODEL, input="One", max_output_tokens=5)
    # As the SDK's users keep a conversation by themselves.
    history: list[Any] = [
        {"role": "user", "content": "One"},
        *first.output,
        {"role": "user", "content": [{"type": "input_text", "text": "T"}, {"type": "input_text", "text": "wo"}]},
    ]
    second = sdk.responses.create(model=MODEL, input=history, max_output_tokens=5, extra_body={"seed": 2})
    plain = respond(
        client,
        [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": first.output_text},
            {"type": "message", "role": "user", "content": "Two"},
        ],
        max_output_tokens=5,
        seed=2,
        ignore_eos=False,
    )
    assert second.output_text == text_of(plain)
    route = f"{ROUTE}/{second.id}/input_items"
    page = client.get(route, params={"order": "asc", "limit": 2}).json()
    assert [item["role"] for item in page["data"]] == ["user", "assistant"]
    assert page["data"][1]["content"][0]["type"] == "output_text"
    assert page["has_more"]
    rest = client.get(route, params={"order": "asc", "after": page["last_id"]}).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["Two"]
    assert not rest["has_more"]
    newest = client.get(route).json()["data"]
    assert [item["id"] for item in newest] == [item["id"] for item in [*page["data"], *rest["data"]]][::-1]
    error_of(client.get(route, params={"after": "nobody"}), 400, param="after")


def test_what_is_not_stored_leaves_nothing_behind(real: Running, client: httpx.Client) -> None:
    sessions = real.core.stats()["sessions"]
    loose = respond(client, store=False)
    assert loose["store"] is False
    first = respond(client)
    second = respond(client, "Two", previous_response_id=first["id"], store=False)
    assert second["usage"]["input_tokens"] > first["usage"]["total_tokens"]
    for gone in (loose, second):
        error_of(client.get(f"{ROUTE}/{gone['id']}"), 404, "response_not_found", "response_id")
        response = client.post(ROUTE, json=ask("Three", previous_response_id=gone["id"]))
        error_of(response, 404, "previous_response_not_found", "previous_response_id")
    assert real.core.stats()["sessions"] == sessions + 1


def test_what_goes_on_from_a_deleted_response_stays(client: httpx.Client) -> None:
    first = respond(client)
    second = respond(client, "Two", previous_response_id=first["id"])
    assert client.delete(f"{ROUTE}/{first['id']}").json() == {"id": first["id"], "object": "response", "deleted": True}
    error_of(client.delete(f"{ROUTE}/{first['id']}"), 404, "response_not_found")
    response = client.post(ROUTE, json=ask("Three", previous_response_id=first["id"]))
    error_of(response, 404, "previous_response_not_found", "previous_response_id")
    assert respond(client, "Three", previous_response_id=second["id"])["usage"]["input_tokens"] > 0


def test_stored_responses_are_no_sessions_of_the_client(client: httpx.Client) -> None:
    first = respond(client)
    listed = client.get("/v1/sessions", params={"limit": 1000}).json()["data"]
    assert all(session["id"] >= 0 for session in listed)
    body = {"prompt": "x", "instance_id": session_of(first["id"]), "sequence_start": False}
    error_of(client.post("/generate", json=body), 400, param="instance_id")


def test_a_client_that_leaves_leaves_no_response(real: Running, client: httpx.Client) -> None:
    sessions = real.core.stats()["sessions"]
    with client.stream("POST", ROUTE, json=ask(stream=True, max_output_tokens=3500)) as response:
        chunks = response.iter_bytes()
        first = next(chunks)
    event = json.loads(first.decode().split("\n\n")[0].split("\ndata: ")[1])
    wait_until(lambda: real.core.stats()["open_requests"] == 0, "nothing runs any more")
    assert real.core.stats()["sessions"] == sessions
    error_of(client.get(f"{ROUTE}/{event['response']['id']}"), 404, "response_not_found")


def test_cancel(real: Running, client: httpx.Client) -> None:
    events: list[dict[str, Any]] = []
    started = threading.Event()
    ids: list[str] = []

    def run() -> None:
        body = ask(stream=True, max_output_tokens=3500)
        with httpx.stream("POST", f"{real.url}{ROUTE}", json=body, timeout=60) as response:
            received = b""
            for chunk in response.iter_bytes():
                received += chunk
                if not ids:
                    ids.append(json.loads(received.decode().split("\n\n")[0].split("\ndata: ")[1])["response"]["id"])
                    started.set()
        events.extend(events_of(received))

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    assert client.get(f"{ROUTE}/{ids[0]}").json()["status"] == "in_progress"
    cancelled = client.post(f"{ROUTE}/{ids[0]}/cancel").json()
    thread.join(30)
    assert cancelled["status"] == "cancelled"
    assert events[-1]["response"] == cancelled
    assert client.get(f"{ROUTE}/{ids[0]}").json() == cancelled
    assert client.post(f"{ROUTE}/{ids[0]}/cancel").json() == cancelled
    validate(client, "ResponseReply", cancelled)
    # What it has generated is kept.
    going_on = respond(client, "Go on", previous_response_id=ids[0])
    assert going_on["usage"]["input_tokens"] > cancelled["usage"]["total_tokens"]
    error_of(client.post(f"{ROUTE}/{going_on['id']}/cancel"), 400, "response_ended", "response_id")


def test_in_the_background(real: Running, sdk: openai.OpenAI, client: httpx.Client) -> None:
    started = sdk.responses.create(model=MODEL, input="Hello", background=True, max_output_tokens=30)
    assert started.status == "in_progress"
    wait_until(lambda: sdk.responses.retrieve(started.id).status != "in_progress", "it ends")
    assert sdk.responses.retrieve(started.id).output_text
    long = sdk.responses.create(
        model=MODEL, input="Hello", background=True, max_output_tokens=3500, extra_body={"ignore_eos": True}
    )
    assert sdk.responses.cancel(long.id).status == "cancelled"
    deleted = sdk.responses.create(
        model=MODEL, input="Hello", background=True, max_output_tokens=3500, extra_body={"ignore_eos": True}
    )
    sdk.responses.delete(deleted.id)
    wait_until(lambda: real.core.stats()["open_requests"] == 0, "nothing runs any more")
    failed = respond(client, "x" * 5000, background=True)
    wait_until(lambda: client.get(f"{ROUTE}/{failed['id']}").json()["status"] == "failed", "it fails")
    assert "context" in client.get(f"{ROUTE}/{failed['id']}").json()["error"]["message"]


def test_a_parent_that_runs_is_waited_for_by_its_client(client: httpx.Client) -> None:
    running = respond(client, background=True, max_output_tokens=3500)
    response = client.post(ROUTE, json=ask("Two", previous_response_id=running["id"]))
    error_of(response, 409, "session_busy")
    assert response.headers["retry-after"] == "1"
    assert client.post(f"{ROUTE}/{running['id']}/cancel").json()["status"] == "cancelled"


def test_truncation(client: httpx.Client) -> None:
    response_id = None
    for _ in range(3):
        response_id = respond(client, "x" * 1200, previous_response_id=response_id)["id"]
    long = ask("x" * 1200, previous_response_id=response_id)
    error_of(client.post(ROUTE, json=long), 400, "context_length_exceeded")
    shorter = respond(client, "x" * 1200, previous_response_id=response_id, truncation="auto")
    assert shorter["usage"]["input_tokens"] < 4096


def test_keys_do_not_share_responses() -> None:
    with serve_core(formula_engine(), keys=Keyring.of("a", "b")) as running:
        clients = [
            httpx.Client(base_url=running.url, headers={"authorization": f"Bearer {key}"}, timeout=60) for key in "ab"
        ]
        first = respond(clients[0])
        for path, method in (("", "GET"), ("", "DELETE"), ("/cancel", "POST"), ("/input_items", "GET")):
            error_of(clients[1].request(method, f"{ROUTE}/{first['id']}{path}"), 404, "response_not_found")
        response = clients[1].post(ROUTE, json=ask(previous_response_id=first["id"]))
        error_of(response, 404, "previous_response_not_found")
        assert clients[0].get(f"{ROUTE}/{first['id']}").json() == first
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "custom_tool_call", "call_id": "x", "name": "f"}]}, "input[0].input"),
        ({"input": [{"type": "function_call_output", "output": "y"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {str(at): "x" for at in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"$ref": "#/x"}}}}, "text.format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"conversation": "conv_1", "previous_response_id": "resp_0123456789abcdef"}, "conversation"),
        ({"conversation": 7}, "conversation"),
        ({"input": [{"type": "compaction"}]}, "input[0].encrypted_content"),
        ({"input": [{"type": "compaction", "encrypted_content": "lmserve1.x"}]}, "input[0].encrypted_content"),
        ({"background": True, "store": False}, "background"),
        ({"n": 2}, "n"),
    ],
)
def test_invalid_parameters_are_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error_of(client.post(ROUTE, json=ask() | fields), 400, param=param)


@pytest.mark.parametrize(
    "response_id", ["resp_ffffffffffffffff", "resp_1", "x", "resp_0000000000000000", "resp_" + "g" * 16]
)
def test_ids_of_nothing(client: httpx.Client, response_id: str) -> None:
    error_of(client.get(f"{ROUTE}/{response_id}"), 404, "response_not_found", "response_id")
    error_of(client.delete(f"{ROUTE}/{response_id}"), 404, "response_not_found", "response_id")
    response = client.post(ROUTE, json=ask(previous_response_id=response_id))
    error_of(response, 404, "previous_response_not_found", "previous_response_id")


def test_what_was_no_stream_of_the_background_is_not_streamed_again(client: httpx.Client) -> None:
    first, silent = respond(client), respond(client, background=True)
    for given in (first, silent):
        error_of(client.get(f"{ROUTE}/{given['id']}", params={"stream": "true"}), 400, "events_not_kept", "stream")
    error_of(client.get(f"{ROUTE}/{first['id']}", params={"starting_after": 3}), 400, param="starting_after")


def stored(text: str = "x" * 100) -> StoredResponse:
    item = StoredMessage(id="a", role="user", content=[StoredPart(type="input_text", text=text)])
    return StoredResponse(instructions=None, items=[item], body=b"{}")


def test_the_store_holds_so_many_and_so_much() -> None:
    store = ResponseStore(max_responses=3, max_bytes=1000)
    for name in "abc":
        store.begin(1, name, stored())
    assert store.get(1, "a") is not None
    store.begin(1, "d", stored())
    assert [store.get(1, name) is not None for name in "abcd"] == [True, False, True, True]
    store.end(1, "d", b"x" * 900)
    assert [store.get(1, name) is not None for name in "acd"] == [False, False, True]
    assert store.get(2, "d") is None
    running = stored()
    store.begin(1, "e", running)
    store.end(1, "e", None)
    assert store.get(1, "e") is None
    assert running.ended.is_set()
    assert not store.drop(1, "e")


def test_ids_name_sessions_that_no_client_can_name() -> None:
    ids = {new_response_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(session_of(response_id) <= -2 for response_id in ids)
    with pytest.raises(LmserveError):
        session_of("resp_4000000000000000")
    assert msgspec.json.encode(session_of("resp_3fffffffffffffff")) == str(-1 - 2**62).encode()
