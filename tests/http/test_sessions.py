"""/v1/sessions over the real core: what each verb does, what it refuses, and whose sessions it sees."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from conftest import Running, serve_core
from lmserve.keys import Keyring
from tiny_engine import BLOCK, formula_engine

from wire import error_of, frames_of, wait_until

ids = itertools.count(7000)
KEYS = {"sk-first": 1, "sk-second": 2}
LONG = {"prompt": "x", "request_output_len": 3500, "ignore_eos": True, "stream": True}


@pytest.fixture
def web(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@pytest.fixture
def session() -> int:
    return next(ids)


def turn(web: httpx.Client, session: int | str, prompt: Any = "Hello there", **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "instance_id": session, "sequence_start": False, "request_output_len": 8, "seed": 3}
    response = web.post("/generate", json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def talk(web: httpx.Client, session: int | str, *prompts: str) -> list[dict[str, Any]]:
    """A session of that many turns."""
    return [turn(web, session, prompt, sequence_start=at == 0) for at, prompt in enumerate(prompts)]


def path_of(session: int | str) -> str:
    return f"/v1/sessions/{quote(str(session), safe='')}"


def token_ids(web: httpx.Client, session: int | str) -> list[list[int]]:
    turns = web.get(f"{path_of(session)}/transcript", params={"token_ids": "true"}).json()["turns"]
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
    "query", [{"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"after": "x" * 129}, {"after": ""}, {"after": "a\nb"}]
)
def test_a_page_out_of_bounds_is_refused(web: httpx.Client, query: dict[str, Any]) -> None:
    error = error_of(web.get("/v1/sessions", params=query), 400)
    ((name, value),) = query.items()
    assert error["param"] == name
    assert {"x" * 129: "129", "": "but 0", "a\nb": "U+000A"}.get(value, str(value)) in error["message"]


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
    refused = (-1, "-1", -2, 2**63, "", "x" * 129, "a\0", "a\x85", 1.5, None, [])
    for body in ({}, {"session_id": next(ids), "x": 1}, *({"session_id": given} for given in refused)):
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


NAMES = [
    "ada",
    "b7a1c2d4-0000-4000-8000-0123456789ab",
    "007",
    "-5",
    "9223372036854775808",
    "é你😀" * 42,
    "a b",
    "a/b",
    "%2F",
    "a?b#c",
    "x" * 128,
    "import",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_session_has_a_name(web: httpx.Client, name: str) -> None:
    path, fork = path_of(name), f"{name[:120]} fork"
    talk(web, name, "one", "two")
    card = web.get(path).json()
    assert (card["id"], card["turns"]) == (name, 2)
    assert web.get(f"{path}/transcript").json()["id"] == name
    forked = web.post(f"{path}/fork", json={"session_id": fork, "turns": 1}).json()
    assert (forked["id"], forked["turns"]) == (fork, 1)
    assert web.post(f"{path}/rewind", json={"turns": 1}).json()["turns"] == 1
    assert web.post(f"{path}/append", json={"prompt": "more"}).json()["id"] == name
    assert web.post(f"{path}/cancel").json() == {"id": name, "object": "session.cancel", "cancelled": False}
    assert token_ids(web, name)[:1] == token_ids(web, fork)
    listed = web.get("/v1/sessions", params={"limit": 1000}).json()["data"]
    assert {name, fork} <= {card["id"] for card in listed}
    behind = web.get("/v1/sessions", params={"after": min(name, fork), "limit": 1000}).json()["data"]
    assert max(name, fork) in {card["id"] for card in behind}
    for session in (name, fork):
        assert web.delete(path_of(session)).json()["id"] == session
        error_of(web.get(path_of(session)), 404, "session_not_found")


def test_a_number_and_its_digits_are_one_session(web: httpx.Client, session: int) -> None:
    turn(web, session, "one", sequence_start=True)
    turn(web, str(session), "two")
    chat = {"messages": "three", "session_id": str(session), "max_tokens": 4, "seed": 3}
    assert web.post("/v1/chat/completions", json=chat).status_code == 200
    card = web.get(f"/v1/sessions/{session}").json()
    assert (card["id"], card["turns"]) == (session, 3)


def test_a_header_names_the_session_where_the_body_names_none(web: httpx.Client) -> None:
    header = {"x-lmserve-session": "von Ada é".encode()}
    chat = {"messages": "one", "max_tokens": 4, "seed": 3}
    for at, absent in enumerate(({}, {"session_id": None}, {"session_id": -1}, {"session_id": "-1"}), 1):
        reply = web.post("/v1/chat/completions", json=chat | absent, headers=header)
        assert reply.status_code == 200, reply.text
        assert web.get(path_of("von Ada é")).json()["turns"] == at
    body = {"prompt": "two", "request_output_len": 4, "seed": 3}
    assert web.post("/generate", json=body | {"sequence_start": False}, headers=header).status_code == 200
    interactive = body | {"interactive_mode": True}
    assert web.post("/v1/chat/interactive", json=interactive, headers=header).status_code == 200
    assert web.get(path_of("von Ada é")).json()["turns"] == 6
    for route, field, given in (
        ("/v1/chat/completions", "session_id", chat),
        ("/generate", "instance_id", body),
        ("/v1/chat/interactive", "session_id", interactive),
    ):
        error = error_of(web.post(route, json=given | {field: 8}, headers=header), 400, param=field)
        assert "von Ada" in error["message"]
        for bad in (b"", b"x" * 129, b"\xff"):
            error_of(web.post(route, json=given, headers={"x-lmserve-session": bad}), 400, param="x-lmserve-session")
    assert web.delete(path_of("von Ada é")).json()["deleted"] is True


@pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions", "/v1/chat/interactive"])
@pytest.mark.parametrize(
    ("given", "words"), [("", ""), ("x" * 129, "128"), ("a\nb", "U+000A"), (2**63, ""), (-2, "-1")]
)
def test_what_is_no_id_is_refused(web: httpx.Client, route: str, given: int | str, words: str) -> None:
    field = "instance_id" if route == "/generate" else "session_id"
    words_of_route = "messages" if route == "/v1/chat/completions" else "prompt"
    error = error_of(web.post(route, json={words_of_route: "x", field: given}), 400, param=field)
    assert words in error["message"]


@pytest.mark.parametrize("given", ["-1", "x" * 129, "%00", "a%0Ab", "a%2Fb%00"])
def test_an_id_that_is_none(web: httpx.Client, given: str) -> None:
    for method, verb in (("GET", ""), ("GET", "/transcript"), ("POST", "/cancel"), ("DELETE", "")):
        error_of(web.request(method, f"/v1/sessions/{given}{verb}"), 400, param="session_id")


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
