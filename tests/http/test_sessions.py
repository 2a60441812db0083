"""/v1/sessions over the real core: what each verb does, what it refuses, and whose sessions it sees."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import Running, serve_core
from lmserve.keys import Keyring
from tiny_engine import BLOCK, formula_engine

from wire import error_of, frames_of, wait_until

ids = itertools.count(5000)
KEYS = {"sk-first": 1, "sk-second": 2}
LONG = {"prompt": "x", "request_output_len": 3500, "ignore_eos": True, "stream": True}


@pytest.fixture
def web(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@pytest.fixture
def session() -> int:
    return next(ids)


def turn(web: httpx.Client, session: int, prompt: Any = "Hello there", **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "instance_id": session, "sequence_start": False, "request_output_len": 8, "seed": 3}
    response = web.post("/generate", json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def talk(web: httpx.Client, session: int, *prompts: str) -> list[dict[str, Any]]:
    """A session of that many turns."""
    return [turn(web, session, prompt, sequence_start=at == 0) for at, prompt in enumerate(prompts)]


def token_ids(web: httpx.Client, session: int) -> list[list[int]]:
    turns = web.get(f"/v1/sessions/{session}/transcript", params={"token_ids": "true"}).json()["turns"]
    return [turn["input_ids"] + turn["output_ids"] for turn in turns]


def test_what_is_said_of_a_session(web: httpx.Client, session: int) -> None:
    replies = talk(web, session, "one", "two")
    card = web.get(f"/v1/sessions/{session}").json()
    tokens = replies[-1]["usage"]["prompt_tokens"] + replies[-1]["tokens"]
    expected = {"id": session, "object": "session", "turns": 2, "tokens": tokens, "busy": False}
    assert card | expected == card
    # The last token was sampled and never computed; the rest is cached in whole blocks.
    assert card["cached_tokens"] == tokens - 1
    assert 0 <= card["idle"] <= card["age"] < 60


def test_a_transcript_is_what_the_model_saw_and_gave(web: httpx.Client, session: int) -> None:
    replies = talk(web, session, "one", "two")
    transcript = web.get(f"/v1/sessions/{session}/transcript").json()
    assert transcript["id"] == session
    inputs = [turn["input"] for turn in transcript["turns"]]
    assert inputs[0] == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert inputs[1] == "<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert [turn["output"] for turn in transcript["turns"]] == [reply["text"] for reply in replies]
    assert all("input_ids" not in turn for turn in transcript["turns"])
    assert sum(map(len, token_ids(web, session))) == web.get(f"/v1/sessions/{session}").json()["tokens"]


def test_the_list_is_paged(web: httpx.Client) -> None:
    wanted = [next(ids) for _ in range(5)]
    for session in reversed(wanted):
        talk(web, session, "one")
    found: list[int] = []
    after = wanted[0] - 1
    while True:
        page = web.get("/v1/sessions", params={"limit": 2, "after": after}).json()
        found += [card["id"] for card in page["data"]]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 2
        after = page["last_id"]
    assert [session for session in found if session <= wanted[-1]] == wanted
    empty = web.get("/v1/sessions", params={"after": 2**63 - 1}).json()
    assert empty == {"object": "list", "data": [], "has_more": False, "last_id": None}


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"after": -2}, {"after": 2**63}, {"after": "1e400"}]
)
def test_a_page_out_of_bounds_is_refused(web: httpx.Client, query: dict[str, Any]) -> None:
    error = error_of(web.get("/v1/sessions", params=query), 400)
    ((name, value),) = query.items()
    assert error["param"] == name
    assert str(value) in error["message"]


def test_a_fork_goes_on_by_itself_and_takes_no_block(real: Running, web: httpx.Client, session: int) -> None:
    turn(web, session, "x" * 4000, sequence_start=True, request_output_len=0)
    wait_until(lambda: real.core.stats()["owned_blocks"] == 0, "the engine is idle")
    before = real.core.stats()
    fork = next(ids)
    card = web.post(f"/v1/sessions/{session}/fork", json={"session_id": fork}).json()
    assert card["id"] == fork
    assert card["tokens"] > 4000
    assert card["cached_tokens"] == card["tokens"]
    after = real.core.stats()
    for count in ("free_blocks", "cached_blocks", "owned_blocks", "evictions"):
        assert after[count] == before[count], count
    reply = turn(web, fork, "y", request_output_len=4)
    assert reply["usage"]["cached_tokens"] == card["cached_tokens"]
    wait_until(lambda: real.core.stats()["owned_blocks"] == 0, "the engine is idle")
    written = reply["usage"]["prompt_tokens"] + 4 - 1 - card["cached_tokens"]
    assert real.core.stats()["cached_blocks"] - before["cached_blocks"] == written // BLOCK
    assert token_ids(web, session) == token_ids(web, fork)[:1]


def test_a_fork_of_an_earlier_turn(web: httpx.Client, session: int) -> None:
    talk(web, session, "one", "two", "three")
    fork = next(ids)
    card = web.post(f"/v1/sessions/{session}/fork", json={"session_id": fork, "turns": 1}).json()
    assert card["turns"] == 1
    assert token_ids(web, fork) == token_ids(web, session)[:1]
    # What follows the same words from there is the same.
    turn(web, fork, "two")
    assert token_ids(web, fork) == token_ids(web, session)[:2]


def test_forks_that_cannot_be(web: httpx.Client, session: int) -> None:
    path = f"/v1/sessions/{session}/fork"
    error_of(web.post(path, json={"session_id": 1}), 404, "session_not_found")
    talk(web, session, "one")
    other = next(ids)
    talk(web, other, "one")
    error_of(web.post(path, json={"session_id": other}), 409, "session_exists")
    error_of(web.post(path, json={"session_id": session}), 409, "session_exists")
    for body in ({}, {"session_id": -1}, {"session_id": -2}, {"session_id": 2**63}, {"session_id": next(ids), "x": 1}):
        error_of(web.post(path, json=body), 400)
    for turns in (0, 2, 2**31 - 1):
        error = error_of(web.post(path, json={"session_id": next(ids), "turns": turns}), 400, param="turns")
        assert str(turns) in error["message"]


def test_a_rewound_session_goes_on_as_if_the_rest_had_not_been(web: httpx.Client, session: int) -> None:
    talk(web, session, "one", "two", "three")
    turns = token_ids(web, session)
    card = web.post(f"/v1/sessions/{session}/rewind", json={"turns": 1}).json()
    assert (card["turns"], card["tokens"]) == (1, len(turns[0]))
    turn(web, session, "two")
    assert token_ids(web, session) == turns[:2]
    error = error_of(web.post(f"/v1/sessions/{session}/rewind", json={"turns": 3}), 400, param="turns")
    assert "[1, 2]" in error["message"]
    error_of(web.post(f"/v1/sessions/{next(ids)}/rewind", json={"turns": 1}), 404, "session_not_found")


def test_append_reads_and_says_nothing(web: httpx.Client, session: int) -> None:
    path = f"/v1/sessions/{session}/append"
    error_of(web.post(path, json={"prompt": "My name is Ada."}), 404, "session_not_found")
    first = web.post(path, json={"prompt": "My name is Ada.", "create": True}).json()
    assert first["id"] == session
    assert first["usage"] | {"history_tokens": 0, "completion_tokens": 0} == first["usage"]
    messages = [{"role": "assistant", "content": "Hello Ada."}, {"role": "user", "content": "Who am I?"}]
    second = web.post(path, json={"prompt": messages}).json()["usage"]
    assert second["history_tokens"] == first["usage"]["prompt_tokens"]
    inputs = [turn["input"] for turn in web.get(f"/v1/sessions/{session}/transcript").json()["turns"]]
    assert inputs == [
        "<|im_start|>user\nMy name is Ada.<|im_end|>\n",
        "<|im_start|>assistant\nHello Ada.<|im_end|>\n<|im_start|>user\nWho am I?<|im_end|>\n",
    ]
    answer = turn(web, session, "")
    assert answer["usage"]["cached_tokens"] >= second["prompt_tokens"] // BLOCK * BLOCK
    for body in ({}, {"prompt": []}, {"prompt": "x", "request_output_len": 1}):
        error_of(web.post(path, json=body), 400)
    error = error_of(web.post(path, json={"prompt": "x" * 5000}), 400, "context_length_exceeded")
    assert error["history_tokens"] > 0


def test_what_a_busy_session_takes(real: Running, web: httpx.Client, session: int) -> None:
    talk(web, session, "one")
    turns = token_ids(web, session)
    with web.stream("POST", "/generate", json=LONG | {"instance_id": session, "sequence_start": False}) as held:
        chunks = held.iter_raw()
        first = next(chunks)
        with httpx.Client(base_url=real.url) as other:
            card = other.get(f"/v1/sessions/{session}").json()
            assert (card["busy"], card["turns"]) == (True, 1)
            for method, verb, body in (
                ("POST", "/rewind", {"turns": 1}),
                ("POST", "/append", {"prompt": "x"}),
                ("DELETE", "", None),
            ):
                response = other.request(method, f"/v1/sessions/{session}{verb}", json=body)
                error_of(response, 409, "session_busy")
                assert int(response.headers["retry-after"]) >= 1
            fork = next(ids)
            assert other.post(f"/v1/sessions/{session}/fork", json={"session_id": fork}).json()["turns"] == 1
            assert token_ids(other, fork) == turns
            cancelled = other.post(f"/v1/sessions/{session}/cancel").json()
            assert cancelled == {"id": session, "object": "session.cancel", "cancelled": True}
        last = frames_of(first + b"".join(chunks))[-1]
    assert last["finish_reason"] == "abort"
    kept = token_ids(web, session)
    assert kept[:1] == turns
    assert len(kept[1]) >= last["tokens"] > 0
    assert web.post(f"/v1/sessions/{session}/cancel").json()["cancelled"] is False
    error_of(web.post(f"/v1/sessions/{next(ids)}/cancel"), 404, "session_not_found")


def test_a_first_turn_that_runs_cannot_be_forked(real: Running, web: httpx.Client, session: int) -> None:
    with web.stream("POST", "/generate", json=LONG | {"instance_id": session}) as held:
        chunks = held.iter_raw()
        next(chunks)
        fork = httpx.post(f"{real.url}/v1/sessions/{session}/fork", json={"session_id": next(ids)})
        error_of(fork, 409, "session_busy")


def test_a_deleted_session_is_gone(web: httpx.Client, session: int) -> None:
    talk(web, session, "one")
    assert web.delete(f"/v1/sessions/{session}").json() == {
        "id": session,
        "object": "session.deleted",
        "deleted": True,
    }
    for method, verb in (("GET", ""), ("GET", "/transcript"), ("DELETE", "")):
        error_of(web.request(method, f"/v1/sessions/{session}{verb}"), 404, "session_not_found")
    body = {"prompt": "x", "instance_id": session, "sequence_start": False}
    error_of(web.post("/generate", json=body), 404, "session_not_found")


@pytest.mark.parametrize("given", ["-1", "-2", "9223372036854775808", "1" * 400, "x", "1.5", "%00"])
def test_an_id_that_is_none(web: httpx.Client, given: str) -> None:
    for method, verb in (("GET", ""), ("GET", "/transcript"), ("POST", "/cancel"), ("DELETE", "")):
        response = web.request(method, f"/v1/sessions/{given}{verb}")
        assert response.status_code in (400, 404), response.text
        error_of(response, response.status_code)


def test_sessions_of_another_key_are_not_there() -> None:
    with serve_core(formula_engine(), keys=Keyring.of(*KEYS)) as running:
        first, second = (
            httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) for key in KEYS
        )
        with first, second:
            talk(first, 7, "one", "two")
            assert second.get("/v1/sessions").json()["data"] == []
            for method, verb, body in (
                ("GET", "", None),
                ("GET", "/transcript", None),
                ("POST", "/fork", {"session_id": 8}),
                ("POST", "/rewind", {"turns": 1}),
                ("POST", "/append", {"prompt": "x"}),
                ("POST", "/cancel", None),
                ("DELETE", "", None),
            ):
                response = second.request(method, f"/v1/sessions/7{verb}", json=body)
                error_of(response, 404, "session_not_found")
            # The same id, the same words: no meeting, and no cached prefix of the other's.
            replies = talk(second, 7, "one", "two")
            assert replies[0]["usage"]["cached_tokens"] == 0
            assert first.get("/v1/sessions/7").json()["turns"] == 2
            assert second.delete("/v1/sessions/7").status_code == 200
            assert [card["id"] for card in first.get("/v1/sessions").json()["data"]] == [7]


def test_cancel_and_end_in_one(real: Running, web: httpx.Client, session: int) -> None:
    both = {"prompt": "", "instance_id": session, "request_output_len": 0, "stop": True, "sequence_end": True}
    for running in (True, False):
        if running:
            with web.stream("POST", "/generate", json=LONG | {"instance_id": session}) as held:
                chunks = held.iter_raw()
                first = next(chunks)
                response = httpx.post(f"{real.url}/generate", json=both | {"sequence_start": False})
                assert frames_of(first + b"".join(chunks))[-1]["finish_reason"] == "abort"
        else:
            response = web.post("/generate", json=both)
        assert response.status_code == 200, response.text
        assert json.loads(response.content)["finish_reason"] == "stop"
        error_of(web.get(f"/v1/sessions/{session}"), 404, "session_not_found")
