"""What load balancers and orchestrators are told of an engine that stands still, and of one that is dead."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import MODEL, NAMES, Running, ServerThread, serve_core
from lmserve import LmserveError, _core
from lmserve.api.responses.log import ResponseLog
from lmserve.api.responses.store import ResponseStore
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.model.interface import LogitEdits
from lmserve.server import bind, serve
from scripted_core import MAX_MODEL_LEN, ScriptedCore
from tiny_engine import EOS, FormulaRunner, byte_tokenizer, chat_template

from wire import error_of, wait_until

ASK = {"model": MODEL, "prompt": "Hello", "max_tokens": 3}
ROUTES = ("/health", "/health/ready", "/health/live")


class FreezingRunner(FormulaRunner):
    """Makes no step while it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.going = threading.Event()
        self.going.set()

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        self.going.wait()
        super().launch(n_tokens, n_seqs, n_rows, edits)


@pytest.fixture
def runner() -> Iterator[FreezingRunner]:
    runner = FreezingRunner()
    yield runner
    runner.going.set()


def gauge(client: httpx.Client, name: str) -> int:
    [value] = re.findall(rf"^{name}(?:{{.*}})? (\d+)$", client.get("/metrics").text, re.MULTILINE)
    return int(value)


def test_an_engine_that_stands_still_says_so_until_it_goes_on(runner: FreezingRunner) -> None:
    core = _core.Engine(runner, byte_tokenizer(), chat_template(), eos_token_ids=[EOS], stall_seconds=0.05)
    with serve_core(core) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        for route in ROUTES:
            assert client.get(route).json() == {"status": "ok"}
        runner.going.clear()
        asking = threading.Thread(target=client.post, args=("/v1/completions",), kwargs={"json": ASK})
        asking.start()
        try:
            stalled_says_so(client)
        finally:
            runner.going.set()
        asking.join()
        wait_until(lambda: client.get("/health").status_code == 200, "the engine goes on")
        assert gauge(client, "lmserve_healthy") == 1


def stalled_says_so(client: httpx.Client) -> None:
    wait_until(lambda: client.get("/health").status_code == 503, "the engine stands still")
    for route in ROUTES[:2]:
        error = error_of(client.get(route), 503, "engine_stalled")
        assert "no step for" in error["message"]
    # It may go on by itself.
    assert client.get("/health/live").status_code == 200
    assert gauge(client, "lmserve_healthy") == 0
    assert gauge(client, "lmserve_step_wait_milliseconds") >= 50


FULL = ("storage_full", "the session log has no room on its disk")


def test_a_log_that_cannot_be_written_degrades_the_server(caplog: pytest.LogCaptureFixture) -> None:
    core = ScriptedCore()

    def told(words: str) -> int:
        return sum(words in record.getMessage() for record in caplog.records)

    # No request wakes the engine's loop.
    with serve_core(core) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        core.fault = FULL
        wait_until(lambda: told("turns of sessions are refused (storage_full)") > 0, "the fault is logged")
        for route in (*ROUTES[:2], "/ping"):
            response = client.get(route)
            assert response.status_code == 200
            assert response.json() == {"status": "degraded", "faults": [{"code": FULL[0], "message": FULL[1]}]}
        assert client.get("/health/live").json() == {"status": "ok"}
        assert client.post("/v1/completions", json=ASK).status_code == 200
        core.fault = None
        wait_until(lambda: told("the session log can be written again") > 0, "the end of the fault is logged")
        assert client.get("/health").json() == {"status": "ok"}
    assert told("storage_full") == 1
    assert told("written again") == 1


def test_a_log_of_responses_that_cannot_be_written_degrades_the_server(tmp_path: Path) -> None:
    store = ResponseStore(ResponseLog(tmp_path, {0: bytes(32)}))
    assert store.restore() == 0
    log = tmp_path / "responses.log"
    body = {"model": MODEL, "input": "Hello"}
    with (
        serve_core(ScriptedCore(), responses=store) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        log.unlink()
        log.write_bytes(b"another's")
        assert client.post("/v1/responses", json=body).status_code == 200
        wait_until(lambda: client.get("/health").json()["status"] == "degraded", "the fault is told")
        [fault] = client.get("/health").json()["faults"]
        assert fault["code"] == "storage_failed"
        assert fault["message"].startswith("the log of responses cannot be written")
        assert gauge(client, "lmserve_response_log_faulty") == 1
        log.unlink()
        wait_until(lambda: client.get("/health").json() == {"status": "ok"}, "the log is written anew")
        assert gauge(client, "lmserve_response_log_faulty") == 0


class DyingCore(ScriptedCore):
    """Its thread ends when it is told to."""

    dead = False

    def check_health(self) -> None:
        if self.dead:
            raise LmserveError.new(503, "engine_unavailable", "the engine is down: its thread panicked")


def test_a_dead_engine_ends_the_server_with_an_error() -> None:
    core = DyingCore()
    engine = AsyncEngine(core, max_model_len=MAX_MODEL_LEN)
    listening: list[str] = []
    found: list[BaseException] = []

    def run() -> None:
        try:
            serve(create_app(engine, NAMES), bind("127.0.0.1", 0), on_listening=listening.append)
        except LmserveError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: bool(listening), "the server listens")
    assert httpx.get(f"{listening[0]}/health/live").status_code == 200
    core.dead = True
    thread.join()
    [error] = found
    # `lmserve serve` prints it and ends with exit code 1.
    assert "its thread panicked" in str(error)


def test_a_dead_engine_is_told_at_once(running_dead: Running) -> None:
    with httpx.Client(base_url=running_dead.url) as client:
        for route in ROUTES:
            error_of(client.get(route), 503, "engine_unavailable")


@pytest.fixture
def running_dead() -> Iterator[Running]:
    """Before the server has looked: it would end."""
    core = DyingCore()
    engine = AsyncEngine(core, max_model_len=MAX_MODEL_LEN)
    app = create_app(engine, NAMES)
    app.state.serving.has_failed = lambda: False
    with ServerThread(app) as thread:
        assert thread.loop is not None
        core.dead = True
        yield Running(thread.url, core, engine, thread.loop)
