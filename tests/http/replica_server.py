"""One of several servers over the formula model that share their sessions: python replica_server.py URL PAUSE."""

from __future__ import annotations

import sys

from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.postgres import PostgresStore
from lmserve.engine.session_store import SharedSessions
from lmserve.engine.text import TextLayer
from lmserve.server import bind, serve
from tiny_engine import MAX_MODEL_LEN, PLAIN, byte_tokenizer, chat_template, formula_engine

TENANTS = {0: bytes(32)}


def main() -> None:
    url, pause = sys.argv[1], float(sys.argv[2])

    def load() -> AsyncEngine:
        shared = SharedSessions(PostgresStore(url, fingerprint=bytes(32), tenants=TENANTS))
        core = formula_engine(pause=pause, said=PLAIN, session_store=shared)
        text = TextLayer(byte_tokenizer(), chat_template())
        return AsyncEngine(core, max_model_len=MAX_MODEL_LEN, text=text, shared=shared)  # type: ignore[arg-type]

    serve(create_app(load, ["tiny-model"]), bind("127.0.0.1", 0), on_listening=tell)


def tell(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
