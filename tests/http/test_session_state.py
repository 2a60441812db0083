"""What a session is made of: totals, retention, export and import, and the ledger of what was read and sampled."""

from __future__ import annotations

import itertools
import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import MODEL, Running, serve_core
from lmserve import _core
from lmserve.api.convert.session_state import checksum
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.sessions import SessionLog, SessionState, StateTurn
from lmserve.engine.text import TextLayer
from lmserve.keys import Keyring
from tiny_engine import EOS, byte_tokenizer, chat_template, formula_engine

from wire import error_of, events_of

ids = itertools.count(9000)
CHAT = "/v1/chat/completions"
EXPORT = {"object", "version", "id", "model", "fingerprint", "created", "seed", "system_tokens", "turns", "tokens"}


@pytest.fixture
def web(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@pytest.fixture
def session() -> int:
    return next(ids)


def turn(web: httpx.Client, session: int | str, text: str, **fields: Any) -> dict[str, Any]:
    """A turn with log-probabilities."""
    body = {"messages": text, "session_id": session, "max_tokens": 12, "logprobs": True, "seed": 5}
    reply = web.post(CHAT, json=body | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def another(**options: Any) -> Any:
    text = TextLayer(byte_tokenizer(), chat_template())
    return serve_core(formula_engine(), text, **options)


def test_totals_are_those_of_the_turns(web: httpx.Client, session: int) -> None:
    usages = [turn(web, session, text)["usage"] for text in ("one", "two", "three")]
    web.post(f"/v1/sessions/{session}/rewind", json={"turns": 2}).raise_for_status()
    totals = web.get(f"/v1/sessions/{session}").json()["usage"]
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert cached > 0
    assert totals["prompt_tokens"] == prompt
    assert totals["cached_tokens"] == cached
    assert totals["computed_tokens"] == prompt - cached
    assert totals["generated_tokens"] == sum(usage["completion_tokens"] for usage in usages)
    assert totals["seconds"] > 0
    # A fork, and a session that begins anew, have used nothing yet.
    fork = web.post(f"/v1/sessions/{session}/fork", json={"session_id": next(ids)}).json()
    assert fork["usage"]["prompt_tokens"] == fork["usage"]["generated_tokens"] == 0
    usage = turn(web, session, "anew", renew_session=True)["usage"]
    assert web.get(f"/v1/sessions/{session}").json()["usage"]["prompt_tokens"] == usage["prompt_tokens"]


def test_a_dropped_session_computes_again_and_says_the_same(web: httpx.Client, session: int) -> None:
    path = f"/v1/sessions/{session}"
    # Nobody else says this, so that nobody shares it.
    first = turn(web, session, f"{session} " + "x" * 500)
    fork = next(ids)
    web.post(f"{path}/fork", json={"session_id": fork}).raise_for_status()
    assert web.get(path).json()["cached_tokens"] > 500
    card = web.post(f"{path}/retention", json={"drop": True}).json()
    assert card["cached_tokens"] == 0
    second = turn(web, session, "more", temperature=0)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["choices"] == turn(web, fork, "more", temperature=0)["choices"]
    # As a part of a turn.
    turn(web, session, "last", retention={"drop": True})
    assert web.get(path).json()["cached_tokens"] < 500
    assert first["usage"]["prompt_tokens"] > 500


def test_what_two_sessions_share_is_not_dropped(web: httpx.Client, session: int) -> None:
    path = f"/v1/sessions/{session}"
    turn(web, session, "y" * 500)
    fork = next(ids)
    web.post(f"{path}/fork", json={"session_id": fork}).raise_for_status()
    turn(web, fork, "z" * 500)
    before = web.get(path).json()["cached_tokens"]
    card = web.post(f"/v1/sessions/{fork}/retention", json={"drop": True}).json()
    assert card["cached_tokens"] < 600
    turn(web, session, "more")
    assert before > 500


def test_a_held_session_makes_room_last() -> None:
    with another() as running, httpx.Client(base_url=running.url, timeout=60) as web:
        for session in ("held", "free", "by turn"):
            hold = {"retention": {"hold": "10m"}} if session == "by turn" else {}
            turn(web, session, session[0] * 1500, **hold)
        card = web.post("/v1/sessions/held/retention", json={"hold": "30s"}).json()
        blocks = running.core.stats()
        pool = sum(blocks[name] for name in ("free_blocks", "owned_blocks", "cached_blocks"))
        assert pool > 1000
        assert 29 < card["held"] <= 30
        assert 599 < web.get("/v1/sessions/by turn").json()["held"] <= 600
        cached = {name: web.get(f"/v1/sessions/{name}").json()["cached_tokens"] for name in ("held", "free", "by turn")}
        # Prompts that fill the pool, but for what is held.
        for at in range(pool * 16 // 3800):
            body = {"prompt": f"{at:04}" * 990, "max_tokens": 1}
            web.post("/v1/completions", json=body).raise_for_status()
        after = {name: web.get(f"/v1/sessions/{name}").json()["cached_tokens"] for name in cached}
        assert (after["held"], after["by turn"]) == (cached["held"], cached["by turn"])
        assert after["free"] < cached["free"]
        # No longer.
        assert web.post("/v1/sessions/held/retention", json={"hold": "0s"}).json()["held"] == 0
        # Where all is held, the pool serves all the same.
        for at in range(2 * pool * 16 // 4000):
            turn(web, at, f"{at:04}" * 990, retention={"hold": "24h"})


def test_a_held_session_is_not_the_first_to_be_evicted() -> None:
    core = formula_engine(max_sessions=3)
    text = TextLayer(byte_tokenizer(), chat_template())
    with serve_core(core, text) as running, httpx.Client(base_url=running.url) as web:
        turn(web, 1, "one", retention={"hold": "1h"})
        for session in (2, 3, 4):
            turn(web, session, "other")
        assert [card["id"] for card in web.get("/v1/sessions").json()["data"]] == [1, 3, 4]
        # A turn that does not say so holds it no longer.
        turn(web, 1, "two")
        for session in (5, 6, 7):
            turn(web, session, "other")
        assert [card["id"] for card in web.get("/v1/sessions").json()["data"]] == [5, 6, 7]


@pytest.mark.parametrize(
    "retention", [{}, {"hold": "10m", "drop": True}, {"hold": "10"}, {"hold": "x"}, {"hold": "25h"}, {"keep": "1m"}]
)
def test_a_retention_that_is_none(web: httpx.Client, session: int, retention: dict[str, Any]) -> None:
    turn(web, session, "one")
    error_of(web.post(f"/v1/sessions/{session}/retention", json=retention), 400)
    error_of(web.post(CHAT, json={"messages": "x", "session_id": session, "retention": retention}), 400)
    for body, route in (({"messages": "x"}, CHAT), ({"prompt": "x"}, "/generate")):
        error_of(web.post(route, json=body | {"retention": {"hold": "1m"}}), 400, param="retention")
    error_of(web.post(f"/v1/sessions/{next(ids)}/retention", json={"hold": "1m"}), 404, "session_not_found")


def test_an_exported_session_gives_the_same_next_turn_elsewhere(web: httpx.Client, session: int) -> None:
    """Six turns, one of them without an answer and one cut off; then a seventh, sampled, on both servers."""
    for at, text in enumerate(("one", "two", "three", "four", "five")):
        turn(web, session, text, logprobs=at % 2 == 0, max_tokens=200 if at == 3 else 12)
    web.post(f"/v1/sessions/{session}/append", json={"prompt": "Remember this."}).raise_for_status()
    body = web.get(f"/v1/sessions/{session}/export").content
    export = json.loads(body)
    assert export.keys() == EXPORT | {"checksum"}
    assert len(export["turns"]) == 6
    with another() as running, httpx.Client(base_url=running.url, timeout=60) as other:
        card = other.post("/v1/sessions/import", content=body, headers={"content-type": "application/json"}).json()
        assert (card["id"], card["turns"]) == (session, 6)
        assert card["usage"]["prompt_tokens"] == 0
        again = other.get(f"/v1/sessions/{session}/export").json()
        assert again | {"created": 0} == export | {"created": 0}
        # The seed came with it: what is sampled is the same, too.
        for fields in ({"temperature": 0}, {"temperature": 1, "seed": None}, {"temperature": 1, "seed": None}):
            said = [turn(client, session, "And now?", max_tokens=60, **fields) for client in (web, other)]
            assert said[0]["choices"] == said[1]["choices"]
        transcripts = [
            client.get(f"/v1/sessions/{session}/transcript", params={"token_ids": True}).json()
            for client in (web, other)
        ]
        assert transcripts[0] == transcripts[1]
        error_of(other.post("/v1/sessions/import", json=export), 409, "session_exists")
        named = other.post("/v1/sessions/import", params={"session_id": "a copy"}, json=export).json()
        assert (named["id"], named["turns"]) == ("a copy", 6)


def test_an_imported_session_is_durable(web: httpx.Client, session: int, tmp_path: Any) -> None:
    said = [turn(web, session, text) for text in ("one", "two")]
    export = web.get(f"/v1/sessions/{session}/export").json()

    def durable() -> Any:
        log = SessionLog(folder=str(tmp_path), fingerprint=bytes(32), model="tiny", tenants={0: bytes(32)})
        core = formula_engine(session_log=_core.OpenSessionLog(log))
        return serve_core(core, TextLayer(byte_tokenizer(), chat_template()))

    with durable() as running, httpx.Client(base_url=running.url) as other:
        other.post("/v1/sessions/import", json=export).raise_for_status()
        usage = turn(other, session, "three")["usage"]
        running.core.shutdown(5)
    with durable() as running, httpx.Client(base_url=running.url) as other:
        card = other.get(f"/v1/sessions/{session}").json()
        assert (card["turns"], card["usage"]["prompt_tokens"]) == (3, usage["prompt_tokens"])
        page = other.get(f"/v1/sessions/{session}/completions").json()["data"]
        assert [len(each["logprobs"]) == len(each["output_ids"]) for each in page] == [True] * 3
        running.core.shutdown(5)
    assert len(said) == 2


def signed(export: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A changed export whose checksum is right."""
    changed = export | changes
    turns = [
        StateTurn(
            each["input_tokens"],
            each["output_tokens"],
            each["open"],
            None if each["logprobs"] is None else b64decode(each["logprobs"]),
        )
        for each in changed["turns"]
    ]
    state = SessionState(b64decode(changed["tokens"]), turns, int(changed["seed"]), changed["system_tokens"])
    return changed | {"checksum": checksum(state, changed["fingerprint"])}


def test_what_cannot_be_imported(web: httpx.Client, session: int) -> None:
    turn(web, session, "one")
    export = web.get(f"/v1/sessions/{session}/export").json()
    (only,) = export["turns"]
    count = only["input_tokens"] + only["output_tokens"]

    def refused(body: dict[str, Any], code: str, param: str | None = None, status: int = 400) -> str:
        reply = web.post("/v1/sessions/import", params={"session_id": "never"}, json=body)
        return error_of(reply, status, code, param)["message"]

    message = refused(export | {"fingerprint": "0" * 64, "model": "another"}, "session_import_mismatch", "fingerprint")
    assert "another" in message
    assert MODEL in message
    for changes in (
        {"seed": "6"},
        {"system_tokens": 1},
        {"tokens": b64encode(bytes(4 * count)).decode()},
        {"turns": [only | {"open": not only["open"]}]},
        {"turns": [only | {"logprobs": None}]},
        {"checksum": "0" * 64},
    ):
        refused(export | changes, "invalid_session_export", "checksum")
    refused(export | {"tokens": "AAA"}, "invalid_session_export", "tokens")
    for changes, param in (
        ({"tokens": b64encode(b"\xff" * 4 * count).decode()}, "tokens"),
        ({"tokens": b64encode(b64decode(export["tokens"]) + b"abc").decode()}, "tokens"),
        ({"turns": [only | {"input_tokens": only["input_tokens"] + 1}]}, "turns"),
        ({"turns": [only | {"input_tokens": only["input_tokens"] - 1}]}, "turns"),
        ({"turns": [only | {"logprobs": b64encode(bytes(4)).decode()}]}, "turns"),
        ({"turns": [only, only | {"input_tokens": 0, "output_tokens": 0, "logprobs": None}]}, "turns"),
        ({"system_tokens": count + 1}, "turns"),
        ({"seed": str(2**64)}, "seed"),
    ):
        seeded = changes.get("seed", "0")
        body = export | changes if int(seeded) >= 2**64 else signed(export, **changes)
        refused(body, "invalid_value", param)
    long = [{"input_tokens": 5000, "output_tokens": 0, "open": False, "logprobs": None}]
    refused(signed(export, turns=long, tokens=b64encode(bytes(20000)).decode()), "context_length_exceeded", "tokens")
    for body in ({}, export | {"version": 2}, export | {"turns": []}, export | {"fingerprint": "x"}):
        error_of(web.post("/v1/sessions/import", json=body), 400)
    refused({"tokens": "A" * (1 << 21)}, "body_too_large", status=413)
    error_of(web.get("/v1/sessions/never"), 404, "session_not_found")
    for given in ("-1", "x" * 129):
        error_of(web.post("/v1/sessions/import", params={"session_id": given}, json=export), 400, param="session_id")
    error_of(web.get(f"/v1/sessions/{next(ids)}/export"), 404, "session_not_found")


def test_a_session_of_another_key_is_not_exported() -> None:
    keys = {"sk-first": 1, "sk-second": 2}
    with another(keys=Keyring.of(*keys)) as running:
        first, second = (
            httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) for key in keys
        )
        with first, second:
            turn(first, 7, "one")
            for path in ("export", "completions"):
                error_of(second.get(f"/v1/sessions/7/{path}"), 404, "session_not_found")
            error_of(second.post("/v1/sessions/7/retention", json={"hold": "1m"}), 404, "session_not_found")
            export = first.get("/v1/sessions/7/export").json()
            assert second.post("/v1/sessions/import", json=export).json()["turns"] == 1
            assert first.get("/v1/sessions/7").json()["turns"] == 1


def test_the_ledger_is_what_was_read_and_sampled(web: httpx.Client, session: int) -> None:
    replies = [turn(web, session, "one"), turn(web, session, "two", logprobs=False), turn(web, session, "three")]
    web.post(f"/v1/sessions/{session}/append", json={"prompt": "four"}).raise_for_status()
    ledger = web.get(f"/v1/sessions/{session}/completions").json()
    turns = ledger["data"]
    transcript = web.get(f"/v1/sessions/{session}/transcript", params={"token_ids": True}).json()["turns"]
    assert [each["input_ids"] for each in turns] == [each["input_ids"] for each in transcript]
    assert [each["output_ids"] for each in turns] == [each["output_ids"] for each in transcript]
    assert [each["turn"] for each in turns] == [1, 2, 3, 4]
    total = 0
    for each in turns:
        assert each["context_tokens"] == total
        assert each["loss_mask"] == [0] * len(each["input_ids"]) + [1] * len(each["output_ids"])
        total += len(each["loss_mask"])
    assert [each["logprobs"] is None for each in turns] == [False, True, False, True]
    for each, reply in ((turns[0], replies[0]), (turns[2], replies[2])):
        told = [token["logprob"] for token in reply["choices"][0]["logprobs"]["content"]]
        assert each["logprobs"] == told[: len(each["output_ids"])]
    export = web.get(f"/v1/sessions/{session}/export").json()
    assert (ledger["fingerprint"], ledger["model"]) == (export["fingerprint"], MODEL)
    page = web.get(f"/v1/sessions/{session}/completions", params={"after": 1, "limit": 2}).json()
    assert (page["data"], page["has_more"]) == (turns[1:3], True)
    assert web.get(f"/v1/sessions/{session}/completions", params={"after": 4}).json()["data"] == []
    error_of(web.get(f"/v1/sessions/{next(ids)}/completions"), 404, "session_not_found")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
def test_chats_tell_their_token_ids(web: httpx.Client, stream: bool, logprobs: bool) -> None:
    body = {
        "messages": "Hello",
        "max_tokens": 300,
        "temperature": 0,
        "n": 2,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": stream,
    } | ({"logprobs": True, "top_logprobs": 1} if logprobs else {})
    reply = web.post(CHAT, json=body)
    assert reply.status_code == 200, reply.text
    tokens: dict[int, list[int]] = {0: [], 1: []}
    names: dict[int, list[str]] = {0: [], 1: []}
    if stream:
        events = events_of(reply.content)
        prompts = [event["prompt_token_ids"] for event in events if "prompt_token_ids" in event]
        choices = [choice for event in events for choice in event["choices"]]
    else:
        prompts, choices = [reply.json()["prompt_token_ids"]], reply.json()["choices"]
    for choice in choices:
        tokens[choice["index"]] += choice.get("token_ids", [])
        names[choice["index"]] += [token["token"] for token in (choice["logprobs"] or {}).get("content", ())]
    tokenizer = byte_tokenizer()
    assert prompts == [tokenizer.encode(chat_template().render(b'[{"role": "user", "content": "Hello"}]'))]
    assert tokens[0] == tokens[1]
    assert tokens[0][-1] == EOS
    if logprobs:
        assert names[0] == [f"token_id:{token}" for token in tokens[0]]


@pytest.mark.parametrize("stream", [False, True])
def test_completions_take_ids_and_give_ids(web: httpx.Client, stream: bool) -> None:
    """As trainers ask: several prompts of ids, `n` of each, ids and log-probabilities back."""
    prompts = [[72, 105], [72, 111, 33]]
    body = {
        "prompt": prompts,
        "n": 2,
        "max_tokens": 9,
        "temperature": 1,
        "seed": 3,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": stream,
    }
    reply = web.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    choices = [choice for event in events_of(reply.content) for choice in event["choices"]] if stream else []
    choices = choices or reply.json()["choices"]
    for index in range(4):
        own = [choice for choice in choices if choice["index"] == index]
        told = [choice["prompt_token_ids"] for choice in own if "prompt_token_ids" in choice]
        assert told == [prompts[index // 2]]
        tokens = [token for choice in own for token in choice["token_ids"]]
        named = [token for choice in own for token in choice["logprobs"]["tokens"]]
        assert named == [f"token_id:{token}" for token in tokens]
        assert len(tokens) == 9
    without = web.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).json()["choices"][0]
    assert not {"token_ids", "prompt_token_ids"} & without.keys()


def test_the_fingerprint_is_the_engines() -> None:
    engine = AsyncEngine(formula_engine(), max_model_len=4096, fingerprint=bytes(range(32)))
    assert engine.fingerprint == bytes(range(32))
