"""AsyncEngine on its own: from asyncio, on one loop after another, and in another ASGI app."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import MODEL, ServerThread
from litestar import Litestar, asgi, get
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import Messages, SamplingParams, StopParams, Submission, Tokens, Turn
from lmserve.errors import LmserveError
from lmserve.model.generation_defaults import GenerationDefaults
from scripted_core import MAX_MODEL_LEN, ScriptedCore
from tiny_engine import formula_engine


@pytest.fixture
def core() -> Iterator[ScriptedCore]:
    core = ScriptedCore()
    yield core
    core.shutdown(0)


def turn(text: str, **fields: Any) -> Submission:
    return Submission(route="generate", input=Turn(text), **fields)


def engine_of(core: ScriptedCore) -> AsyncEngine:
    return AsyncEngine(core, max_model_len=MAX_MODEL_LEN)


def test_stream_and_body_hold_the_same_text(core: ScriptedCore) -> None:
    async def run() -> tuple[str, str]:
        engine = engine_of(core)
        stream = engine.submit(turn("x", stream=True))
        await stream.opened()
        frames = b"".join([chunk async for chunk in stream.chunks()]).split(b"\0")[:-1]
        body = await engine.submit(turn("x")).body()
        engine.close()
        return "".join(json.loads(frame)["text"] for frame in frames), json.loads(body)["text"]

    streamed, whole = asyncio.run(run())
    assert streamed == whole


def test_a_request_that_leaves_sampling_out_gets_the_models_own(core: ScriptedCore) -> None:
    defaults = GenerationDefaults("x", temperature=0.2, top_p=0.9, max_tokens=512)

    async def run() -> None:
        engine = AsyncEngine(core, max_model_len=MAX_MODEL_LEN, defaults=defaults)
        await engine.submit(turn("x")).body()
        await engine.submit(
            turn("x", sampling=SamplingParams(temperature=1.0), stopping=StopParams(max_tokens=3))
        ).body()
        engine.close()

    asyncio.run(run())
    left_out, given = core.submitted[-2:]
    assert left_out["sampling"] == {"temperature": 0.2, "top_p": 0.9}
    assert left_out["stopping"] == {"default_max_tokens": 512}
    assert given["sampling"] == {"temperature": 1.0, "top_p": 0.9}
    assert given["stopping"] == {"max_tokens": 3}


def test_one_engine_serves_one_loop_after_another(core: ScriptedCore) -> None:
    engine = engine_of(core)

    async def ask() -> bytes:
        return await engine.submit(turn("x")).body()

    assert asyncio.run(ask()) == asyncio.run(ask())

    async def clash() -> None:
        await ask()
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, ask())
        engine.close()

    asyncio.run(clash())


def test_no_future_and_no_stream_is_left(core: ScriptedCore) -> None:
    async def run() -> asyncio.AbstractEventLoop:
        engine = engine_of(core)
        for number in range(100):
            stream = engine.submit(turn("[[hold]]", stream=True))
            if number % 2:
                await stream.opened()
            waiting = asyncio.ensure_future(anext(stream.chunks(), None))
            await asyncio.sleep(0)
            if number % 3:
                waiting.cancel()
            stream.abort()
            stream.abort()
            assert stream.aborted
            await asyncio.wait([waiting])
        assert engine.open_streams == 0
        assert len(asyncio.all_tasks()) == 1
        engine.close()
        return asyncio.get_running_loop()

    loop = asyncio.run(run())
    gc.collect()
    futures = [o for o in gc.get_objects() if issubclass(type(o), asyncio.Future) and o.get_loop() is loop]
    assert not [future for future in futures if not future.done()]


def test_abort_wakes_whoever_waits(core: ScriptedCore) -> None:
    async def run() -> None:
        engine = engine_of(core)
        for prompt in ("[[wait 60]]", "[[hold]]"):
            stream = engine.submit(turn(prompt))
            body = asyncio.ensure_future(stream.body())
            await asyncio.sleep(0.01)
            stream.abort()
            with pytest.raises(LmserveError) as left:
                await body
            assert left.value.status == 499
        stream = engine.submit(turn("[[wait 60]]", stream=True))
        stream.abort()
        with pytest.raises(LmserveError):
            await stream.opened()
        assert [chunk async for chunk in stream.chunks()] == []
        engine.close()

    asyncio.run(run())


def test_errors_are_raised_where_they_belong(core: ScriptedCore) -> None:
    async def run() -> None:
        engine = engine_of(core)
        with pytest.raises(LmserveError) as refused:
            engine.submit(turn("[[refuse 429 queue_full]]"))
        assert refused.value.retry_after == 3
        with pytest.raises(LmserveError) as failed:
            await engine.submit(turn("[[fail early]]", stream=True)).opened()
        assert failed.value.status == 500
        with pytest.raises(LmserveError):
            await engine.submit(turn("[[fail late]]")).body()
        assert engine.open_streams == 0
        engine.close()

    asyncio.run(run())


def test_shutdown_hands_out_the_last_bytes() -> None:
    async def run() -> bytes:
        engine = engine_of(ScriptedCore())
        stream = engine.submit(turn("[[hold]]", stream=True))
        await stream.opened()
        shutdown = asyncio.ensure_future(engine.shutdown(0))
        said = b"".join([chunk async for chunk in stream.chunks()])
        await shutdown
        return said

    assert b'"finish_reason": "abort"' in asyncio.run(run())


def test_under_a_prefix_of_a_bare_asgi_host(core: ScriptedCore, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = create_app(engine_of(core), [MODEL])

    async def host(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].startswith("/llm/"):
            await inner(scope | {"root_path": "/llm"}, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"own"})

    async def ask() -> None:
        transport = httpx.ASGITransport(host)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            assert (await client.get("/own")).text == "own"
            page = await client.get("/llm/docs")
            files = re.findall(r'(?:href|src)="([^"]+)"', page.text)
            assert len(files) == 4
            for path in (*files, "/llm/openapi.json", "/llm/health"):
                assert path.startswith("/llm/")
                assert (await client.get(path)).status_code == 200
            reply = await client.post("/llm/generate", json={"prompt": "x", "request_output_len": 3})
            assert reply.json()["tokens"] == 3
            assert (await client.get("/llm/nothing")).json()["error"]["code"] == "route_not_found"

    def refuse(*_: object) -> None:
        raise AssertionError("an embedded engine leaves signals and sockets alone")

    async def run() -> None:
        monkeypatch.setattr(signal, "signal", refuse)
        monkeypatch.setattr(socket.socket, "bind", refuse)
        monkeypatch.setattr(socket.socket, "listen", refuse)
        await ask()
        monkeypatch.undo()

    asyncio.run(run())


def test_in_another_asgi_app(core: ScriptedCore) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    inner = create_app(engine_of(core), [MODEL])

    @asgi("/llm", is_mount=True, copy_scope=True)
    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope | {"root_path": "", "path": scope["path"].rstrip("/")}, receive, send)

    @get("/own")
    async def own() -> str:
        return "own"

    outer = Litestar([mounted, own], logging_config=None)
    outer.state.serving = inner.state.serving  # what the test's server thread looks for
    with ServerThread(outer) as thread, httpx.Client(base_url=thread.url) as client:
        assert client.get("/own").text == "own"
        assert client.get("/llm/health").json() == {"status": "ok"}
        assert client.post("/llm/generate", json={"prompt": "x", "request_output_len": 3}).json()["tokens"] == 3
        body = {"model": MODEL, "messages": "x", "stream": True}
        assert client.post("/llm/v1/chat/completions", json=body).content.endswith(b"data: [DONE]\n\n")
        assert client.post("/llm/generate", content=b"[").status_code == 400
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_session_is_appended_to() -> None:
    core = formula_engine()

    async def run() -> tuple[int, list[list[int]]]:
        engine = AsyncEngine(core, max_model_len=core.context_length)
        with pytest.raises(LmserveError, match="session talk does not exist"):
            await engine.append_session(0, "talk", Turn("one"))
        await engine.append_session(0, "talk", Turn("one"), create=True)
        await engine.append_session(0, "talk", Messages([{"role": "user", "content": "two"}]))
        await engine.append_session(0, "talk", Tokens([65, 66]))
        turns = await engine.session_transcript(0, "talk")
        assert turns[-1].input_ids[-2:] == [65, 66]
        info = engine.session_info(0, "talk")
        engine.close()
        return info.turns, [turn.output_ids for turn in turns]

    try:
        assert asyncio.run(run()) == (3, [[], [], []])
    finally:
        core.shutdown(0)
