"""A durable server over the formula model in a process of its own, to be killed: python durable_server.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from lmserve import _core
from lmserve.api.responses.log import ResponseLog
from lmserve.api.responses.store import ResponseStore
from lmserve.api.state.database import Database
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.sessions import SessionLog
from lmserve.engine.text import TextLayer
from lmserve.server import bind, serve
from tiny_engine import MAX_MODEL_LEN, PLAIN, byte_tokenizer, chat_template, formula_engine

TENANTS = {0: bytes(32)}


def main() -> None:
    folder = Path(sys.argv[1])
    settings = SessionLog(folder=str(folder), fingerprint=bytes(32), model="formula", tenants=TENANTS, fsync="never")
    responses = ResponseStore(ResponseLog(folder, TENANTS), "never")
    database = Database(folder, TENANTS, "never")

    def load() -> AsyncEngine:
        core = formula_engine(pause=0.002, said=PLAIN, session_log=_core.OpenSessionLog(settings))
        responses.restore()
        database.open()
        text = TextLayer(byte_tokenizer(), chat_template())
        return AsyncEngine(core, max_model_len=MAX_MODEL_LEN, text=text)  # type: ignore[arg-type]

    app = create_app(load, ["tiny-model"], responses=responses, database=database)
    serve(app, bind("127.0.0.1", 0), on_listening=tell)


def tell(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
