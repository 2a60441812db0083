"""/v1/conversations and the responses in them, over the real core, by the `openai` SDK and by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.api.responses.store import session_of
from lmserve.api.state.conversations import Conversations
from lmserve.api.state.database import Database
from lmserve.errors import LmserveError
from lmserve.keys import Keyring
from test_responses import ROUTE, ask, events_of, respond, text_of, validate
from tiny_engine import formula_engine

from wire import error_of, wait_until

ALL = "/v1/conversations"


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def begun(client: httpx.Client, **fields: Any) -> str:
    response = client.post(ALL, json=fields)
    assert response.status_code == 200, response.text
    validate(client, "ConversationReply", response.json())
    return response.json()["id"]


def texts(client: httpx.Client, conversation: str) -> list[str]:
    """What was said, in order."""
    response = client.get(f"{ALL}/{conversation}/items", params={"order": "asc", "limit": 100})
    assert response.status_code == 200, response.text
    validate(client, "ItemList", response.json())
    return [item["content"][0]["text"] for item in response.json()["data"]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_the_sdk_talks(real: Running) -> None:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk:
        made = sdk.conversations.create(items=[user("My name is Ada.")], metadata={"a": "b"})  # type: ignore[list-item]
        assert (made.object, made.metadata) == ("conversation", {"a": "b"})
        assert sdk.conversations.retrieve(made.id) == made
        assert sdk.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
        first = sdk.responses.create(model=MODEL, conversation=made.id, input="Hello", max_output_tokens=5)
        assert first.conversation is not None
        assert first.conversation.id == made.id
        second = sdk.responses.create(
            model=MODEL, conversation={"id": made.id}, input=[user("Again")], max_output_tokens=5
        )  # type: ignore[call-overload]
        items = list(sdk.conversations.items.list(made.id, order="asc", limit=2))
        assert [item.role for item in items] == ["user", "user", "assistant", "user", "assistant"]  # type: ignore[union-attr]
        assert items[-1].content[0].text == second.output_text  # type: ignore[union-attr]
        added = sdk.conversations.items.create(made.id, items=[user("More")])  # type: ignore[list-item]
        assert added.data[0].status == "completed"  # type: ignore[union-attr]
        assert sdk.conversations.items.retrieve(added.data[0].id, conversation_id=made.id) == added.data[0]
        assert sdk.conversations.items.delete(added.data[0].id, conversation_id=made.id).id == made.id
        assert len(list(sdk.conversations.items.list(made.id))) == 5
        assert sdk.conversations.delete(made.id).deleted
        with pytest.raises(openai.NotFoundError):
            sdk.conversations.retrieve(made.id)


def test_only_what_is_new_is_computed(real: Running, client: httpx.Client) -> None:
    conversation = begun(client, items=[user("One")])
    first = respond(client, "Two", conversation=conversation, instructions="Say little.")
    second = respond(client, "Three", conversation={"id": conversation})
    history = first["usage"]["total_tokens"]
    assert history - 16 <= second["usage"]["input_tokens_details"]["cached_tokens"] <= history
    assert second["conversation"] == {"id": conversation}
    # The same, token for token, as the chain by previous_response_id.
    plain = respond(client, [user("One"), user("Two")], instructions="Say little.")
    assert text_of(plain) == text_of(first)
    other = respond(client, "Three", previous_response_id=plain["id"])
    assert text_of(other) == text_of(second)
    tokens = [real.core.session_tokens(0, session_of(each["id"])) for each in (second, other)]
    assert tokens[0] == tokens[1]
    assert texts(client, conversation) == ["One", "Two", text_of(first), "Three", text_of(second)]
    # What is added between is read with the next turn.
    client.post(f"{ALL}/{conversation}/items", json={"items": [user("Four")]}).raise_for_status()
    third = respond(client, "Five", conversation=conversation)
    both = respond(client, [user("Four"), user("Five")], previous_response_id=other["id"])
    assert text_of(third) == text_of(both)


def test_the_count_knows_conversations(real: Running, client: httpx.Client) -> None:
    conversation = begun(client, items=[user("One")])
    for said in ("Two", "Three"):
        body = {"input": said, "conversation": conversation}
        count = client.post(f"{ROUTE}/input_tokens", json=body).json()["input_tokens"]
        answer = respond(client, said, conversation=conversation)
        assert answer["usage"]["input_tokens"] == count
    # And without its session.
    real.core.end_session(0, session_of(answer["id"]), False)
    count = client.post(f"{ROUTE}/input_tokens", json={"input": "x", "conversation": conversation}).json()
    assert respond(client, "x", conversation=conversation)["usage"]["input_tokens"] == count["input_tokens"]


def test_what_is_not_stored_is_in_its_conversation(real: Running, client: httpx.Client) -> None:
    sessions = real.core.stats()["sessions"]
    conversation = begun(client)
    for said in ("One", "Two", "Three"):
        answer = respond(client, said, conversation=conversation, store=False)
        error_of(client.get(f"{ROUTE}/{answer['id']}"), 404, "response_not_found")
        # One session for the whole conversation.
        assert real.core.stats()["sessions"] == sessions + 1
    assert answer["usage"]["input_tokens_details"]["cached_tokens"] > 40
    assert len(texts(client, conversation)) == 6
    client.delete(f"{ALL}/{conversation}").raise_for_status()
    assert real.core.stats()["sessions"] == sessions


def test_a_tip_that_is_gone_is_computed_anew(real: Running, client: httpx.Client) -> None:
    conversation = begun(client)
    answers = [
        respond(client, said, conversation=conversation, instructions="Be brief.", store=store)
        for said, store in (("One", False), ("Two", True))
    ]
    client.delete(f"{ROUTE}/{answers[1]['id']}").raise_for_status()
    anew = respond(client, "Three", conversation=conversation)
    first, second = ({"role": "assistant", "content": text_of(answer)} for answer in answers)
    said = [user("One"), first, user("Two"), second, user("Three")]
    plain = respond(client, said, instructions="Be brief.")
    assert text_of(anew) == text_of(plain)
    assert anew["usage"]["input_tokens"] == plain["usage"]["input_tokens"]
    assert len(texts(client, conversation)) == 6


def test_a_deleted_item_is_read_no_more(client: httpx.Client) -> None:
    conversation = begun(client, items=[user("One"), user("Secret")])
    respond(client, "Two", conversation=conversation, max_output_tokens=1)
    items = client.get(f"{ALL}/{conversation}/items", params={"order": "asc"}).json()["data"]
    route = f"{ALL}/{conversation}/items/{items[1]['id']}"
    assert client.get(route).json()["content"][0]["text"] == "Secret"
    assert client.delete(route).json()["id"] == conversation
    error_of(client.get(route), 404, "item_not_found", "item_id")
    error_of(client.delete(route), 404, "item_not_found", "item_id")
    answer = respond(client, "Three", conversation=conversation)
    said = [user("One"), user("Two"), {"role": "assistant", "content": items[3]["content"][0]["text"]}, user("Three")]
    assert answer["usage"]["input_tokens"] == respond(client, said)["usage"]["input_tokens"]
    assert "Secret" not in texts(client, conversation)


def test_tool_calls_are_items(client: httpx.Client) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    conversation = begun(client)
    call = respond(
        client, "Call", conversation=conversation, tools=[tool], tool_choice="required", max_output_tokens=200
    )["output"][0]
    assert call["type"] == "function_call"
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
    answer = respond(client, [output], conversation=conversation, tools=[tool], tool_choice="none")
    assert answer["usage"]["input_tokens_details"]["cached_tokens"] > 0
    page = client.get(f"{ALL}/{conversation}/items", params={"order": "asc"}).json()
    assert [item["type"] for item in page["data"]] == ["message", "function_call", "function_call_output", "message"]


@pytest.mark.parametrize("how", ["stream", "background", "both"])
def test_every_way_of_a_response(client: httpx.Client, how: str) -> None:
    conversation = begun(client)
    fields = {"stream": how != "background", "background": how != "stream", "conversation": conversation}
    reply = client.post(ROUTE, json=ask("One", **fields))
    assert reply.status_code == 200
    answer = events_of(reply.content)[-1]["response"] if fields["stream"] else reply.json()
    wait_until(lambda: client.get(f"{ROUTE}/{answer['id']}").json()["status"] != "in_progress", "it ends")
    answer = client.get(f"{ROUTE}/{answer['id']}").json()
    assert texts(client, conversation) == ["One", text_of(answer)]


def test_what_fails_leaves_the_conversation_as_it_was(real: Running, client: httpx.Client) -> None:
    conversation = begun(client, items=[user("One")])
    error_of(client.post(ROUTE, json=ask("x" * 5000, conversation=conversation)), 400, "context_length_exceeded")
    for background in (False, True):
        with client.stream(
            "POST", ROUTE, json=ask("Two", conversation=conversation, stream=True, background=background)
        ) as response:
            next(response.iter_bytes())
        if not background:
            wait_until(lambda: real.core.stats()["open_requests"] == 0, "nothing runs any more")
            assert texts(client, conversation) == ["One"]
    wait_until(lambda: len(texts(client, conversation)) == 3, "what runs in the background ends")


def test_one_response_at_a_time(client: httpx.Client) -> None:
    conversation = begun(client, items=[user("One")])
    (item,) = client.get(f"{ALL}/{conversation}/items").json()["data"]
    running = respond(client, "Two", conversation=conversation, background=True, max_output_tokens=3500)
    second = client.post(ROUTE, json=ask("Three", conversation=conversation))
    assert second.headers["retry-after"] == "1"
    refused = [
        second,
        client.post(f"{ALL}/{conversation}/items", json={"items": [user("x")]}),
        client.delete(f"{ALL}/{conversation}/items/{item['id']}"),
        client.delete(f"{ALL}/{conversation}"),
    ]
    for each in refused:
        error_of(each, 409, "conversation_busy", "conversation")
    assert client.get(f"{ALL}/{conversation}").status_code == 200
    cancelled = client.post(f"{ROUTE}/{running['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    # What was generated until then was said.
    assert texts(client, conversation) == ["One", "Two", text_of(cancelled)]
    respond(client, "Three", conversation=conversation)


def test_keys_do_not_share_conversations() -> None:
    with serve_core(formula_engine(), keys=Keyring.of("a", "b")) as running:
        a, b = (httpx.Client(base_url=running.url, headers={"x-api-key": key}, timeout=60) for key in "ab")
        with a, b:
            conversation = begun(a, items=[user("One")])
            (item,) = a.get(f"{ALL}/{conversation}/items").json()["data"]
            for method, path in (
                ("GET", ""),
                ("POST", ""),
                ("DELETE", ""),
                ("GET", "/items"),
                ("POST", "/items"),
                ("GET", f"/items/{item['id']}"),
                ("DELETE", f"/items/{item['id']}"),
            ):
                body = {"items": [user("x")]} if path == "/items" else {"metadata": {}}
                kwargs = {"json": body} if method == "POST" else {}
                reply = b.request(method, f"{ALL}/{conversation}{path}", **kwargs)
                error_of(reply, 404, "conversation_not_found", "conversation")
            error_of(b.post(ROUTE, json=ask(conversation=conversation)), 404, "conversation_not_found")
            assert texts(a, conversation) == ["One"]


def test_pages(client: httpx.Client) -> None:
    conversation = begun(client, items=[user(str(number)) for number in range(20)])
    client.post(f"{ALL}/{conversation}/items", json={"items": [user("20")]}).raise_for_status()
    route = f"{ALL}/{conversation}/items"
    page = client.get(route).json()
    assert page["has_more"]
    assert [item["content"][0]["text"] for item in page["data"]] == [str(number) for number in range(20, 0, -1)]
    rest = client.get(route, params={"after": page["last_id"]}).json()
    assert not rest["has_more"]
    assert [item["content"][0]["text"] for item in rest["data"]] == ["0"]
    error_of(client.get(route, params={"after": "nobody"}), 400, param="after")
    error_of(client.get(route, params={"limit": 101}), 400, param="limit")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"items": [user("x")] * 21}, "items"),
        ("", {"items": [{"role": "user"}]}, "items[0].content"),
        ("", {"items": [{"role": "user", "content": [{"type": "input_image"}]}]}, "items[0].content[0].type"),
        ("", {"metadata": {str(at): "x" for at in range(17)}}, "metadata"),
        ("", {"what": 1}, "what"),
        ("/items", {"items": []}, "items"),
        ("/items", {}, "items"),
        ("", {"items": [{"type": "compaction", "encrypted_content": "lmserve1.x"}]}, "items[0].encrypted_content"),
    ],
)
def test_invalid_parameters_are_named(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    conversation = begun(client)
    error_of(client.post(f"{ALL}/{conversation}{path}" if path else ALL, json=body), 400, param=param)


def test_limits(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = begun(client, items=[user("x")] * 3)
    monkeypatch.setattr("lmserve.api.state.conversations.MAX_ITEMS", 3)
    reply = client.post(f"{ALL}/{conversation}/items", json={"items": [user("x")]})
    error = error_of(reply, 400, "conversation_full", "items")
    assert "at most 3 items" in error["message"]
    error_of(client.post(ROUTE, json=ask(conversation=conversation)), 400, "conversation_full")
    monkeypatch.setattr("lmserve.api.state.conversations.MAX_BYTES", 10)
    error_of(client.post(ALL, json={"items": [user("x")]}), 400, "conversation_full", "items")


def test_a_key_has_so_many_conversations() -> None:
    async def run() -> None:
        database = Database(None, {0: b"\0", 1: b"\1"})
        conversations = Conversations(database, max_conversations=2)
        made = [await conversations.create(0, {}, []) for _ in range(2)]
        with pytest.raises(LmserveError, match="at most 2 conversations") as caught:
            await conversations.create(0, {}, [])
        assert caught.value.code == "too_many_conversations"
        await conversations.create(1, {}, [])
        await conversations.delete(0, made[0].id)
        await conversations.create(0, {}, [])
        await database.close()

    asyncio.run(run())


def test_a_restart_loses_nothing(tmp_path: Path) -> None:
    def database() -> Database:
        return Database(tmp_path, {0: bytes(32)}, "always")

    with (
        serve_core(formula_engine(), database=database()) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        conversation = begun(client, items=[user("One")], metadata={"a": "b"})
        first = respond(client, "Two", conversation=conversation, instructions="Be brief.")
        second = respond(client, "Three", conversation=conversation)
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600
    # Its sessions were in memory alone, so that the tip is gone.
    with (
        serve_core(formula_engine(), database=database()) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        assert client.get(f"{ALL}/{conversation}").json()["metadata"] == {"a": "b"}
        said = ["One", "Two", text_of(first), "Three", text_of(second)]
        assert texts(client, conversation) == said
        third = respond(client, "Four", conversation=conversation)
        assert third["usage"]["input_tokens"] > second["usage"]["total_tokens"]
        assert texts(client, conversation) == [*said, "Four", text_of(third)]


def test_files_that_are_no_database(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"no database" * 1000)
    with pytest.raises(LmserveError, match="cannot be used") as caught:
        Database(tmp_path, {0: b"\0"}).open()
    assert caught.value.code == "session_dir_unusable"
    (tmp_path / "state.db").unlink()

    async def age(version: int) -> None:
        database = Database(tmp_path, {0: b"\0"})
        await database.run(lambda db: db.execute(f"PRAGMA user_version = {version}"))
        await database.close()

    asyncio.run(age(99))
    with pytest.raises(LmserveError, match="version 99") as caught:
        Database(tmp_path, {0: b"\0"}).open()
    assert caught.value.code == "session_dir_unusable"


def test_a_full_disk_is_a_507_and_told(tmp_path: Path) -> None:
    database = Database(tmp_path, {0: bytes(32)})

    async def limit(pages: int) -> None:
        await database.run(lambda db: db.execute(f"PRAGMA max_page_count = {pages}"))

    with (
        serve_core(formula_engine(), database=database) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        conversation = begun(client)
        asyncio.run_coroutine_threadsafe(limit(1), running.loop).result(10)
        full = begun(client)
        body = {"items": [user("x" * 1000)]}
        while (reply := client.post(f"{ALL}/{full}/items", json=body)).status_code == 200:
            pass
        error_of(reply, 507, "storage_full")
        assert client.get("/health").json()["status"] == "degraded"
        answer = ask("y" * 2000, conversation=conversation, max_output_tokens=1)
        error_of(client.post(ROUTE, json=answer), 507, "storage_full")
        last = events_of(client.post(ROUTE, json=answer | {"stream": True}).content)[-1]
        assert (last["type"], last["code"]) == ("error", "storage_full")
        assert texts(client, conversation) == []
        asyncio.run_coroutine_threadsafe(limit(100_000), running.loop).result(10)
        respond(client, "x", conversation=conversation)
        assert client.get("/health").json()["status"] == "ok"


def test_many_add_to_one_conversation_at_once(client: httpx.Client) -> None:
    conversation = begun(client)
    told: list[list[str]] = [[] for _ in range(6)]

    def add(number: int) -> None:
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            for at in range(10):
                text = f"{number}: {at}"
                while True:
                    if number < 2:
                        reply = own.post(ROUTE, json=ask(text, conversation=conversation, max_output_tokens=2))
                    else:
                        reply = own.post(f"{ALL}/{conversation}/items", json={"items": [user(text)]})
                    if reply.status_code == 200:
                        break
                    error_of(reply, 409, "conversation_busy")
                told[number].append(text)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(6)))
    said = texts(client, conversation)
    # Each is there once, in its client's order, and each answer behind its question.
    for mine in told:
        assert [text for text in said if text in mine] == mine
    assert len(said) == 6 * 10 + 2 * 10
