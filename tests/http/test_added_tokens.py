"""A tokenizer that knows more tokens than the model has embeddings for: what comes to such a token is refused alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import MODEL, Running, serve_core
from lmserve import _core
from lmserve.engine.text import TextLayer
from test_neighbours import neighbour
from tiny_engine import FormulaRunner, byte_tokenizer, chat_template

from wire import error_of

TEXT = "a<extra_1>b"
BEYOND = 258  # the id of <extra_1>; the model has rows for 0 to 257
SAID = [{"role": "user", "content": TEXT}]
REQUESTS: list[tuple[str, dict[str, Any], str | None]] = [
    ("/v1/completions", {"model": MODEL, "prompt": TEXT}, "prompt"),
    ("/v1/completions", {"model": MODEL, "prompt": ["x", TEXT], "stream": True}, "prompt"),
    ("/v1/completions", {"model": MODEL, "prompt": [97, BEYOND]}, "prompt"),
    ("/v1/completions", {"model": MODEL, "prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt"),
    ("/v1/chat/completions", {"model": MODEL, "messages": SAID}, "messages"),
    ("/v1/chat/completions", {"model": MODEL, "messages": SAID, "stream": True, "session_id": 5}, "messages"),
    ("/v1/responses", {"model": MODEL, "input": TEXT}, None),
    ("/v1/messages", {"model": MODEL, "messages": SAID, "max_tokens": 5}, None),
    ("/v1/chat/interactive", {"prompt": TEXT}, None),
    ("/generate", {"prompt": TEXT}, None),
    ("/generate", {"prompt": TEXT, "stream": True}, None),
    ("/v1/embeddings", {"model": MODEL, "input": TEXT}, "input"),
    ("/v1/embeddings", {"model": MODEL, "input": [[97, BEYOND]]}, "input"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    tokenizer = byte_tokenizer(added=("<extra_1>",))
    # The end token has no row either: what holds ends off must not reach for it.
    core = _core.Engine(FormulaRunner(pause=0.001), tokenizer, chat_template(), eos_token_ids=[BEYOND])
    with serve_core(core, TextLayer(tokenizer, chat_template())) as running:
        yield running


def test_every_route_refuses_it_and_neighbours_go_on(server: Running) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            alone = await neighbour(client, asyncio.Event())
            started = asyncio.Event()
            beside = asyncio.create_task(neighbour(client, started))
            await started.wait()
            for path, body, param in REQUESTS:
                error = error_of(await client.post(path, json=body), 400, None, param)
                assert str(BEYOND) in error["message"], (path, error)
                assert "258)" in error["message"], (path, error)
            assert await beside == alone
        assert alone[-1][-1] == "length"

    asyncio.run(run())


def test_an_end_token_without_a_row_never_reaches_the_sampler(server: Running) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body: dict[str, Any] = {"model": MODEL, "prompt": "Hello", "max_tokens": 8, "min_tokens": 4}
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 8
        schema = {"name": "n", "schema": {"const": 1}}
        guided = body | {"response_format": {"type": "json_schema", "json_schema": schema}}
        assert client.post("/v1/completions", json=guided).json()["choices"][0]["text"] == "1"
