"""Many clients at once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from conftest import MODEL, Running

from wire import events_of, frames_of

STREAMS = 64


def test_each_of_64_streams_gets_its_own_reply(served: Running) -> None:
    def body(number: int) -> dict[str, Any]:
        length = 1 + number * 3 % 97
        return {"prompt": f"number {number}", "request_output_len": length, "ignore_eos": True, "seed": number}

    async def ask(client: httpx.AsyncClient, number: int, *, stream: bool) -> tuple[str, int]:
        response = await client.post("/generate", json=body(number) | {"stream": stream})
        assert response.status_code == 200
        if not stream:
            reply = response.json()
            return reply["text"], reply["tokens"]
        frames = frames_of(response.content)
        return "".join(frame["text"] for frame in frames), frames[-1]["tokens"]

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:
            alone = [await ask(client, number, stream=False) for number in range(STREAMS)]
            together = await asyncio.gather(*(ask(client, number, stream=number % 3 > 0) for number in range(STREAMS)))
        assert together == alone
        assert [tokens for _, tokens in alone] == [1 + number * 3 % 97 for number in range(STREAMS)]

    asyncio.run(run())
    assert served.engine.open_streams == 0


def test_slow_and_fast_streams_do_not_wait_for_each_other(scripted: Running) -> None:
    async def run() -> list[str]:
        done: list[str] = []

        async def ask(client: httpx.AsyncClient, name: str, prompt: str) -> None:
            body = {"prompt": prompt, "stream": True, "request_output_len": 10}
            frames = frames_of((await client.post("/generate", json=body)).content)
            assert frames[-1]["tokens"] == 10
            done.append(name)

        async with httpx.AsyncClient(base_url=scripted.url, timeout=60) as client:
            slow = asyncio.create_task(ask(client, "slow", "[[pace 0.1]]"))
            await asyncio.sleep(0.05)
            for _ in range(5):
                await ask(client, "fast", "x")
            await slow
        return done

    assert asyncio.run(run()) == ["fast"] * 5 + ["slow"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_reply_read_in_small_pieces_is_whole(served: Running, size: int) -> None:
    body = {"model": MODEL, "messages": "x", "max_tokens": 30, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()

    async def run() -> bytes:
        reader, writer = await asyncio.open_connection(*served.address)
        head = f"POST /v1/chat/completions HTTP/1.0\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        for start in range(0, len(head + data), 40):
            writer.write((head + data)[start : start + 40])
            await writer.drain()
        reply = b""
        while piece := await reader.read(size):
            reply += piece
        writer.close()
        return reply

    head, reply = asyncio.run(run()).split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert len(events_of(dechunked(head, reply))) > 2


def dechunked(head: bytes, body: bytes) -> bytes:
    if b"transfer-encoding: chunked" not in head.lower():
        return body
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        whole += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return whole
