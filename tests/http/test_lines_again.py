"""Lines of a batch that are run again: what they left in a session is their answer, and they leave nothing twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Running, serve_core
from lmserve import _core
from lmserve.api.responses.log import ResponseLog
from lmserve.api.responses.store import ResponseStore
from lmserve.api.state.database import NAME, Database
from lmserve.engine.sessions import SessionLog
from lmserve.engine.text import TextLayer
from test_batches import begun, chat, ended, line, lines_of
from tiny_engine import PLAIN, byte_tokenizer, chat_template, formula_engine

from wire import wait_until

TENANTS = {0: bytes(32)}
RESPONSES = "/v1/responses"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}


@contextmanager
def served(folder: Path) -> Iterator[tuple[Running, httpx.Client]]:
    settings = SessionLog(folder=str(folder), fingerprint=bytes(32), model="formula", tenants=TENANTS, fsync="never")
    core = formula_engine(said=PLAIN, session_log=_core.OpenSessionLog(settings))
    responses = ResponseStore(ResponseLog(folder, TENANTS), "never")
    responses.restore()
    database = Database(folder, TENANTS)
    text = TextLayer(byte_tokenizer(), chat_template())
    with (
        serve_core(core, text, responses=responses, database=database) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield running, client
    # The folder's lock is the core's.
    running.engine.stop()


def forget_answers(folder: Path, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """What a server leaves that dies after the turns of all lines, and before their answers are written down."""
    with sqlite3.connect(folder / NAME) as db:
        db.execute("UPDATE batches SET status = 'in_progress', ended = NULL, output_file = NULL")
        db.execute("DELETE FROM files WHERE batch = ?", (batch["id"],))
        for number, each in enumerate(lines, 1):
            body = json.dumps(each["body"]).encode()
            db.execute("UPDATE lines SET failed = NULL, reply = NULL, body = ? WHERE number = ?", (body, number))
    db.close()


def answers(client: httpx.Client, batch: dict[str, Any]) -> dict[str, Any]:
    done = ended(client, batch)
    assert done["request_counts"]["failed"] == 0
    lines = lines_of(client, done["output_file_id"])
    return {name: each["response"]["body"] for name, each in lines.items()}


def without_times(body: dict[str, Any]) -> dict[str, Any]:
    """A chat completion without what another run has of its own, and with no word of what was cached."""
    left = {name: value for name, value in body.items() if name not in ("id", "created", "usage")}
    return left | {"tokens": body["usage"]["total_tokens"]}


def transcript(client: httpx.Client, name: str) -> list[dict[str, Any]]:
    turns = client.get(f"/v1/sessions/{name}/transcript").json()["turns"]
    return [{key: turn[key] for key in ("input", "output")} for turn in turns]


def test_a_turn_of_a_session_is_its_lines_answer(tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = [
        # Without a seed, so that nothing but the session knows what was drawn.
        {"temperature": 1.5, "seed": None},
        {"temperature": 1.5, "seed": 7, "logprobs": True, "top_logprobs": 3},
        {"stop": ["t"], "max_tokens": 60, "ignore_eos": False},
        {"ignore_eos": False, "max_tokens": 200, "temperature": 0},
        {"response_format": SCHEMA, "max_tokens": 60, "ignore_eos": False},
        {"renew_session": True, "session_id": "anew", "temperature": 1.0, "seed": None},
    ]
    bodies = [chat(f"Line {at}", **({"session_id": "s"} | each)) for at, each in enumerate(fields)]
    lines = [line(str(at), body) for at, body in enumerate(bodies)]
    with served(tmp_path) as (_, client):
        batch = begun(client, *lines)
        first = answers(client, batch)
        # Others have gone on since.
        client.post("/v1/sessions/s/turns", json={"prompt": "And?", "max_tokens": 5, "seed": 9}).raise_for_status()
        turns = [transcript(client, name) for name in ("s", "anew")]
        assert [len(each) for each in turns] == [6, 1]
    forget_answers(tmp_path, batch, lines)
    with served(tmp_path) as (running, client):
        again = answers(client, batch)
        assert {name: without_times(body) for name, body in again.items()} == {
            name: without_times(body) for name, body in first.items()
        }
        assert [transcript(client, name) for name in ("s", "anew")] == turns
        assert running.core.stats()["sessions"] == 2


def test_a_line_that_has_no_turn_is_run(tmp_path: Path) -> None:
    lines = [line(str(at), chat(f"Line {at}", session_id="s", seed=at)) for at in range(3)]
    with served(tmp_path) as (_, client):
        batch = begun(client, *lines)
        first = answers(client, batch)
        client.delete("/v1/sessions/s").raise_for_status()
    forget_answers(tmp_path, batch, lines)
    with served(tmp_path) as (_, client):
        again = answers(client, batch)
        assert len(again) == len(first)
        turns = transcript(client, "s")
        assert len(turns) == 3
        for at in range(3):
            (turn,) = [turn for turn in turns if f"Line {at}<" in turn["input"]]
            said = turn["output"].replace("<|im_end|>", "")
            assert said == again[str(at)]["choices"][0]["message"]["content"]


@pytest.mark.parametrize("logged", [True, False])
def test_a_stored_response_is_its_lines_answer(tmp_path: Path, logged: bool) -> None:
    common = {"max_output_tokens": 8, "temperature": 1.5, "ignore_eos": True}
    with served(tmp_path) as (_, client):
        before = client.post(RESPONSES, json={"input": "Hello", **common}).json()
        bodies = [{"input": "One", **common}, {"input": "Two", "previous_response_id": before["id"], **common}]
        lines = [line(str(at), body, RESPONSES) for at, body in enumerate(bodies)]
        batch = begun(client, *lines, endpoint=RESPONSES)
        first = answers(client, batch)
        for body in first.values():
            assert client.get(f"{RESPONSES}/{body['id']}").json() == body
    forget_answers(tmp_path, batch, lines)
    if not logged:
        # The server died before its response was written down, and the session has the turn.
        for file in tmp_path.glob("responses*"):
            file.unlink()
    with served(tmp_path) as (running, client):
        again = answers(client, batch)
        said = [[each["id"], each["output"][0]["content"]] for each in (*first.values(), *again.values())]
        assert said[:2] == said[2:]
        assert logged == (first == again)
        assert running.core.stats()["sessions"] == 3
        for body in again.values():
            assert client.get(f"{RESPONSES}/{body['id']}").json() == body


def test_a_conversation_has_a_lines_items_once(tmp_path: Path) -> None:
    with served(tmp_path) as (_, client):
        name = client.post("/v1/conversations", json={}).json()["id"]
        bodies = [{"input": f"Line {at}", "conversation": name, "max_output_tokens": 8} for at in range(3)]
        lines = [line(str(at), body, RESPONSES) for at, body in enumerate(bodies)]
        batch = begun(client, *lines, endpoint=RESPONSES)
        first = answers(client, batch)
        items = client.get(f"/v1/conversations/{name}/items").json()["data"]
        assert len(items) == 6
    forget_answers(tmp_path, batch, lines)
    with sqlite3.connect(tmp_path / NAME) as db:
        # As the transaction leaves it that adds the items. The third line's was not there yet.
        for at in range(2):
            body = json.dumps(first[str(at)]).encode()
            db.execute("UPDATE lines SET reply = ? WHERE number = ?", (body, at + 1))
    db.close()
    with served(tmp_path) as (_, client):
        again = answers(client, batch)
        assert [again[str(at)] for at in range(2)] == [first[str(at)] for at in range(2)]
        after = client.get(f"/v1/conversations/{name}/items").json()["data"]
        assert [item for item in after if item in items] == items
        assert len(after) == 8


def test_a_conversation_keeps_the_reply_with_its_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that dies between the two has it in its file."""

    async def never(*_: Any, **__: Any) -> None:
        raise RuntimeError("the server has died")

    monkeypatch.setattr("lmserve.api.state.batches.Batches.answer", never)
    with served(tmp_path) as (_, client):
        name = client.post("/v1/conversations", json={}).json()["id"]
        body = {"input": "Line", "conversation": name, "max_output_tokens": 8}
        batch = begun(client, line("a", body, RESPONSES), endpoint=RESPONSES)

        def items_now() -> list[dict[str, Any]]:
            return client.get(f"/v1/conversations/{name}/items").json()["data"]

        wait_until(lambda: bool(items_now()), "the items are there")
        items = items_now()
        assert len(items) == 2
    monkeypatch.undo()
    with served(tmp_path) as (_, client):
        (again,) = answers(client, batch).values()
        assert client.get(f"/v1/conversations/{name}/items").json()["data"] == items
        assert again["output"][0]["content"][0]["text"] == items[0]["content"][0]["text"]
