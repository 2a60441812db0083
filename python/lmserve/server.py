"""Runs the application in uvicorn, with its socket and signals, for `lmserve serve`."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from lmserve.api.http.serving import Serving
from lmserve.connection import Connection

if TYPE_CHECKING:
    from litestar import Litestar

KEEP_ALIVE: Final = 75  # seconds that an idle connection may live
CLOSING_TIMEOUT: Final = 1  # seconds for clients to take what the engine had written when it stopped
# The engine thread waits for the interpreter lock once a step, by default for up to 5 ms each time.
SWITCH_INTERVAL: Final = 5e-5
MAX_MESSAGE: Final = 32 * 1024 * 1024
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TlsError(ValueError):
    """The certificate or its key cannot be used; the message says why."""


class BindError(OSError):
    """The address cannot be listened on; the message says why."""


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 is any free one. Raises BindError."""
    if not 0 <= port <= 65535:
        raise BindError(errno.EINVAL, f"the port must lie in [0, 65535], but {port} was given")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except socket.gaierror as error:
        raise BindError(error.errno, f"{host!r} is not an address of this machine: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use; choose another, or 0 for any free one"
        else:
            message = f"the server cannot listen on {host}:{port}: {error.strerror}"
        raise BindError(error.errno, message) from error


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """`http://host:port` with the port that it really has."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@dataclass(frozen=True, slots=True)
class Tls:
    """A certificate with its chain, and its key: files in PEM. Raises TlsError if they cannot be used."""

    cert: Path
    key: Path

    def __post_init__(self) -> None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key, password=_no_password)
        except ssl.SSLError as error:
            raise TlsError(f"{self.cert} and {self.key} are not a certificate and its key: {error.reason}") from error
        except OSError as error:
            raise TlsError(f"{self.cert} or {self.key} cannot be read: {error.strerror}") from error


def _no_password() -> str:
    raise TlsError("the key is encrypted; decrypt it first")


def heard_signals() -> list[signal.Signals]:
    """Signals that end a server in order."""
    # nohup ignores SIGHUP, and so its server does.
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def serve(
    app: Litestar,
    listener: socket.socket,
    *,
    tls: Tls | None = None,
    grace: float = 1.0,
    max_message: int = MAX_MESSAGE,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, then return.

    New requests are then refused (503 draining) and running turns have `grace` seconds; a second signal ends the
    process at once. `max_message`: bytes of a WebSocket's message. `on_listening` is called with the URL.
    Raises what the app's engine loader raised, if it did.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    serving: Serving = app.state.serving
    url = url_of(listener, "http" if tls is None else "https")
    config = server_config(app, tls, max_message)
    server = Server(config, serving, grace, lambda: on_listening and on_listening(url))
    server.run(sockets=[listener])
    if serving.failure is not None:
        raise serving.failure


def server_config(app: Litestar, tls: Tls | None = None, max_message: int = MAX_MESSAGE) -> uvicorn.Config:
    """uvicorn's settings for an app of lmserve. `max_message`: bytes of a WebSocket's message."""
    return uvicorn.Config(
        app,
        http=Connection,
        loop="uvloop",
        # Messages of a socket are bodies of requests, and are not compressed: one could be a bomb.
        ws="websockets-sansio",
        ws_max_size=max_message,
        ws_max_queue=1,
        ws_per_message_deflate=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ssl_certfile=None if tls is None else tls.cert,
        ssl_keyfile=None if tls is None else tls.key,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=CLOSING_TIMEOUT,
    )


class Server(uvicorn.Server):
    """uvicorn, told when the engine fails, and stopped in two steps: first the engine, then the connections."""

    def __init__(self, config: uvicorn.Config, serving: Serving, grace: float, on_listening: Callable[[], Any]) -> None:
        super().__init__(config)
        self._serving = serving
        self._grace = grace
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop: on a signal, without a model, or with an engine that is dead. Ten times a second."""
        self._serving.tell_of_storage()
        return await super().on_tick(counter) or self._serving.has_failed()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer 503 while running turns end, then close."""
        await self._serving.drain(self._grace)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a graceful end is not turned into a signal afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in heard_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops in order, the second at once."""
        del frame
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
