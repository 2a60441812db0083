"""A real server (uvicorn, on a free port, in a thread) over a core."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from litestar import Litestar
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.text import TextLayer
from lmserve.server import Server, bind, server_config, url_of
from scripted_core import MAX_MODEL_LEN

MODEL = "tiny-model"
ALIAS = "internlm-chat-7b"
SLASHED = "owner/tiny-model"
NAMES = [MODEL, ALIAS, SLASHED]
MAX_BODY = 1 << 20
BODY_TIMEOUT = 1.0


class ServerThread:
    """Serves an app until it is left."""

    def __init__(self, app: Litestar) -> None:
        self.listener = bind("127.0.0.1", 0)
        self.url = url_of(self.listener)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._listening = threading.Event()
        app.on_startup.append(self._take_loop)
        self.server = Server(server_config(app), app.state.serving, 0.2, self._listening.set)
        self._thread = threading.Thread(target=self.server.run, args=([self.listener],), name="server")

    async def _take_loop(self) -> None:
        self.loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(30)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@dataclass
class Running:
    """A server that answers at `url`; a test may look into its parts."""

    url: str
    core: Any
    engine: AsyncEngine
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def open_tasks(self) -> int:
        """Tasks on the server's loop, connections' included."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result()


@contextmanager
def serve_core(
    core: Any, text: TextLayer | None = None, *, max_model_len: int = MAX_MODEL_LEN, **options: Any
) -> Iterator[Running]:
    engine = AsyncEngine(core, max_model_len=max_model_len, text=text)
    options = {"max_body": MAX_BODY, "body_timeout": BODY_TIMEOUT} | options
    with ServerThread(create_app(engine, NAMES, **options)) as thread:
        assert thread.loop is not None
        yield Running(thread.url, core, engine, thread.loop)
