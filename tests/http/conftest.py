"""A real server (uvicorn, on a free port, in a thread) over a scripted core."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import httpx
import pytest
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.server import Server, bind, server_config, url_of
from scripted_core import MAX_MODEL_LEN, ScriptedCore

MODEL = "tiny-model"
ALIAS = "internlm-chat-7b"
NAMES = [MODEL, ALIAS, "owner/tiny-model"]


@dataclass
class Running:
    """A server that answers at `url`; the test may look into its parts."""

    url: str
    host: str
    port: int
    core: ScriptedCore
    engine: AsyncEngine
    server: Server
    loop: asyncio.AbstractEventLoop

    def open_tasks(self) -> int:
        """Tasks on the server's loop."""
        return asyncio.run_coroutine_threadsafe(_count_tasks(), self.loop).result()


async def _count_tasks() -> int:
    return len(asyncio.all_tasks()) - 1


class ServerThread:
    """Serves an app until it is left."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.listener = bind("127.0.0.1", 0)
        self._listening = threading.Event()
        serving = app.state.serving
        self.server = Server(server_config(app), serving, 0.2, self._listening.set)
        self._thread = threading.Thread(target=self._run, name="server")

    def _run(self) -> None:
        self.server.run(sockets=[self.listener])

    def __enter__(self) -> Self:
        self.url = url_of(self.listener)
        self._thread.start()
        assert self._listening.wait(30)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    """The server that most tests share."""
    core = ScriptedCore()
    engine = AsyncEngine(core, max_model_len=MAX_MODEL_LEN)
    loops: list[asyncio.AbstractEventLoop] = []
    app = create_app(engine, NAMES, max_body=1 << 20, body_timeout=1.0)
    app.on_startup.append(lambda: loops.append(asyncio.get_running_loop()))
    with ServerThread(app) as thread:
        host, port = thread.listener.getsockname()[:2]
        yield Running(thread.url, host, port, core, engine, thread.server, loops[0])


@pytest.fixture
def url(running: Running) -> str:
    return running.url


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client
