"""The server that `lmserve serve` starts, and what it tells the person who started it."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from lmserve import loading
from lmserve._core import explain_bus_errors
from lmserve.api.http.edge import is_loopback
from lmserve.api.responses.log import ResponseLog
from lmserve.api.responses.store import ResponseStore
from lmserve.api.state.database import Database
from lmserve.app import create_app
from lmserve.cli.errors import CommandError
from lmserve.cli.members import members_of
from lmserve.cli.models import tell
from lmserve.cli.plan_view import plan_lines
from lmserve.cli.progress import DownloadProgress
from lmserve.cli.terminal import UNDER_VALUES, fitted
from lmserve.cli.tracing import open_tracing
from lmserve.config import ServeConfig
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.load import ModelPlan
from lmserve.errors import LmserveError
from lmserve.server import BindError, Tls, TlsError, bind, heard_signals, serve
from lmserve.source import SourceError, find_model

if TYPE_CHECKING:
    from lmserve.api.http.tracing import Tracing

logger = logging.getLogger("lmserve.http")


def serve_model(config: ServeConfig) -> None:
    """Serve until a signal ends it. Raises CommandError if the model cannot be found or run, or the port is taken."""
    _log_to_stderr(config.log_level, config.request_log)
    _obey_signals()
    tracing = open_tracing(config.otlp_endpoint)
    try:
        tls = None if config.tls_cert is None or config.tls_key is None else Tls(config.tls_cert, config.tls_key)
        if config.models or config.idle_unload:
            _serve_several(config, tls, tracing)
            return
        source = find_model(config.model, DownloadProgress("the model"), tell)
        plan = loading.load(lambda: ModelPlan(source.path, config, source.published))
        names = config.served_model_names or source.names
        for line in plan_lines(plan, names):
            _print(line)

        responses = _response_store(config)
        database = Database(config.session_dir, config.keyring.durable_names(), config.session_fsync)

        def load() -> AsyncEngine:
            started = time.monotonic()
            try:
                engine = plan.load_async_engine()
                _restore(responses, database, engine)
            except (OSError, MemoryError, RuntimeError) as error:
                raise CommandError(f"the model could not be loaded: {error}") from error
            _print(f"Ready after {time.monotonic() - started:.1f} s. Ctrl-C stops the server.")
            return engine

        agent_sessions = config.agent_sessions == "on"
        common = _app_options(config, tracing)
        stores: dict[str, Any] = {"responses": responses, "database": database}
        adapters = [name for name, _ in config.loras]
        app = create_app(
            load, names, agent_sessions=agent_sessions, adapters=adapters, lora_dir=config.lora_dir, **stores, **common
        )
        listener, limit = bind(config.host, config.port), config.max_body
        serve(app, listener, tls=tls, grace=config.grace, max_message=limit, on_listening=_print_urls)
    except (SourceError, LmserveError, BindError, TlsError) as error:
        raise CommandError(str(error.strerror) if isinstance(error, BindError) else str(error)) from error
    finally:
        if tracing is not None:
            tracing.close()


def _serve_several(config: ServeConfig, tls: Tls | None, tracing: Tracing | None) -> None:
    with members_of(config, _print) as members:
        app = create_app(members, **_app_options(config, tracing))
        listener = bind(config.host, config.port)
        limit = config.max_body
        serve(app, listener, tls=tls, grace=config.grace, max_message=limit, on_listening=_print_urls_on_demand)


def _app_options(config: ServeConfig, tracing: Tracing | None) -> dict[str, Any]:
    return {
        "keys": config.keyring,
        "cors_origins": config.cors_origins,
        "allowed_hosts": allowed_hosts(config),
        "request_log": config.request_log,
        "tracing": tracing,
        "max_body": config.max_body,
    }


def _obey_signals() -> None:
    """Until the server has handlers of its own, what ends it in order then ends the process with the same exit code.

    A bus error says what it means.
    """
    if threading.current_thread() is threading.main_thread():
        for number in heard_signals():
            signal.signal(number, _end)
        explain_bus_errors()


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def allowed_hosts(config: ServeConfig) -> tuple[str, ...] | None:
    """None: any. A page can let its own name mean this machine (DNS rebinding), but the browser sends that name."""
    if config.allowed_hosts or (is_loopback(config.host) and not config.keyring):
        return (*config.allowed_hosts, config.host)
    return None


def _response_store(config: ServeConfig) -> ResponseStore:
    if config.session_dir is None:
        return ResponseStore()
    log = ResponseLog(config.session_dir, config.keyring.durable_names())
    return ResponseStore(log, config.session_fsync)


def _restore(responses: ResponseStore, database: Database, engine: AsyncEngine) -> None:
    """The folder is this server's once the engine has it."""
    try:
        count = responses.restore()
        database.open()
    except BaseException:
        engine.stop()
        raise
    if count:
        logger.info("%d stored responses were restored", count)


def _print_urls(url: str) -> None:
    _print(f"API       {url}")
    _print(f"Docs      {url}/docs")
    _print("Loading the model ...")


def _print_urls_on_demand(url: str) -> None:
    _print(f"API       {url}")
    _print(f"Docs      {url}/docs")
    _print("Ready. A model is loaded when a request asks for it. Ctrl-C stops the server.")


def _print(line: str) -> None:
    # Flushed: whoever waits for it may read through a pipe. In one write: the thread that loads the model prints, too.
    print(f"{fitted(line, sys.stdout, UNDER_VALUES)}\n", end="", flush=True)


def _log_to_stderr(level: str, request_log: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if request_log != "off":
        # Its lines say who left, too.
        logging.getLogger("lmserve.access").setLevel(logging.WARNING)
    if request_log == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        requests = logging.getLogger("lmserve.requests")
        requests.addHandler(handler)
        requests.propagate = False
    if level != "debug":
        # What they say below that, the lines above say already.
        for name in ("uvicorn", "httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
