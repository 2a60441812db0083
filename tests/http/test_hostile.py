"""Bodies that no client should send: each gets a 4xx in the error shape, and the next request is served."""

from __future__ import annotations

import gc
import json
import socket
import time
from typing import Any, cast

import httpx
import pytest
from conftest import BODY_TIMEOUT, MAX_BODY, MODEL, Running
from lmserve.api.http.body import decode_json
from lmserve.errors import LmserveError

from wire import error_of, wait_until

GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "Hi", "request_output_len": 2},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/completions": {"model": MODEL, "prompt": "Hi", "max_tokens": 2},
    "/v1/embeddings": {"model": MODEL, "input": "Hi"},
    "/v1/score": {"model": MODEL, "text_1": "Hi", "text_2": "Ho"},
    "/v1/rerank": {"model": MODEL, "query": "Hi", "documents": ["Ho"]},
    "/v1/messages": {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"model": MODEL, "input": "Hi", "max_output_tokens": 2},
    "/v1/chat/interactive": {"prompt": "Hi", "request_output_len": 2},
}
MODELS = [1, [], "nobody", "x" * 600]

NOT_JSON = [
    b"",
    b" ",
    b"\0",
    b"hello",
    b"{",
    b"}",
    b'{"',
    b"[]",
    b"[1]",
    b"null",
    b"true",
    b"0",
    b'"text"',
    b"{}",
    b"{'prompt': 'x'}",
    b'{"prompt": "x",}',
    b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}",
    b'{"a": "\xff"}',
    b'{"\xc3\x28": 1}',
    b'{"a": "\xed\xa0\x80"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b"1" * 100_000,
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": -Infinity}',
    b'{"a": 1e999999}',
    b'{"a": 0x10}',
    b'{"a": 01}',
    b'{"a": "\n"}',
    b'{"a": "\\ud800"}',
    b'{"a": "\\x"}',
    b'{"a" 1}',
    b"--boundary\r\nContent-Disposition: form-data\r\n\r\nx\r\n--boundary--",
    b"prompt=Hi&stream=true",
    b"\x80\x04\x95",
    b"<prompt>Hi</prompt>",
]

# Wrong for every field whose own list below does not replace it.
WRONG: list[Any] = ["0.5", [], {}, [[]], True, 2**64, -(2**64), 1e300, "x" * 600]
FLOATS = ["0.5", True, [], {}, -0.001, 1e300, 2**64, -(2**70)]
INTS = ["5", 1.5, True, [], {}, -(2**63) - 1, 2**63, 2**64, 10**40]
IDS = [*(given for given in INTS if given != "5"), -2, "", "x" * 129, "a\nb"]
BOOLS = ["true", 0, 1, 0.0, [], {}]
TEXTS: list[Any] = [None, 1, "", [], {}, [""], [None], [1], [[]], True]

FIELDS: dict[str, dict[str, list[Any]]] = {
    "/generate": {
        "prompt": [None, 5, True, {}, [1], [None], [{}], [{"role": "user"}], [{"role": "x", "content": "y"}], [[]]],
        "instance_id": [None, *IDS],
        "sequence_start": [None, *BOOLS],
        "sequence_end": [None, *BOOLS],
        "stream": [None, *BOOLS],
        "request_output_len": [None, -1, *INTS],
        "top_p": [None, 1.001, *FLOATS],
        "top_k": [None, -2, *INTS],
        "temperature": [None, 2.001, *FLOATS],
        "repetition_penalty": [None, 0, *FLOATS],
        "ignore_eos": [None, *BOOLS],
        "stop": [None, *BOOLS, "word", ["word"]],
        "max_new_tokens": [3],
        "seed": [*INTS],
        "min_p": [None, 1.001, *FLOATS],
        "stop_words": ["x", [""], [1], ["x"] * 65, ["x" * 1025], {}, [None]],
        "on_disconnect": [None, "x", 1, []],
        "on_overflow": [None, "x", 1, []],
    },
    "/v1/chat/completions": {
        "model": [*MODELS, "\0", "../../etc/passwd"],
        "messages": [None, 1, [], {}, [1], [[]], [{}], [{"content": "x"}], [{"role": "robot", "content": "x"}]]
        + [[{"role": "user", "content": c}] for c in (1, {}, [1], ["x"], [{}], [{"type": 1}], [{"type": "x"}])]
        + [[{"role": "user", "content": "x"}] * 8193],
        "temperature": [*FLOATS, 2.001],
        "top_p": [*FLOATS, 1.001],
        "top_k": [*INTS, -2],
        "max_tokens": [*INTS, 0, -2],
        "max_completion_tokens": [*INTS, 0],
        "n": [*INTS, 0, 65],
        "stop": [1, {}, [""], [1], ["x"] * 65],
        "stream": [*BOOLS],
        "stream_options": [1, [], {"x": 1}],
        "seed": [*INTS],
        "presence_penalty": ["1", 2.1, -2.1, True],
        "frequency_penalty": ["1", 2.1, -2.1, True],
        "logit_bias": [[], 1, {"a": 1}, {"-1": 1}, {"1": "x"}, {"1": 101}, {"99999999999": 1}],
        "logprobs": [*BOOLS],
        "top_logprobs": [*INTS, 1],
        "session_id": IDS,
        "min_tokens": [*INTS, -1, 3],
        "stop_token_ids": [1, "1", {}, [-1], [2**31], ["1"], [[1]], [1] * 65],
        "skip_special_tokens": [*BOOLS],
        "priority": [*INTS, 2**31],
        "chat_template_kwargs": [1, [], "x", {"messages": []}, {"enable_thinking": 1}, {"thinking_budget": 2**40}],
        "unknown": [None, 1],
        "tools": [1, {}, [{}]],
    },
    "/v1/completions": {
        "model": MODELS,
        "prompt": [
            *(None, 1, {}, [], [None], [[]], [{}], [-1], [2**31], [2**64], [1.5], [True]),
            *(["x", 1], [[1], "x"], [["x"]], [[[1]]], ["x"] * 257),
        ],
        "max_tokens": [*INTS, -2],
        "stop": [True, 1, {}],
        "n": [*INTS, 0, 65],
        "best_of": [*INTS, 0, 65],
        "echo": [*BOOLS],
        "prompt_logprobs": [*INTS, -1, 21],
        "logprobs": [*INTS, -1, 21],
        "logit_bias": [[], 1, {"a": 1}, {"-1": 1}, {"1": "x"}, {"1": 101}, {"99999999999": 1}],
        "min_tokens": [*INTS, -1, 3],
        "stop_token_ids": [1, "1", {}, [-1], [2**31], ["1"], [[1]], [1] * 65],
        "suffix": ["x", 1, [], {}],
        "unknown": [None, 1],
    },
    "/v1/embeddings": {
        "model": MODELS,
        "input": [
            *(None, 1, {}, "", [], [""], [None], [[]], [{}], [-1], [2**31], [2**64], [1.5], [True]),
            *(["x", 1], [[1], 1], ["x", [1]], [["x"]], [[[1]]], [[1, -1]], ["x"] * 2049),
        ],
        "encoding_format": [1, "x", [], {}, "int4"],
        "dimensions": [*INTS, 0, -1, 65537],
        "user": [1, [], {}, "x" * 600],
        "unknown": [None, 1],
    },
    "/v1/score": {
        "model": MODELS,
        "text_1": [*TEXTS, ["x"] * 1025, ["x", "y"]],
        "text_2": [*TEXTS, ["x"] * 1025],
        "user": [1, [], {}, "x" * 600],
        "unknown": [None, 1],
    },
    "/v1/rerank": {
        "model": MODELS,
        "query": [None, 1, "", [], ["x"], {}, True],
        "documents": [
            *(None, 1, "x", {}, [], [""], [None], [[]], [{}], [1], [{"text": 1}], [{"text": ""}]),
            ["x"] * 1025,
        ],
        "top_n": [*INTS, 0, -1, 2**31],
        "return_documents": [*BOOLS],
        "max_tokens_per_doc": [*INTS, 0, -1, 2**31],
        "unknown": [None, 1],
    },
    "/v1/messages": {
        "model": MODELS,
        "messages": [*(None, 1, "x", [], {}, [1], [[]], [{}], [{"role": "user"}], [{"content": "x"}])]
        + [[{"role": "user", "content": c}] for c in (None, 1, {}, [1], ["x"], [{}], [{"type": 1}], [{"type": "x"}])]
        + [[{"role": r, "content": "x"}] for r in ("developer", "tool", 1, None)],
        "max_tokens": [None, *INTS, 0, -1],
        "system": [1, {}, [1], [{}], [{"type": "image"}]],
        "stop_sequences": ["x", [""], [1], ["x"] * 65, ["x" * 1025], {}],
        "stream": [*BOOLS],
        "temperature": [*FLOATS, 1.001],
        "top_p": [*FLOATS, 1.001],
        "top_k": [*INTS, -2],
        "tools": [1, {}, [{}]],
        "thinking": [1, {}, {"type": "perhaps"}, {"type": "enabled", "budget_tokens": -1}],
        "unknown": [None, 1],
    },
    "/v1/responses": {
        "model": MODELS,
        "input": [*(None, 1, [], {}, [1], [[]], [{}], [{"role": "user"}], [{"content": "x"}], ["x"])]
        + [[{"role": "user", "content": c}] for c in (1, {}, [1], ["x"], [{}], [{"type": 1}], [{"type": "x"}])]
        + [[{"role": "user", "content": "x", "type": kind}] for kind in (1, [], "function_call")],
        "previous_response_id": [1, [], {}, "", "x", "resp_", "x" * 600, "resp_" + "0" * 16],
        "instructions": [1, [], {}],
        "store": [*BOOLS],
        "stream": [*BOOLS],
        "background": [*BOOLS],
        "max_output_tokens": [*INTS, 0, -2],
        "temperature": [*FLOATS, 2.001],
        "top_p": [*FLOATS, 1.001],
        "top_logprobs": [*INTS, 1, 21],
        "include": ["x", 1, [1], ["x" * 600], ["message.output_text.logprobs"] * 17],
        "truncation": [1, "x", []],
        "metadata": [1, "x", [], {"a": 1}, {"x" * 65: "x"}, {str(at): "x" for at in range(17)}],
        "text": [1, [], {"format": {"type": "xml"}}, {"format": {"type": "json_schema"}}],
        "seed": [*INTS],
        "tools": [1, {}, [{}]],
        "unknown": [None, 1],
    },
    "/v1/chat/interactive": {
        "prompt": [None, 5, True, {}, [1], [None], [{}], [{"role": "user"}], [{"role": "x", "content": "y"}], [[]], []],
        "session_id": [None, *IDS],
        "interactive_mode": [None, *BOOLS],
        "stream": [None, *BOOLS],
        "stop": [1, True, [""], [1], ["x"] * 65, ["x" * 1025], {}, [None]],
        "request_output_len": [-1, *INTS],
        "top_p": [None, 1.001, *FLOATS],
        "top_k": [None, -2, *INTS],
        "temperature": [None, 2.001, *FLOATS],
        "repetition_penalty": [None, 0, *FLOATS],
        "ignore_eos": [None, *BOOLS],
        "cancel": [*BOOLS, True],
        "adapter_name": ["x", 1, []],
        "image_url": ["x", 1, []],
        "seed": [*INTS],
        "min_new_tokens": [*INTS, -1, 3],
        "min_p": [None, 1.001, *FLOATS],
    },
}


def bodies_of(route: str) -> list[bytes]:
    good = GOOD[route]
    wrong = [json.dumps(good | {field: value}).encode() for field, values in FIELDS[route].items() for value in values]
    required = [field for field in list(good)[:2] if field != "model"]
    missing = [json.dumps({k: v for k, v in good.items() if k != field}).encode() for field in required]
    # Theirs alone have one field that must be there.
    optional = route in ("/generate", "/v1/chat/interactive")
    missing = [body for body in missing if not optional or b"prompt" not in body]
    raw = [
        json.dumps(good).encode()[:-1] + b', "%s": %s}' % (list(FIELDS[route])[-1].encode(), value)
        for value in (b"NaN", b"1e400", b"1" * 5000, b'"\xff"', b"[" * 5000, b'"\\ud800"', b"-", b"+1", b".5")
    ]
    return NOT_JSON + wrong + missing + raw


@pytest.mark.parametrize("route", GOOD)
def test_hostile_bodies(client: httpx.Client, route: str) -> None:
    bodies = bodies_of(route)
    assert len(bodies) >= 80
    for body in bodies:
        response = client.post(route, content=body, headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500, (body[:200], response.status_code, response.text)
        error_of(response, response.status_code)
        assert len(response.content) < 4096
        assert client.post(route, json=GOOD[route]).status_code == 200


@pytest.mark.parametrize("route", GOOD)
def test_messages_say_what_was_given(client: httpx.Client, route: str) -> None:
    fields = {"/v1/embeddings": "dimensions", "/v1/rerank": "top_n", "/v1/score": "user"}
    given: int | str = 12345678900 if route != "/v1/score" else "12345678900" * 60
    body = GOOD[route] | {fields.get(route, "top_k"): given}
    message = error_of(client.post(route, json=body), 400)["message"]
    assert "12345678900" in message
    assert "<=" in message


@pytest.mark.parametrize("route", GOOD)
@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/msgpack", "x"],
)
def test_content_type(client: httpx.Client, route: str, content_type: str) -> None:
    body = json.dumps(GOOD[route]).encode()
    response = client.post(route, content=body, headers={"Content-Type": content_type})
    assert content_type in error_of(response, 400, "invalid_content_type")["message"]


def test_content_type_may_be_absent_unless_a_page_sends_it(client: httpx.Client) -> None:
    body = json.dumps(GOOD["/generate"]).encode()
    assert client.post("/generate", content=body).status_code == 200
    assert client.post("/generate", content=body, headers={"Content-Type": "Application/JSON; x=y"}).status_code == 200
    response = client.post("/generate", content=body, headers={"Origin": str(client.base_url).rstrip("/")})
    error_of(response, 400, "invalid_content_type")


@pytest.mark.parametrize("route", GOOD)
@pytest.mark.parametrize("size", [MAX_BODY + 1, MAX_BODY * 3])
@pytest.mark.parametrize("chunked", [False, True])
def test_body_too_large(client: httpx.Client, route: str, size: int, chunked: bool) -> None:
    chunk = b" " * 65536
    whole, part = divmod(size, len(chunk))
    parts = [chunk] * whole + [chunk[:part]]
    content: Any = iter(parts) if chunked else b"".join(parts)
    response = client.post(route, content=content, headers={"Content-Type": "application/json"})
    error = error_of(response, 413, "body_too_large")
    assert str(MAX_BODY) in error["message"]
    assert error["max_bytes"] == MAX_BODY
    assert client.post(route, json=GOOD[route]).status_code == 200


MANY = {
    "lists": b'{"prompt": "x", "z": [' + b"[]," * 260_000 + b"1]}",
    "objects": b'{"prompt": "x", "z": [' + b"{}," * 260_000 + b"1]}",
    "numbers": b'{"prompt": "x", "z": [' + b"1," * 2_000_001 + b"1]}",
}


@pytest.mark.parametrize("kind", MANY)
def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(kind: str) -> None:
    class NoDecoder:
        def decode(self, _: bytes) -> Any:
            raise AssertionError("it was parsed")

    with pytest.raises(LmserveError) as caught:
        decode_json(MANY[kind], cast("Any", NoDecoder()))
    assert (caught.value.status, caught.value.code) == (400, "too_many_values")
    assert ("2000000 values" if kind == "numbers" else "250000 lists and objects") in str(caught.value)


def test_a_large_body_is_parsed_without_the_garbage_collector() -> None:
    seen: list[bool] = []

    class Decoder:
        def decode(self, body: bytes) -> bytes:
            seen.append(gc.isenabled())
            return body

    body = b'{"prompt": "' + b"[x], " * 49_000 + b'"}'
    assert decode_json(body, cast("Any", Decoder())) == body
    assert decode_json(b"{}", cast("Any", Decoder())) == b"{}"
    assert seen == [False, True]
    assert gc.isenabled()


def talk(running: Running, request: bytes, *, seconds: float = 10) -> bytes:
    """Everything that the server says to `request` until it closes."""
    with socket.create_connection(running.address, timeout=seconds) as connection:
        connection.sendall(request)
        said = b""
        while chunk := connection.recv(65536):
            said += chunk
        return said


def test_an_announced_giant_is_refused_before_it_is_sent(served: Running) -> None:
    head = (
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
    )
    assert talk(served, head).startswith(b"HTTP/1.1 413 ")
    expecting = head.replace(b"99999999999", b"2000000").replace(b"Host", b"Expect: 100-continue\r\nHost")
    assert talk(served, expecting).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("part", [b"", b'{"prompt"'])
def test_a_body_that_never_arrives(served: Running, part: bytes) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    started = time.monotonic()
    reply = talk(served, head + part)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in reply
    assert b"connection: close" in reply.lower()
    assert time.monotonic() - started >= BODY_TIMEOUT * 0.9


def test_a_client_that_leaves_within_its_body(served: Running) -> None:
    before = served.open_tasks()
    for _ in range(20):
        with socket.create_connection(served.address) as connection:
            connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    wait_until(lambda: served.open_tasks() <= before, "the handlers end")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"HELO mail.example\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"POST /generate HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    ],
)
def test_broken_http(served: Running, client: httpx.Client, request_bytes: bytes) -> None:
    reply = talk(served, request_bytes)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert json.loads(reply.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "invalid_http"
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/models/nobody/at/all", 404),
        ("GET", "/docs/nothing", 404),
        ("GET", "/docs/assets/nothing.js", 404),
        ("GET", "/docs/assets/..%2f__init__.py", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/%00", 404),
        ("GET", "/%ff", 404),
        ("GET", "/generate", 405),
        ("DELETE", "/generate", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("PATCH", "/v1/embeddings", 405),
    ],
)
def test_routes_that_are_not_there(client: httpx.Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    error_of(response, status)
    if status == 405:
        assert response.headers["allow"]


def test_a_strange_host_header(served: Running) -> None:
    reply = talk(served, b"GET /health HTTP/1.1\r\nHost: a b\r\nConnection: close\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":{' in reply
