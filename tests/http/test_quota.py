"""What each key may use and has used, over HTTP and the real core: limits, headers, usage, metrics."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.keys import ApiKey, Keyring, Limits
from tiny_engine import formula_engine

from wire import error_of, wait_until

TOKENS = 100_000
KEYS = Keyring(
    [
        ApiKey.of("sk-free", "free"),
        ApiKey.of("sk-tokens", "tokens", Limits(tokens_per_minute=TOKENS)),
        ApiKey.of("sk-flight", "flight", Limits(max_in_flight=2)),
        ApiKey.of("sk-late", "late", Limits(max_priority=5, max_sessions=2, weight=3)),
        ApiKey.of("sk-watch", "watch", operator=True),
    ]
)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with serve_core(formula_engine(pause=0.001, tenants=KEYS.tenants()), keys=KEYS) as running:
        yield running


def client(running: Running, key: str) -> httpx.Client:
    return httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def usage_of(client: httpx.Client) -> dict[str, Any]:
    response = client.get("/v1/usage")
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = response.json()
    return usage


def turn(tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": "Hi", "request_output_len": tokens, "ignore_eos": True, **fields}


def test_lines_of_a_batch_take_nothing_of_what_may_be_in_flight(keyed: Running) -> None:
    with client(keyed, "sk-flight") as flight:
        lines = [
            {"custom_id": str(at), "method": "POST", "url": "/v1/completions"}
            | {"body": {"prompt": "x", "max_tokens": 2000, "ignore_eos": True}}
            for at in range(6)
        ]
        content = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
        file = flight.post("/v1/files", files={"file": ("in", content)}, data={"purpose": "batch"}).json()
        body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = flight.post("/v1/batches", json=body).json()
        # More lines run at a time than the key may have requests in flight.
        wait_until(lambda: usage_of(flight)["in_flight"] == 6, "all lines are taken")
        assert usage_of(flight)["remaining"]["remaining_requests"] == 2
        assert flight.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        assert flight.post(f"/v1/batches/{batch['id']}/cancel").status_code == 200
        wait_until(lambda: usage_of(flight)["in_flight"] == 0, "the batch is cancelled")


def test_tokens_are_reserved_refused_with_the_time_and_given_back(keyed: Running) -> None:
    with client(keyed, "sk-tokens") as tokens:
        with tokens.stream("POST", "/v1/completions", json=many(24)) as running:
            assert running.status_code == 200
            assert running.headers["x-ratelimit-limit-tokens"] == str(TOKENS)
            # 24 answers of up to 4000 tokens leave less than one more such request needs.
            assert int(running.headers["x-ratelimit-remaining-tokens"]) <= TOKENS - 24 * 4000 + 1000
            chat = {"model": MODEL, "messages": "Hi", "max_tokens": 4000, "n": 4}
            for path, body in (("/v1/completions", many(4)), ("/v1/chat/completions", chat)):
                refused = tokens.post(path, json=body)
                error = error_of(refused, 429, "rate_limit_exceeded")
                assert error["type"] == "rate_limit_error"
                missing = 16_000 - error["remaining_tokens"]
                # A minute's tokens come in 60 seconds; the prompt's few come on top.
                seconds = missing / (TOKENS / 60)
                assert math.floor(seconds) <= error["retry_after"] <= math.ceil(seconds + 1)
                assert refused.headers["retry-after"] == str(error["retry_after"])
                assert refused.headers["x-ratelimit-remaining-tokens"] == str(error["remaining_tokens"])
                assert re.fullmatch(r"\d+m[\d.]+s|[\d.]+m?s", refused.headers["x-ratelimit-reset-tokens"])
        wait_until(lambda: usage_of(tokens)["in_flight"] == 0, "the stream that was left has ended")
        assert usage_of(tokens)["remaining"]["remaining_tokens"] > TOKENS // 2
        assert tokens.post("/generate", json=turn(5)).status_code == 200
        error = error_of(tokens.post("/v1/completions", json=many(32)), 400, "exceeds_tokens_per_minute")
        assert (error["limit_tokens"], error["requested_tokens"] >= 32 * 4000) == (TOKENS, True)
        error = error_of(tokens.post("/v1/embeddings", json={"model": MODEL, "input": ["x" * 4000] * 30}), 400)
        assert error["code"] == "exceeds_tokens_per_minute"


def many(n: int) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Hi", "max_tokens": 4000, "n": n, "stream": True, "ignore_eos": True}


def test_the_openai_client_waits_as_told(keyed: Running) -> None:
    api = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="sk-flight", max_retries=4)
    with client(keyed, "sk-flight") as flight:
        with flight.stream("POST", "/generate", json=turn(4000, stream=True)) as held:
            assert held.headers["x-ratelimit-remaining-requests"] == "1"
            with flight.stream("POST", "/generate", json=turn(4000, stream=True)) as other:
                assert other.headers["x-ratelimit-remaining-requests"] == "0"
                refused = flight.post("/generate", json=turn(1))
                error = error_of(refused, 429, "rate_limit_exceeded")
                assert (error["limit_requests"], error["remaining_requests"], error["retry_after"]) == (2, 0, 1)
                assert refused.headers["retry-after"] == "1"
                timer = threading.Timer(0.3, other.close)
                timer.start()
                reply = api.completions.create(model=MODEL, prompt="Hi", max_tokens=3)
                timer.join()
        assert reply.usage is not None
        assert reply.usage.completion_tokens <= 3
        with client(keyed, "sk-free") as free:
            response = free.post("/generate", json=turn(1))
            assert response.status_code == 200
            assert not [name for name in response.headers if name.startswith("x-ratelimit")]


def test_one_request_after_another_never_meets_the_limit_of_requests(keyed: Running) -> None:
    with client(keyed, "sk-flight") as flight:
        wait_until(lambda: usage_of(flight)["in_flight"] == 0, "earlier tests' requests have ended")
        with flight.stream("POST", "/generate", json=turn(4000, stream=True)):
            for number in range(60):
                response = flight.post("/generate", json=turn(1, stream=bool(number % 2)))
                assert response.status_code == 200, response.text


def test_usage_is_what_replies_said_aborted_ones_included(keyed: Running) -> None:
    with client(keyed, "sk-free") as free:
        before = usage_of(free)
        assert (before["key"], before["limits"]["weight"], before["remaining"]) == ("free", 1, {})
        said = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
        chat = {"model": MODEL, "messages": "Hello, how are you today?", "n": 3, "max_tokens": 7}
        for _ in range(2):
            usage = free.post("/v1/chat/completions", json=chat).json()["usage"]
            said["prompt_tokens"] += usage["prompt_tokens"]
            said["completion_tokens"] += usage["completion_tokens"]
            said["cached_tokens"] += usage["prompt_tokens_details"]["cached_tokens"]
        embedded = free.post("/v1/embeddings", json={"model": MODEL, "input": ["x", "yz"]}).json()["usage"]
        said["prompt_tokens"] += embedded["prompt_tokens"]
        after = usage_of(free)
        assert {name: after[name] - before[name] for name in said} == said
        assert after["requests"] - before["requests"] == 3
        assert said["cached_tokens"] > 0
        with free.stream("POST", "/generate", json=turn(4000, stream=True)) as stream:
            pieces = stream.iter_raw()  # once it is gone, so is the connection
            next(pieces)
            assert (usage_of(free)["in_flight"], usage_of(free)["waiting"]) == (1, 0)
        wait_until(lambda: usage_of(free)["in_flight"] == 0, "the stream that was left has ended")
        aborted = usage_of(free)
        assert aborted["requests"] == after["requests"] + 1
        assert 0 < aborted["completion_tokens"] - after["completion_tokens"] < 4000
        assert free.post("/generate", json=turn(-1)).status_code == 400
        assert usage_of(free)["requests"] == aborted["requests"]


def test_priorities_and_sessions_have_the_keys_bounds(keyed: Running) -> None:
    with client(keyed, "sk-late") as late:
        completion = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}
        error_of(late.post("/v1/completions", json=completion | {"priority": 4}), 400, "invalid_value", "priority")
        for priority in ({}, {"priority": 0}, {"priority": 5}):
            assert late.post("/v1/completions", json=completion | priority).status_code == 200
        for session in (1, 2, 3):
            assert late.post("/generate", json=turn(1, instance_id=session)).status_code == 200
        error_of(late.post("/generate", json=turn(1, instance_id=1, sequence_start=False)), 404, "session_expired")
        assert late.post("/generate", json=turn(1, instance_id=3, sequence_start=False)).status_code == 200
        assert usage_of(late)["limits"] == {
            "weight": 3,
            "max_in_flight": None,
            "tokens_per_minute": None,
            "max_sessions": 2,
            "max_priority": 5,
        }


def test_metrics_are_prometheus_text(keyed: Running) -> None:
    with client(keyed, "sk-free") as free:
        free.post("/generate", json=turn(3))
        response = free.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for line in response.text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kinds[name] = line.split(" ")
        elif not line.startswith("# HELP "):
            match = re.fullmatch(r"([a-z0-9_:]+)((?:\{(?:[a-z_]+=\"[^\"]+\",?)+\})?) ([0-9.e+-]+)", line)
            assert match is not None, line
            labels = match[2].replace(f'model="{MODEL}",', "").replace(f'{{model="{MODEL}"}}', "")
            samples[match[1] + labels] = float(match[3])
            family = re.sub(r"_(bucket|sum|count)$", "", match[1])
            assert kinds[family] == "histogram" if family != match[1] else match[1] in kinds, line
    assert kinds["lmserve_time_to_first_token_seconds"] == kinds["lmserve_queue_seconds"] == "histogram"
    assert samples['lmserve_requests_total{outcome="length"}'] > 0
    assert samples["lmserve_generated_tokens_total"] > 0
    assert samples["lmserve_time_to_first_token_seconds_count"] > 0
    for name in ("lmserve_requests_running", "lmserve_requests_waiting", "lmserve_preemptions_total"):
        assert name in samples
    blocks = [samples[f'lmserve_kv_blocks{{state="{state}"}}'] for state in ("free", "owned", "cached")]
    assert sum(blocks) == 64 * 4096 // 16


def test_metrics_of_a_key_are_for_itself_and_for_operators(keyed: Running) -> None:
    with client(keyed, "sk-free") as free, client(keyed, "sk-late") as late, client(keyed, "sk-watch") as watch:
        free.post("/generate", json=turn(3))
        late.post("/generate", json=turn(5))
        used = usage_of(late)
        own, other, all_keys = (
            re.findall(r'^lmserve_key_\w+{.*key="(\w+)".*} \d+$', asking.get("/metrics").text, re.MULTILINE)
            for asking in (late, free, watch)
        )
        page = watch.get("/metrics").text
    assert (set(own), set(other)) == ({"late"}, {"free"})
    assert list(dict.fromkeys(all_keys)) == [key.name for key in KEYS.keys]
    for kind, counter in (("prompt", "prompt_tokens"), ("cached", "cached_tokens"), ("generated", "completion_tokens")):
        assert re.search(rf'lmserve_key_tokens_total{{.*key="late",kind="{kind}"}} {used[counter]}\n', page)
    assert re.search(rf'lmserve_key_requests_total{{.*key="late"}} {used["requests"]}\n', page)
    assert re.search(r'lmserve_key_requests_open{.*key="late",state="waiting"} 0\n', page)


def test_without_keys_usage_is_everybodys(real: Running) -> None:
    with httpx.Client(base_url=real.url) as anyone:
        before = usage_of(anyone)
        assert before["key"] is None
        anyone.post("/generate", json=turn(2))
        assert usage_of(anyone)["completion_tokens"] >= before["completion_tokens"] + 2
        assert "lmserve_key_" not in anyone.get("/metrics").text


def test_a_full_queue_is_refused_and_emptied() -> None:
    with (
        serve_core(formula_engine(pause=0.001, max_queue=2, max_batch=1)) as running,
        httpx.Client(base_url=running.url, timeout=60) as anyone,
        ExitStack() as held,
    ):
        hold = threading.Event()
        threads = [threading.Thread(target=read_until, args=(running.url, hold)) for _ in range(3)]
        held.callback(lambda: [thread.join() for thread in threads])
        held.callback(hold.set)
        for thread in threads:
            thread.start()
        wait_until(lambda: usage_of(anyone)["waiting"] == 2, "one runs and two wait")
        assert usage_of(anyone)["in_flight"] == 3
        bodies = {
            "/generate": turn(1),
            "/v1/chat/completions": {"model": MODEL, "messages": "Hi", "max_tokens": 1},
            "/v1/embeddings": {"model": MODEL, "input": "Hi"},
        }
        for path, body in bodies.items():
            refused = anyone.post(path, json=body)
            assert error_of(refused, 429, "queue_full")["retry_after"] == 1
            assert refused.headers["retry-after"] == "1"
        hold.set()
        wait_until(lambda: usage_of(anyone)["in_flight"] == 0, "all that were held have left")
        for path, body in bodies.items():
            assert anyone.post(path, json=body).status_code == 200


def read_until(url: str, left: threading.Event) -> None:
    """A client that is answered for as long as it likes."""
    with httpx.Client(base_url=url, timeout=60) as one, one.stream("POST", "/generate", json=turn(4000, stream=True)):
        left.wait(30)
