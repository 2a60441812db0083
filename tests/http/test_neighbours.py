"""A request's tokens are its own, whatever others send meanwhile."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from conftest import MODEL, Running
from tiny_engine import MAX_MODEL_LEN

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
SEEDED = {
    "model": MODEL,
    "prompt": "A seeded neighbour",
    "max_tokens": 1500,
    "seed": 77,
    "logprobs": 1,
    "ignore_eos": True,
    "stream": True,
}
HELLO = [{"role": "user", "content": "Hello"}]

# What the HTTP layer refuses, and what only the core can.
BAD: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"model": MODEL, "prompt": [258]}),
    (COMPLETIONS, {"model": MODEL, "prompt": [[65], [2**31 - 1]]}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "logit_bias": {"258": 100}}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "logit_bias": {"2147483647": -100}, "stream": True}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "stop_token_ids": [300], "min_tokens": 5}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x" * (MAX_MODEL_LEN + 1)}),
    (COMPLETIONS, {"model": MODEL, "prompt": ["x", "y", "x" * MAX_MODEL_LEN], "n": 3}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "max_tokens": -2}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "n": 65}),
    (COMPLETIONS, {"model": MODEL, "prompt": "", "stream": True}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "temperature": 1e300}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "logprobs": 21}),
    (CHAT, {"model": MODEL, "messages": HELLO, "logit_bias": {"258": 1}}),
    (CHAT, {"model": MODEL, "messages": HELLO, "stop_token_ids": [2**31 - 1]}),
    (CHAT, {"model": MODEL, "messages": HELLO, "max_tokens": -2}),
    (CHAT, {"model": MODEL, "messages": HELLO, "n": 2, "session_id": 9}),
    (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": "x" * MAX_MODEL_LEN}], "stream": True}),
    (CHAT, {"model": MODEL, "messages": HELLO, "tools": [{"type": "function"}]}),
    (COMPLETIONS, {"model": MODEL, "prompt": ["x"] * 256, "best_of": 64}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x" * MAX_MODEL_LEN, "echo": True, "logprobs": 20, "prompt_logprobs": 20}),
    ("/v1/responses", {"model": MODEL, "input": "x" * MAX_MODEL_LEN, "stream": True}),
    ("/v1/messages", {"model": MODEL, "messages": HELLO, "max_tokens": 0}),
    ("/v1/chat/interactive", {"prompt": "x" * MAX_MODEL_LEN}),
    ("/generate", {"prompt": "x", "instance_id": 424242, "sequence_start": False}),
    ("/generate", {"prompt": "x" * MAX_MODEL_LEN, "stream": True}),
]
ROUNDS = 8


async def neighbour(client: httpx.AsyncClient, started: asyncio.Event) -> list[Any]:
    """Text, tokens and log-probabilities of the seeded request; `started` once its first chunk is here."""
    said: list[Any] = []
    async with client.stream("POST", COMPLETIONS, json=SEEDED) as response:
        async for line in response.aiter_lines():
            started.set()
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                logprobs = choice["logprobs"]
                said.append((choice["text"], logprobs["tokens"], logprobs["token_logprobs"], choice["finish_reason"]))
    return said


async def refused(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    response = await client.post(path, json=body)
    assert 400 <= response.status_code < 500, (path, body, response.text)
    assert response.json()["error"]["message"]


def test_bad_requests_do_not_change_a_neighbours_tokens(real: Running) -> None:
    async def run() -> None:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=real.url, timeout=120, limits=limits) as client:
            alone = await neighbour(client, asyncio.Event())
            started = asyncio.Event()
            beside = asyncio.create_task(neighbour(client, started))
            await started.wait()
            await asyncio.gather(*(refused(client, path, body) for _ in range(ROUNDS) for path, body in BAD))
            assert await beside == alone
        assert alone[-1][-1] == "length"
        assert sum(len(tokens) for _, tokens, _, _ in alone) == SEEDED["max_tokens"]

    assert len(BAD) * ROUNDS == 200
    asyncio.run(run())
    assert real.engine.open_streams == 0
