"""Texts that cannot fit: refused by their bytes on every route, and nobody waits for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import MODEL, Running, serve_core
from lmserve import LmserveError, _core
from lmserve.engine.submission import EmbedSubmission, StopParams, Submission, Text, TextInput, encode
from lmserve.engine.text import TextLayer
from tiny_engine import EOS, MAX_MODEL_LEN, SPECIAL, FormulaRunner, byte_characters, byte_tokenizer, chat_template

from wire import error_of, wait_until

LONG = "1" * 8_000_000
LONGEST = max(map(len, SPECIAL))
HELLO: Any = [{"role": "user", "content": LONG}]

REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": LONG, "max_tokens": 1},
    "/v1/chat/completions": {"model": MODEL, "messages": HELLO},
    "/generate": {"prompt": LONG},
    "/v1/chat/interactive": {"prompt": LONG},
    "/v1/messages": {"model": MODEL, "messages": HELLO, "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": HELLO},
    "/v1/responses": {"model": MODEL, "input": LONG},
    "/v1/embeddings": {"model": MODEL, "input": LONG},
    "/v1/score": {"model": MODEL, "text_1": LONG, "text_2": "a"},
    "/v1/rerank": {"model": MODEL, "query": "a", "documents": ["b", LONG]},
    "/tokenize": {"model": MODEL, "prompt": LONG},
    "/v1/encode": {"input": ["a", LONG]},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    tokenizer = byte_tokenizer()
    core = _core.Engine(FormulaRunner(), tokenizer, chat_template(), eos_token_ids=[EOS])
    with serve_core(core, TextLayer(tokenizer, chat_template()), max_body=16 << 20, body_timeout=60.0) as running:
        yield running


@pytest.mark.parametrize("route", REQUESTS)
def test_a_text_that_cannot_fit_is_refused_by_its_bytes(server: Running, route: str) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        response = client.post(route, json=REQUESTS[route])
    if route.startswith("/v1/messages"):
        assert response.status_code == 400
        message = response.json()["error"]["message"]
    else:
        message = error_of(response, 400, "context_length_exceeded")["message"]
    # What its bytes say, and not what it comes to: nothing was tokenized.
    at_least = [int(word) for word in message.split() if word.isdigit() and int(word) > MAX_MODEL_LEN]
    assert len(at_least) == 1
    assert math.ceil(len(LONG) / LONGEST) <= at_least[0] < len(LONG) / LONGEST + 100


def slow_tokenizer() -> _core.Tokenizer:
    """One that sets no bound by bytes and cannot work in pieces: a long text takes it long, and then does not fit."""
    own = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    # Whatever the text, one token may take the space around it.
    around = {"id": 256, "content": "<mask>", "special": True, "normalized": False}
    description = {
        "version": "1.0",
        "added_tokens": [around | {"single_word": False, "lstrip": True, "rstrip": True}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [own, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {char: at for at, char in enumerate(byte_characters())}, "merges": []},
    }
    return _core.Tokenizer.from_json(json.dumps(description).encode())


def ended(stream: _core.Stream) -> bool:
    try:
        return stream.poll()[0] == 2
    except LmserveError:
        return True


def code_of(stream: _core.Stream) -> object:
    while True:
        try:
            assert stream.poll()[0] != 2
        except LmserveError as error:
            return error.error["code"]


def slow_engine() -> _core.Engine:
    return _core.Engine(FormulaRunner(), slow_tokenizer(), None, eos_token_ids=[EOS])


def long_request(*, embed: bool = False) -> bytes:
    text = "1" * 1_000_000
    if embed:
        return encode(EmbedSubmission(model="m", inputs=[TextInput(text)]))
    return encode(Submission(input=Text(text), route="completions"))


def test_a_short_request_does_not_wait_for_long_ones() -> None:
    engine = slow_engine()
    one_token = Submission(input=Text("a"), route="completions", stopping=StopParams(max_tokens=1))
    long = [engine.submit(long_request()) if at % 2 else engine.embed(long_request(embed=True)) for at in range(20)]
    short = engine.submit(encode(one_token))
    while not ended(short):
        pass
    # Two threads do nothing but long texts; most of these have not begun.
    assert not all(map(ended, long))
    engine.shutdown(0.0)
    assert {code_of(stream) for stream in long} <= {"context_length_exceeded", "engine_unavailable"}
    assert code_of(long[-1]) == "engine_unavailable"


def test_a_client_that_left_is_not_tokenized_for() -> None:
    engine = slow_engine()
    long = [engine.submit(long_request()) for _ in range(20)]
    for stream in long[:-1]:
        stream.abort()
    # The last one's turn comes as soon as those in work are done, but for one on another thread.
    assert code_of(long[-1]) == "context_length_exceeded"
    wait_until(lambda: engine.stats()["open_requests"] == 0, "the last one in work is done")
    engine.shutdown(0.0)


def test_twenty_long_texts_beside_a_request_of_one_token(server: Running) -> None:
    body = json.dumps(REQUESTS["/v1/completions"])

    def send(_: int) -> int:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            return client.post(
                "/v1/completions", content=body, headers={"content-type": "application/json"}
            ).status_code

    with ThreadPoolExecutor(20) as pool, httpx.Client(base_url=server.url, timeout=60) as client:
        long = [pool.submit(send, at) for at in range(20)]
        short = client.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1})
        assert short.status_code == 200
        assert [future.result() for future in long] == [400] * 20
