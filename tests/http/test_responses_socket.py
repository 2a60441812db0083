"""The WebSocket of /v1/responses, over the real core: only what is new is sent, and only that is computed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from conftest import MODEL, Running, ServerThread, serve_core
from lmserve.api.responses.socket import ResponsesSocket
from lmserve.api.responses.store import session_of
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.text import TextLayer
from lmserve.keys import Keyring
from test_responses import ROUTE, ask, respond, text_of, validate
from tiny_engine import BLOCK, MAX_MODEL_LEN, byte_tokenizer, chat_template, formula_engine
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from wire import error_of, wait_until

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


def address(url: str, path: str = ROUTE) -> str:
    return url.replace("http://", "ws://") + path


@pytest.fixture
def socket(real: Running) -> Iterator[ClientConnection]:
    with connect(address(real.url), max_size=None) as socket:
        yield socket


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def send(socket: ClientConnection, source: Any = "Hello there", **fields: Any) -> None:
    socket.send(json.dumps({"type": "response.create", **ask(source, **fields)}))


def events(socket: ClientConnection) -> list[dict[str, Any]]:
    """The events up to the last of a response, or an error."""
    told = []
    while True:
        told.append(json.loads(socket.recv(timeout=30)))
        if told[-1]["type"] in ("response.completed", "response.incomplete", "response.failed", "error"):
            return told


def answer(socket: ClientConnection, source: Any = "Hello there", **fields: Any) -> dict[str, Any]:
    send(socket, source, **fields)
    last = events(socket)[-1]
    assert "response" in last, last
    return last["response"]


def refusal(socket: ClientConnection, status: int, code: str | None = None, param: str | None = None) -> None:
    told = json.loads(socket.recv(timeout=30))
    assert (told["type"], told["status"]) == ("error", status), told
    assert told["error"]["message"]
    if code is not None:
        assert told["error"]["code"] == code
    if param is not None:
        assert told["error"]["param"] == param


def test_the_events_are_those_of_the_stream(socket: ClientConnection, client: httpx.Client) -> None:
    send(socket)
    told = events(socket)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    for event in told:
        validate(client, "ResponseEvent", event)
    final = told[-1]["response"]
    assert text_of(final) == text_of(respond(client))
    assert client.get(f"{ROUTE}/{final['id']}").json() == final
    second = answer(socket, "Two", previous_response_id=final["id"])
    assert text_of(second) == text_of(respond(client, "Two", previous_response_id=final["id"]))


@pytest.mark.parametrize("store", [True, False])
def test_thirty_tool_calls_send_and_compute_only_what_is_new(
    real: Running, socket: ClientConnection, client: httpx.Client, store: bool
) -> None:
    sessions = real.core.stats()["sessions"]
    fields = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 60, "store": store}
    # Another text for each, so that the one finds nothing of the other in the cache.
    fields |= {"instructions": f"Be brief. Store: {store}", "ignore_eos": False}
    last = answer(socket, "Call it thirty times.", **fields)
    for number in range(30):
        (call,) = [item for item in last["output"] if item["type"] == "function_call"][:1]
        new = [{"type": "function_call_output", "call_id": call["call_id"], "output": str(number)}]
        before = last["usage"]["total_tokens"]
        last = answer(socket, new, previous_response_id=last["id"], **fields)
        usage = last["usage"]
        cached = usage["input_tokens_details"]["cached_tokens"]
        # All that came before, but for the last token, which was sampled and is computed with what follows it.
        assert before - BLOCK <= cached <= before
        assert usage["input_tokens"] - cached < 100 + BLOCK
        if not store:
            wait_until(lambda: real.core.stats()["sessions"] == sessions + 1, "the one before is given up")
    assert last["usage"]["input_tokens"] > 1000
    if store:
        return
    error_of(client.get(f"{ROUTE}/{last['id']}"), 404, "response_not_found")
    socket.close()
    wait_until(lambda: real.core.stats()["sessions"] == sessions, "the session ends with the connection")


def test_what_is_not_stored_is_of_its_connection(real: Running, socket: ClientConnection) -> None:
    first = answer(socket, store=False)
    second = answer(socket, "Two", store=False, previous_response_id=first["id"])
    # Only the last one can be continued.
    send(socket, "Three", previous_response_id=first["id"])
    refusal(socket, 404, "previous_response_not_found", "previous_response_id")
    assert answer(socket, "Three", store=False, previous_response_id=second["id"])["status"] == "incomplete"
    with connect(address(real.url)) as other:
        send(other, "x", previous_response_id=second["id"])
        refusal(other, 404, "previous_response_not_found")


def test_a_request_may_come_before_its_turn(socket: ClientConnection, client: httpx.Client) -> None:
    send(socket, "One", generate=False, instructions="Be brief.", store=False)
    warm = events(socket)
    assert [event["type"] for event in warm] == ["response.created", "response.completed"]
    assert warm[-1]["response"]["output"] == []
    for event in warm:
        validate(client, "ResponseEvent", event)
    first = answer(socket, "Two", previous_response_id=warm[-1]["response"]["id"], store=False)
    one, two = ({"role": "user", "content": text} for text in ("One", "Two"))
    plain = respond(client, [one, two], instructions="Be brief.")
    assert text_of(first) == text_of(plain)
    # And behind an answer.
    send(socket, "Three", generate=False, previous_response_id=first["id"], store=False)
    warm = events(socket)
    second = answer(socket, "Four", previous_response_id=warm[-1]["response"]["id"], store=False)
    three, four = ({"role": "user", "content": text} for text in ("Three", "Four"))
    assert text_of(second) == text_of(respond(client, [three, four], previous_response_id=plain["id"]))


def test_in_a_conversation(socket: ClientConnection, client: httpx.Client) -> None:
    conversation = client.post("/v1/conversations", json={}).json()["id"]
    said = [text_of(answer(socket, text, conversation=conversation)) for text in ("One", "Two")]
    items = client.get(f"/v1/conversations/{conversation}/items", params={"order": "asc"}).json()["data"]
    assert [item["content"][0]["text"] for item in items] == ["One", said[0], "Two", said[1]]


def test_the_sdk_connects(real: Running) -> None:
    with (
        openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk,
        sdk.responses.connect() as connection,
    ):
        connection.response.create(model=MODEL, input="Hello", max_output_tokens=5)
        kinds = []
        for event in connection:
            kinds.append(event.type)
            if event.type in ("response.completed", "response.incomplete", "error"):
                break
        assert kinds[0] == "response.created"
        assert kinds[-1] in ("response.completed", "response.incomplete")


def test_errors_leave_the_connection_open(socket: ClientConnection) -> None:
    for message, code, param in (
        ("", "invalid_json", None),
        ("[]", "invalid_value", None),
        ("{", "invalid_json", None),
        ("{}", "invalid_value", "type"),
        ('{"type": "x"}', "invalid_value", "type"),
        ('{"type": 7}', "invalid_value", "type"),
        ('{"type": "response.create"}', "missing_field", "input"),
        ('{"type": "response.create", "input": "x", "temprature": 1}', "unknown_field", "temprature"),
        ('{"type": "response.create", "input": "x", "generate": 1}', "invalid_value", "generate"),
        ('{"type": "response.create", "input": "x", "background": true}', "invalid_value", "background"),
        ('{"type": "response.create", "input": "x", "temperature": 9}', None, "temperature"),
    ):
        socket.send(message)
        refusal(socket, 400, code, param)
    socket.send(b"\xff\x00")
    refusal(socket, 400, "invalid_json")
    send(socket, model="nobody")
    refusal(socket, 404, "model_not_found")
    send(socket, "x" * 5000)
    refusal(socket, 400, "context_length_exceeded")
    assert answer(socket)["status"] == "incomplete"


def test_one_response_at_a_time(real: Running, socket: ClientConnection, client: httpx.Client) -> None:
    send(socket, max_output_tokens=3500)
    first = json.loads(socket.recv(timeout=30))
    send(socket, "Two")
    while (told := json.loads(socket.recv(timeout=30)))["type"] != "error":
        pass
    assert (told["status"], told["error"]["code"]) == (409, "response_running")
    client.post(f"{ROUTE}/{first['response']['id']}/cancel").raise_for_status()
    assert events(socket)[-1]["response"]["status"] == "cancelled"
    assert answer(socket)["status"] == "incomplete"


def test_a_client_that_leaves_leaves_nothing(real: Running) -> None:
    wait_until(lambda: real.core.stats()["open_requests"] == 0, "nothing runs")
    sessions, tasks = real.core.stats()["sessions"], real.open_tasks()
    with connect(address(real.url)) as socket:
        send(socket, max_output_tokens=3500, store=False)
        first = json.loads(socket.recv(timeout=30))
    wait_until(lambda: real.core.stats()["open_requests"] == 0, "nothing runs any more")
    wait_until(lambda: real.core.stats()["sessions"] == sessions, "no session is left")
    wait_until(lambda: real.open_tasks() <= tasks, "no task is left")
    assert session_of(first["response"]["id"]) < 0


def test_keys() -> None:
    with serve_core(formula_engine(), keys=Keyring.of("a", "b")) as running:
        for headers in ({}, {"x-api-key": "c"}, {"authorization": "Basic x"}):
            with (
                pytest.raises(InvalidStatus) as caught,
                connect(address(running.url), additional_headers=headers),
            ):
                pass
            assert caught.value.response.status_code == 401
            assert json.loads(caught.value.response.body or b"")["error"]["code"] == "invalid_api_key"
        a, b = ({"authorization": f"Bearer {key}"} for key in "ab")
        with (
            connect(address(running.url), additional_headers=a) as mine,
            connect(address(running.url), additional_headers=b) as other,
        ):
            first = answer(mine)
            send(other, "x", previous_response_id=first["id"])
            refusal(other, 404, "previous_response_not_found")
            assert answer(mine, "x", previous_response_id=first["id"])["status"] == "incomplete"


def test_pages_of_other_origins_open_none(real: Running) -> None:
    with pytest.raises(InvalidStatus) as caught, connect(address(real.url), origin="https://evil.example"):  # type: ignore[arg-type]
        pass
    assert caught.value.response.status_code == 403
    assert json.loads(caught.value.response.body or b"")["error"]["code"] == "origin_not_allowed"
    with connect(address(real.url), origin=real.url) as socket:  # type: ignore[arg-type]
        assert answer(socket)["status"] == "incomplete"


def test_other_paths_have_no_socket_and_the_short_one_has(real: Running) -> None:
    for path in ("/v1/chat/completions", "/", "/v1/responses/resp_0000000000000000"):
        with pytest.raises(InvalidStatus) as caught, connect(address(real.url, path)):
            pass
        assert caught.value.response.status_code in (200, 404, 405)
    with connect(address(real.url, "/responses"), additional_headers={"x-request-id": "mine"}) as socket:
        assert socket.response is not None
        assert socket.response.headers["x-request-id"] == "mine"
        assert answer(socket)["status"] == "incomplete"


def test_a_message_over_the_limit_ends_the_connection(real: Running) -> None:
    with connect(address(real.url)) as socket:
        with suppress(ConnectionClosed):
            socket.send(b"x" * (33 * 1024 * 1024), text=True)
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)
        # The kernel may throw the reason away with what was not read.
        assert socket.close_code in (1009, 1006)


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("last", ["response.created", "response.incomplete"])
def test_a_client_that_leaves_before_it_hears_of_the_end_leaves_no_session(store: bool, last: str) -> None:
    core = formula_engine()
    text = TextLayer(byte_tokenizer(), chat_template())
    app = create_app(AsyncEngine(core, max_model_len=MAX_MODEL_LEN, text=text), [MODEL])  # type: ignore[arg-type]
    left, told = asyncio.Event(), list[str]()

    async def talk() -> None:
        async def send(message: str) -> None:
            event = json.loads(message)
            if event["type"] == last:
                told.append(event["response"]["id"])
                await asyncio.to_thread(wait_until, lambda: core.stats()["open_requests"] == 0, "the core has ended it")
                left.set()
                raise OSError("the client has left")

        socket = ResponsesSocket(app.state.serving, 0, lambda _: None, send, lambda *_: None)
        await socket.receive(json.dumps({"type": "response.create", **ask("Hello", store=store)}).encode())
        await left.wait()
        await socket.close()

    with ServerThread(app) as thread:
        assert thread.loop is not None
        asyncio.run_coroutine_threadsafe(talk(), thread.loop).result(30)
        # Where all events come at once, the response is stored before the first is sent.
        kept = int(app.state.serving.responses.get(0, told[0]) is not None)
        assert kept <= store
        assert kept or not store or last == "response.created"
        wait_until(lambda: core.stats()["sessions"] == kept, "the session is given up")


@pytest.mark.parametrize(
    "frame",
    [
        b"\x81\x05hello",  # not masked
        b"\xf1\x80\x00\x00\x00\x00",  # bits that mean nothing
        b"\x83\x80\x00\x00\x00\x00",  # no such opcode
        b"\x81\x82\x00\x00\x00\x00\xff\xfe",  # text that is no UTF-8
        b"\x80\x81\x00\x00\x00\x00x",  # goes on with nothing
        b"\x89\xfe\x00\x7e" + bytes(4 + 126),  # a ping that is too long
        b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff" + bytes(4),  # of 8 EiB
        b"\x01\x81\x00\x00\x00\x00{",  # the beginning of a message, and no more
        bytes(range(256)) * 8,
    ],
)
def test_frames_that_are_none_end_their_connection_alone(real: Running, client: httpx.Client, frame: bytes) -> None:
    tasks = real.open_tasks()
    with connect(address(real.url)) as socket:
        send(socket, max_output_tokens=3500, store=False)
        socket.recv(timeout=30)
        socket.socket.sendall(frame)
        if frame.startswith(b"\x01"):
            socket.socket.shutdown(2)
        with suppress(ConnectionClosed):
            while True:
                socket.recv(timeout=30)
    wait_until(lambda: real.core.stats()["open_requests"] == 0, "nothing runs any more")
    wait_until(lambda: real.open_tasks() <= tasks, "no task is left")
    assert respond(client)["status"] == "incomplete"
