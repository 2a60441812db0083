"""The line of each request, and what /metrics says under whose names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import MODEL, Running, serve_core
from lmserve import _core
from lmserve.api.http.exposition import ALIASES, merged, page, parsed, quoted
from lmserve.engine.text import TextLayer
from lmserve.keys import Keyring
from scripted_core import ScriptedCore
from test_disconnect import reset, send
from tiny_engine import TEMPLATE, byte_tokenizer, formula_engine
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from wire import wait_until

KEY = {"Authorization": "Bearer sk-1"}
PROMPT = {"prompt": "Hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def logged() -> Iterator[Running]:
    """The real core, with a line of JSON for each request."""
    text = TextLayer(byte_tokenizer(), _core.ChatTemplate(TEMPLATE, b"{}"))
    with serve_core(formula_engine(), text, keys=Keyring.of("sk-1"), request_log="json") as running:
        yield running


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """`lines()`: what was logged since the test began."""
    caplog.set_level(logging.INFO, "lmserve.requests")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "lmserve.requests"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_says_who_and_what_and_how_long(logged: Running, lines: Any, stream: bool) -> None:
    body = PROMPT | {"stream": stream, "n": 2}
    headers = KEY | {"X-Request-Id": "mine"}
    assert httpx.post(f"{logged.url}/v1/completions?x=secret", json=body, headers=headers).status_code == 200
    wait_until(lambda: len(lines()) == 1, "the line is written")
    (line,) = map(json.loads, lines())
    assert line.pop("time").startswith("20")
    queued, first, whole = (line.pop(name) for name in ("queue_s", "first_token_s", "duration_s"))
    assert 0 <= queued <= first <= whole
    assert line.pop("cached_tokens") <= 5
    assert line == {
        "id": "mine",
        "key": "key-1",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "session": None,
        "batch": None,
        "prompt_tokens": 5,
        "completion_tokens": 10,
    }


def counted(client: httpx.Client) -> float:
    """Replies of /v1/completions that /metrics has counted."""
    line = r'^lmserve_http_requests_total{[^}]*"/v1/completions"[^}]*} (\S+)$'
    found = re.findall(line, client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def test_each_line_of_a_batch_has_one_entry(logged: Running, lines: Any) -> None:
    with httpx.Client(base_url=logged.url, headers=KEY, timeout=60) as client:
        bodies = [{"prompt": "One", "max_tokens": 3, "ignore_eos": True}, {"prompt": 1.5}]
        asked = [
            {"custom_id": str(at), "method": "POST", "url": "/v1/completions", "body": body}
            for at, body in enumerate(bodies)
        ]
        content = b"".join(json.dumps(each).encode() + b"\n" for each in asked)
        uploaded = client.post("/v1/files", files={"file": ("in", content)}, data={"purpose": "batch"}).json()
        body = {"input_file_id": uploaded["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=body).json()
        before = counted(client)

        def of_batch() -> list[dict[str, Any]]:
            return [entry for entry in map(json.loads, lines()) if entry["batch"] == batch["id"]]

        wait_until(lambda: len(of_batch()) == 2, "both lines are answered")
        entries = sorted(of_batch(), key=lambda entry: entry["status"])
        assert [(each["path"], each["status"], each["completion_tokens"], each["key"]) for each in entries] == [
            ("/v1/completions", 200, 3, "key-1"),
            ("/v1/completions", 400, 0, "key-1"),
        ]
        # They are no HTTP requests.
        assert counted(client) == before
        wait_until(lambda: client.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed", "the batch ends")
        ended = client.get(f"/v1/batches/{batch['id']}").json()
        files = [client.get(f"/v1/files/{ended[name]}/content") for name in ("output_file_id", "error_file_id")]
        told = [json.loads(text) for file in files for text in file.text.splitlines()]
        assert {each["response"]["request_id"] for each in told} == {each["id"] for each in entries}


def test_each_reply_on_a_websocket_has_an_entry_and_the_socket_one(logged: Running, lines: Any) -> None:
    address = logged.url.replace("http://", "ws://") + "/v1/responses"
    with connect(address, additional_headers=KEY | {"X-Request-Id": "talk"}) as socket:
        create = {"type": "response.create", "input": "Hi", "max_output_tokens": 4, "ignore_eos": True}
        for message in (create, {"type": "nothing"}):
            socket.send(json.dumps(message))
            while json.loads(socket.recv(timeout=30))["type"] not in ("response.incomplete", "error"):
                pass

    def talk() -> list[dict[str, Any]]:
        return [entry for entry in map(json.loads, lines()) if entry["id"] == "talk"]

    wait_until(lambda: len(talk()) == 3, "the connection ends")
    first, second, whole = talk()
    asked = ("WEBSOCKET", "/v1/responses", "talk", "key-1")
    assert all((each["method"], each["path"], each["id"], each["key"]) == asked for each in (first, second))
    assert (first["status"], first["completion_tokens"]) == (200, 4)
    assert first["first_token_s"] is not None
    assert (second["status"], second["completion_tokens"]) == (400, 0)
    assert (whole["method"], whole["status"], whole["id"], whole["key"]) == ("GET", 101, "talk", "key-1")


def test_a_refused_handshake_has_an_entry(logged: Running, lines: Any) -> None:
    with pytest.raises(InvalidStatus):
        connect(logged.url.replace("http://", "ws://") + "/v1/responses").close()
    wait_until(lambda: len(lines()) == 1, "the entry is written")
    (entry,) = map(json.loads, lines())
    assert (entry["method"], entry["status"], entry["key"]) == ("GET", 401, None)


def test_refused_requests_have_lines_too(logged: Running, lines: Any) -> None:
    asked = (
        ("GET", "/v1/models", {}, 401),
        ("GET", "/nothing%0d%0aid=x", KEY, 404),
        ("HEAD", "/v1/models", KEY, 200),
        ("POST", "/v1/completions", KEY, 400),
    )
    for number, (method, path, headers, status) in enumerate(asked, 1):
        assert httpx.request(method, logged.url + path, headers=headers).status_code == status
        wait_until(lambda number=number: len(lines()) == number, "the line is written")
        line = json.loads(lines()[-1])
        assert (line["method"], line["path"], line["status"]) == (method, path, status)
        assert line["key"] == ("key-1" if headers and status != 404 else None)
        assert line["queue_s"] is None


@pytest.mark.parametrize(("session", "logged_as"), [(7, 7), ("7", 7), ("a b=c", "a b=c"), (-1, None)])
def test_a_line_names_the_session(logged: Running, lines: Any, session: int | str, logged_as: int | str | None) -> None:
    body = {"messages": "Hello", "session_id": session, "max_tokens": 2, "model": MODEL}
    assert httpx.post(f"{logged.url}/v1/chat/completions", json=body, headers=KEY).status_code == 200
    wait_until(lambda: len(lines()) == 1, "the line is written")
    assert json.loads(lines()[0])["session"] == logged_as


def test_a_stored_response_is_a_session_of_the_servers_own(logged: Running, lines: Any) -> None:
    body = {"input": "Hello", "max_output_tokens": 2, "model": MODEL}
    assert httpx.post(f"{logged.url}/v1/responses", json=body, headers=KEY).status_code == 200
    wait_until(lambda: len(lines()) == 1, "the line is written")
    assert json.loads(lines()[0])["session"] is None


def test_a_sessions_name_stays_one_word(lines: Any) -> None:
    with serve_core(ScriptedCore(), request_log="text") as running:
        body = {"prompt": "x", "instance_id": "a b\u2028é", "request_output_len": 1}
        assert httpx.post(f"{running.url}/generate", json=body).status_code == 200
        wait_until(lines, "the line is written")
    assert " session=a%20b%E2%80%A8%C3%A9 client=" in lines()[0]


def test_probes_are_of_interest_once_they_fail(logged: Running, lines: Any) -> None:
    assert httpx.get(f"{logged.url}/health").status_code == 200
    assert httpx.get(f"{logged.url}/metrics").status_code == 401
    wait_until(lines, "the line is written")
    assert [json.loads(line)["path"] for line in lines()] == ["/metrics"]


def test_a_line_of_text_for_a_client_that_left(lines: Any) -> None:
    with serve_core(ScriptedCore(), request_log="text") as running:
        connection = send(running, "/generate", {"prompt": "[[hold]]", "stream": True})
        connection.recv(100)
        reset(connection)
        wait_until(lines, "the line is written")
    assert re.fullmatch(r"POST /generate 499 \d+\.\d{3}s client=127\.0\.0\.1 id=[0-9a-f]{32}", lines()[0])


def test_no_line_unless_told_so(scripted_client: httpx.Client, lines: Any) -> None:
    scripted_client.get("/nothing")
    scripted_client.get("/nothing")
    assert lines() == []


def sample(text: str, name: str) -> float:
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


def test_metrics(logged: Running) -> None:
    def scraped() -> str:
        return httpx.get(f"{logged.url}/metrics", headers=KEY).text

    before = scraped()
    assert httpx.post(f"{logged.url}/v1/completions", json=PROMPT, headers=KEY).status_code == 200
    httpx.get(f"{logged.url}/nothing", headers=KEY)
    after = scraped()
    ours, vllm = f'{{model="{MODEL}"}}', f'{{model_name="{MODEL}"}}'
    for name, more in (
        (f"lmserve_prompt_tokens_total{ours}", 5),
        (f"vllm:prompt_tokens_total{vllm}", 5),
        ("llamacpp:prompt_tokens_total", 5),
        (f"vllm:generation_tokens_total{vllm}", 5),
        ("llamacpp:tokens_predicted_total", 5),
        (f"lmserve_inter_token_seconds_count{ours}", 4),
        (f"vllm:inter_token_latency_seconds_count{vllm}", 4),
        (f"vllm:time_to_first_token_seconds_count{vllm}", 1),
        (f'vllm:e2e_request_latency_seconds_bucket{{model_name="{MODEL}",le="+Inf"}}', 1),
        (f'vllm:request_success_total{{model_name="{MODEL}",finished_reason="length"}}', 1),
        (f'lmserve_requests_total{{model="{MODEL}",outcome="length"}}', 1),
    ):
        assert sample(after, name) - sample(before, name) == more, name
    completions = f'lmserve_http_requests_total{{model="{MODEL}",route="/v1/completions",status="200"}}'
    assert sample(after, completions) >= 1
    assert sample(after, f'lmserve_http_requests_total{{model="{MODEL}",route="unknown",status="404"}}') >= 1
    assert f'lmserve_build_info{{model="{MODEL}",version="' in after
    assert 0 <= sample(after, f"vllm:kv_cache_usage_perc{vllm}") <= 1


def test_blocks_are_counted_before_the_first_request() -> None:
    text = TextLayer(byte_tokenizer(), _core.ChatTemplate(TEMPLATE, b"{}"))
    with serve_core(formula_engine(), text) as running:
        page = httpx.get(f"{running.url}/metrics").text
    assert sample(page, f'lmserve_kv_blocks{{model="{MODEL}",state="free"}}') > 0
    assert sample(page, "llamacpp:kv_cache_usage_ratio") == 0


def test_every_alias_has_a_source_and_a_type(logged: Running) -> None:
    text = httpx.get(f"{logged.url}/metrics", headers=KEY).text
    families = parsed(text)
    for alias, name in ALIASES:
        assert families[alias].kind == families[name].kind != "untyped"
        assert families[alias].samples
    # Each metric once, its lines together, as the format wants it.
    heads = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
    assert len(heads) == len(set(heads))
    assert text.endswith("\n")


def test_a_models_name_is_quoted() -> None:
    text = page("# TYPE lmserve_x gauge\nlmserve_x 1\n", 'a"b\\c\nd', {}, {})
    assert 'lmserve_x{model="a\\"b\\\\c\\nd"} 1' in text.splitlines()
    assert quoted("plain") == "plain"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not say what a process takes")
def test_the_memory_of_the_process_is_told_once_whatever_the_number_of_models() -> None:
    pages = [page("# TYPE lmserve_x gauge\nlmserve_x 1\n", name, {}, {}) for name in ("a", "b")]
    families = parsed(merged(pages))
    assert len(families["lmserve_x"].samples) == 2
    (total,) = families["process_resident_memory_bytes"].samples
    (of_files,) = families["process_resident_memory_mapped_bytes"].samples
    assert int(total[2]) > int(of_files[2]) > 1 << 20
