"""Sessions at their limits: evicted ones, full contexts, shared prefixes, and the idioms of LMDeploy's clients."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.keys import ApiKey, Keyring, Limits
from tiny_engine import BLOCK, MAX_MODEL_LEN, formula_engine

from wire import error_of

KEYS = Keyring([ApiKey.of("sk-first", "first", Limits(max_sessions=1)), ApiKey.of("sk-second", "second")])
HEADERS = [{"Authorization": f"Bearer {key}"} for key in ("sk-first", "sk-second")]


@contextmanager
def serve(**options: Any) -> Iterator[tuple[Running, httpx.Client]]:
    with serve_core(formula_engine(**options)) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield running, client


@pytest.fixture
def web(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def turn(web: httpx.Client, session: int, prompt: Any = "Hello", **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "instance_id": session, "sequence_start": False, "request_output_len": 4}
    response = web.post("/generate", json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def chat(web: httpx.Client, session: int, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": "Hello", "session_id": session, "max_tokens": 4}
    return web.post("/v1/chat/completions", json=body | fields)


def test_the_least_recently_used_session_goes_first_and_says_so() -> None:
    with serve(max_sessions=2) as (_, web):
        turn(web, 1, sequence_start=True)
        turn(web, 2, sequence_start=True)
        turn(web, 1)
        turn(web, 3, sequence_start=True)
        assert [card["id"] for card in web.get("/v1/sessions").json()["data"]] == [1, 3]
        gone = {"prompt": "x", "instance_id": 2, "sequence_start": False}
        error_of(web.post("/generate", json=gone), 404, "session_expired")
        for verb in ("", "/transcript"):
            error_of(web.get(f"/v1/sessions/2{verb}"), 404, "session_expired")
        error_of(web.delete("/v1/sessions/2"), 404, "session_expired")
        # Messages that are only what is new must not meet an empty history.
        error_of(chat(web, 2), 404, "session_expired")
        assert chat(web, 2, renew_session=True).status_code == 200
        assert turn(web, 2)["usage"]["history_tokens"] > 0


def test_a_session_that_was_idle_for_too_long_is_gone() -> None:
    with serve(session_ttl=0.3) as (_, web):
        turn(web, 1, sequence_start=True)
        assert web.get("/v1/sessions/1").status_code == 200
        time.sleep(0.35)
        error_of(web.get("/v1/sessions/1"), 404, "session_expired")
        assert web.get("/v1/sessions").json()["data"] == []


def test_a_tenants_cap_is_its_own() -> None:
    with serve_core(formula_engine(tenants=KEYS.tenants()), keys=KEYS) as running:
        first, second = (httpx.Client(base_url=running.url, headers=headers, timeout=60) for headers in HEADERS)
        with first, second:
            for session in (5, 6):
                turn(first, session, sequence_start=True)
                turn(second, session, sequence_start=True)
            assert [card["id"] for card in first.get("/v1/sessions").json()["data"]] == [6]
            assert [card["id"] for card in second.get("/v1/sessions").json()["data"]] == [5, 6]
            error_of(first.get("/v1/sessions/5"), 404, "session_expired")


@pytest.mark.parametrize("shared", [False, True])
def test_keys_find_one_anothers_prefixes_only_if_told_so(shared: bool) -> None:
    with serve_core(formula_engine(share_prefix_cache=shared), keys=KEYS) as running:
        body = {"prompt": "x" * 20 * BLOCK, "request_output_len": 1}
        cached = []
        for headers in (HEADERS[0], HEADERS[1], HEADERS[1]):
            reply = httpx.post(f"{running.url}/generate", json=body, headers=headers).json()
            cached.append(reply["usage"]["cached_tokens"])
        assert cached[0] == 0
        assert cached[1] == (cached[2] if shared else 0)
        assert cached[2] >= 20 * BLOCK


def test_overflow_with_a_history(web: httpx.Client) -> None:
    system = {"role": "system", "content": "Be brief."}
    turn(web, 800, [system, {"role": "user", "content": "x" * 1500}], sequence_start=True)
    turn(web, 800, "y" * 1500)
    before = web.get("/v1/sessions/800").json()
    body = {"prompt": "z" * 1000, "instance_id": 800, "sequence_start": False, "request_output_len": 500}
    body |= {"ignore_eos": True}

    error = error_of(web.post("/generate", json=body), 400, "context_length_exceeded")
    numbers = [error[name] for name in ("context_length", "history_tokens", "requested_tokens")]
    assert numbers == [MAX_MODEL_LEN, before["tokens"], 500]
    assert error["input_tokens"] > 1000
    for number in (*numbers, error["input_tokens"]):
        assert str(number) in error["message"]
    # Refused is not begun.
    assert web.get("/v1/sessions/800").json() | {"age": 0, "idle": 0} == before | {"age": 0, "idle": 0}

    fork = web.post("/v1/sessions/800/fork", json={"session_id": 801})
    assert fork.status_code == 200
    cut = web.post("/generate", json=body | {"instance_id": 801, "on_overflow": "truncate_output"}).json()
    assert cut["finish_reason"] == "length"
    assert cut["usage"]["prompt_tokens"] + cut["tokens"] == MAX_MODEL_LEN
    assert cut["tokens"] < 500

    dropped = web.post("/generate", json=body | {"on_overflow": "drop_oldest_turns"}).json()
    assert dropped["tokens"] == 500
    assert dropped["usage"]["history_tokens"] <= before["tokens"] - 1500
    first = web.get("/v1/sessions/800/transcript").json()["turns"][0]["input"]
    assert first.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert "x" * 10 not in first
    assert "y" * 1500 in first


def test_a_full_list_primes_a_session_anew(web: httpx.Client) -> None:
    """What a client does that keeps the conversation itself: send all of it, as a new first turn."""
    told = [{"role": "user", "content": "I am Ada."}, {"role": "assistant", "content": "Hello Ada."}]
    turn(web, 810, "Something else", sequence_start=True)
    turn(web, 810, "and more")
    primed = turn(web, 810, [*told, {"role": "user", "content": "Who am I?"}], sequence_start=True)
    assert primed["usage"]["history_tokens"] == 0
    transcript = web.get("/v1/sessions/810/transcript").json()["turns"]
    assert len(transcript) == 1
    assert transcript[0]["input"].startswith("<|im_start|>user\nI am Ada.<|im_end|>\n<|im_start|>assistant\nHello Ada.")
    again = turn(web, 810, "Thank you")
    assert again["usage"]["history_tokens"] > primed["usage"]["prompt_tokens"]


def test_a_list_in_a_live_session_is_what_is_new(web: httpx.Client) -> None:
    turn(web, 820, "one", sequence_start=True)
    before = web.get("/v1/sessions/820").json()["tokens"]
    reply = turn(web, 820, [{"role": "user", "content": "two"}])
    assert reply["usage"]["history_tokens"] == before
