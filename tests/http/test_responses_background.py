"""/v1/responses in the background as a stream: who leaves comes back, and misses nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.api.responses.events import ResponseEvents
from lmserve.api.responses.log import ResponseLog
from lmserve.api.responses.store import ResponseStore, StoredResponse, session_of
from lmserve.errors import LmserveError
from lmserve.keys import Keyring
from test_responses import ROUTE, ask, events_of, respond, text_of, validate
from tiny_engine import formula_engine

from wire import error_of, wait_until


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def begun(client: httpx.Client, **fields: Any) -> tuple[str, list[dict[str, Any]]]:
    """A response whose client left, and the whole events that it had by then."""
    with client.stream("POST", ROUTE, json=ask(background=True, stream=True, **fields)) as response:
        assert response.status_code == 200
        received = b""
        for chunk in response.iter_bytes():
            received += chunk
            if received.count(b"\n\n") > 8:
                break
    events = events_of(received[: received.rindex(b"\n\n") + 2])
    return events[0]["response"]["id"], events


def streamed(client: httpx.Client, response_id: str, after: int | None = None) -> list[dict[str, Any]]:
    params = {"stream": "true"} | ({} if after is None else {"starting_after": after})
    response = client.get(f"{ROUTE}/{response_id}", params=params)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return [json.loads(event.split("\ndata: ")[1]) for event in response.text.split("\n\n")[:-1]]


def test_a_client_that_left_comes_back(client: httpx.Client) -> None:
    response_id, seen = begun(client, max_output_tokens=400)
    assert seen[0]["response"]["background"] is True
    rest = streamed(client, response_id, seen[-1]["sequence_number"])
    events = [*seen, *rest]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    assert final["status"] == "incomplete"
    assert "".join(event["delta"] for event in events if "delta" in event) == text_of(final)
    assert client.get(f"{ROUTE}/{response_id}").json() == final
    # And again, from anywhere, and by two at once.
    assert streamed(client, response_id) == events
    assert streamed(client, response_id, -1) == events
    assert streamed(client, response_id, len(events) - 2) == events[-1:]
    assert streamed(client, response_id, len(events) - 1) == []
    assert streamed(client, response_id, len(events) + 5) == []
    for event in events:
        validate(client, "ResponseEvent", event)
    plain = respond(client, max_output_tokens=400)
    assert text_of(plain) == text_of(final)


def test_the_sdk_resumes(real: Running) -> None:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk:
        created = sdk.responses.create(model=MODEL, input="Hello", background=True, stream=True, max_output_tokens=300)
        response_id, last = None, 0
        for event in created:
            last = event.sequence_number
            if event.type == "response.created":
                response_id = event.response.id
            if last == 9:
                break
        created.close()
        assert response_id is not None
        again = list(sdk.responses.retrieve(response_id, stream=True, starting_after=last))
        assert [event.sequence_number for event in again][:2] == [10, 11]
        assert again[-1].type in ("response.completed", "response.incomplete")


def test_cancelled_and_deleted_ones_end_their_readers(real: Running, client: httpx.Client) -> None:
    response_id, _ = begun(client, max_output_tokens=3500)
    cancelled = client.post(f"{ROUTE}/{response_id}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert streamed(client, response_id)[-1]["response"] == cancelled
    response_id, _ = begun(client, max_output_tokens=3500)
    with client.stream("GET", f"{ROUTE}/{response_id}", params={"stream": "true"}) as response:
        chunks = response.iter_bytes()
        next(chunks)
        httpx.delete(f"{real.url}{ROUTE}/{response_id}", timeout=60).raise_for_status()
        assert b"sequence_number" in b"".join(chunks)
    error_of(client.get(f"{ROUTE}/{response_id}", params={"stream": "true"}), 404, "response_not_found")
    wait_until(lambda: real.core.stats()["open_requests"] == 0, "nothing runs any more")


def test_what_is_refused_gets_its_status_and_is_not_kept(real: Running, client: httpx.Client) -> None:
    sessions = real.core.stats()["sessions"]
    body = ask("x" * 5000, background=True, stream=True)
    error_of(client.post(ROUTE, json=body), 400, "context_length_exceeded")
    assert real.core.stats()["sessions"] == sessions
    body = ask(background=True, stream=True, store=False)
    error_of(client.post(ROUTE, json=body), 400, param="background")


def test_keys_do_not_read_each_others_events() -> None:
    with serve_core(formula_engine(), keys=Keyring.of("a", "b")) as running:
        a, b = (httpx.Client(base_url=running.url, headers={"x-api-key": key}, timeout=60) for key in "ab")
        with a, b:
            response_id, _ = begun(a)
            error_of(b.get(f"{ROUTE}/{response_id}", params={"stream": "true"}), 404, "response_not_found")
            assert streamed(a, response_id)[-1]["response"]["id"] == response_id


def test_one_that_ran_when_the_server_ended_has_failed(tmp_path: Path) -> None:
    def store() -> ResponseStore:
        return ResponseStore(ResponseLog(tmp_path, {0: bytes(32)}), "always")

    with serve_core(formula_engine(pause=0.01), responses=(responses := store())) as running:
        responses.restore()
        reply = httpx.post(f"{running.url}{ROUTE}", json=ask(background=True, max_output_tokens=500)).json()
        response_id = reply["id"]
        # As it is on the disk once its client knows of it: what a server that is killed leaves behind.
        written = (tmp_path / "responses.log").read_bytes()
    (tmp_path / "responses.log").write_bytes(written)
    with serve_core(formula_engine(), responses=(restored := store())) as running:
        assert restored.restore() == 1
        reply = httpx.get(f"{running.url}{ROUTE}/{response_id}").json()
        assert reply["status"] == "failed"
        assert reply["error"]["code"] == "server_error"
        assert "the server stopped" in reply["error"]["message"]
        body = ask(previous_response_id=response_id)
        error_of(httpx.post(f"{running.url}{ROUTE}", json=body), 404, "previous_response_not_found")


def event(number: int, size: int = 0) -> bytes:
    return f'event: x\ndata: {{"n":{number},"fill":"{"x" * size}"}}\n\n'.encode()


def test_events_are_kept_within_a_size() -> None:
    async def run() -> None:
        events = ResponseEvents(max_bytes=1000)
        for number in range(0, 20, 2):
            events.add(event(number, 50) + event(number + 1, 50))
        assert (events.first, events.count) == (10, 20)
        assert events.since(13) == b"".join(event(number, 50) for number in range(13, 20))
        assert events.since(10).startswith(event(10, 50))
        with pytest.raises(LmserveError, match="no longer has the events up to 9"):
            events.follow()
        reader = events.follow(16)
        assert await anext(reader) == event(17, 50) + event(18, 50) + event(19, 50)
        waiting = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        events.add(event(20))
        assert await waiting == event(20)
        slow = events.follow(17)
        events.forget()
        with pytest.raises(StopAsyncIteration):
            await anext(slow)
        assert not slow.aborted

    asyncio.run(run())


def test_events_of_many_responses_are_kept_within_a_size() -> None:
    async def run() -> None:
        store = ResponseStore(max_event_bytes=1000)
        kept = []
        for name in "abc":
            events = ResponseEvents()
            events.add(event(0, 400))
            kept.append(StoredResponse(instructions=None, items=[], body=b"{}", events=events))
            store.begin(1, name, kept[-1])
            store.end(1, name, b"{}")
        assert [response.events is not None for response in kept] == [False, True, True]
        store.drop(1, "b")
        store.begin(1, "d", StoredResponse(instructions=None, items=[], body=b"{}", events=events))
        store.end(1, "d", b"{}")
        assert kept[2].events is not None

    asyncio.run(run())


def test_the_session_is_the_responses_own(real: Running, client: httpx.Client) -> None:
    response_id, _ = begun(client, max_output_tokens=30)
    streamed(client, response_id)
    tokens = len(real.core.session_tokens(0, session_of(response_id)))
    second = respond(client, "Two", previous_response_id=response_id)
    assert second["usage"]["input_tokens"] > tokens
