"""One HTTP/1.1 connection: uvicorn's protocol over httptools, with a limit for everything that a client sends.

httptools has no limits, and collects a request's whole head before it passes on the first field. So bytes are parsed in
small pieces and counted as they arrive: RFC 9112 for the grammar, RFC 6585 for 431.
"""

from __future__ import annotations

import asyncio
import select
import uuid
from collections import deque
from typing import Any, Final

import httptools
from msgspec.json import encode
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import is_ssl

from lmserve.errors import LmserveError

MAX_HEAD: Final = 65_536  # bytes of a request's head; of chunk extensions and trailers, too
MAX_FIELDS: Final = 256  # fields of a head, or trailers
HEAD_TIMEOUT: Final = 30.0  # seconds for a request's head, once its connection is open or its first byte is there
UNREAD_TIMEOUT: Final = 60.0  # seconds for the rest of an unread body, after its reply was sent

SOCKETS: Final = frozenset({b"/v1/responses", b"/responses"})  # paths that are a WebSocket's, too

PIECE: Final = 4096  # bytes that the parser takes at once, where one byte may cost a callback
CALLBACKS: Final = 512  # of the parser, after which the loop serves others first
# A chunk of one byte has five bytes of framing. More than that, and MAX_HEAD, is extensions or trailers.
FRAMING: Final = 8

GONE: Final = select.POLLERR | select.POLLHUP
ENDED: Final = getattr(select, "POLLRDHUP", 0)  # Linux has it
FIRST_LOOK: Final = 0.005  # seconds from a probe to the first look at what it led to
LAST_LOOK: Final = 1.0  # seconds between two looks, at most


class _RefusedError(Exception):
    """Raised within the parser: the client sent more than it may."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.error = LmserveError.new(status, code, message)


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits.

    - A head may have MAX_HEAD bytes in MAX_FIELDS fields, and must arrive within HEAD_TIMEOUT seconds.
    - The event loop is given back after CALLBACKS callbacks of the parser.
    - One request runs at a time; what follows it on the connection waits unparsed.
    - A request to upgrade is answered without an upgrade, its body included, unless it is a WebSocket's of SOCKETS.
    - A client that has closed its sending half gets its reply. One that has left is found by a probe.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unparsed: deque[memoryview] = deque()
        self._scheduled = False  # `_parse` runs in the loop's next round
        self._callbacks = 0  # in this round
        self._in_head = True  # or between two requests
        self._ended = 0  # requests that were parsed whole
        self._head_bytes = 0
        self._fields = 0
        self._body_left: int | None = None  # None: chunked
        self._body_bytes = 0
        self._framing_bytes = 0
        self._upgrading = False
        self._running: RequestResponseCycle | None = None  # the request that has a handler, or the last that had
        self._refusal: bytes | None = None  # the last thing to write, once the requests before it have their replies
        self._eof = False
        self._probed = False
        self._watch: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None  # deadline of a head, or of an unread body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first head."""
        super().connection_made(transport)
        self.flow: _Flow = _Flow(transport, self)
        self._start_timer(HEAD_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the handler, and forget what was not parsed."""
        self._stop_timer()
        if self._watch is not None:
            self._watch.cancel()
        self._unparsed.clear()
        self._tell_handler()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, as far as it may be parsed now."""
        self._unparsed.append(memoryview(data))
        if not self._scheduled:
            self._parse()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends nothing more. True: the connection stays open for replies."""
        self._eof = True
        if is_ssl(self.transport) or self.parser is None or self._refusal is not None:
            return False
        if self._unparsed:
            return True
        if self._running is None or self._idle or not self._in_head or self._running.scope["http_version"] != "1.1":
            return False
        self._probe(self._running)
        self.watch(FIRST_LOOK)
        return True

    @property
    def held(self) -> bool:
        """Whether what arrives must wait: for the handler, or for the requests before it."""
        return self.flow.read_paused or bool(self.pipeline)

    @property
    def unparsed(self) -> int:
        """Bytes that wait to be parsed."""
        return sum(map(len, self._unparsed))

    def schedule(self) -> None:
        """Parse on in the loop's next round."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._parse_on)

    # Parsing

    def _parse_on(self) -> None:
        self._scheduled = False
        if self.parser is not None and not self.transport.is_closing():
            self._parse()

    def _parse(self) -> None:
        self._callbacks = 0
        while self._unparsed and not self.held and self._refusal is None and not self.transport.is_closing():
            if self._callbacks >= CALLBACKS:
                self.flow.hold()
                self.schedule()
                return
            self._unset_keepalive_if_required()
            if self._in_head and self._timer is None:
                self._start_timer(HEAD_TIMEOUT)
            self._feed(self._next_piece())
        if self._unparsed:
            self.flow.hold()
        elif self._eof:
            # A request that will never be whole gets no reply.
            if self._idle or not self._in_head:
                self.transport.close()
        elif not self.held:
            self.flow.release()

    def _next_piece(self) -> memoryview:
        data = self._unparsed.popleft()
        size = min(PIECE, MAX_HEAD - self._head_bytes) if self._in_head else self._body_left or PIECE
        if len(data) > size:
            self._unparsed.appendleft(data[size:])
        return data[:size]

    def _feed(self, piece: memoryview) -> None:
        ended, body_bytes, in_head = self._ended, self._body_bytes, self._in_head
        try:
            self.parser.feed_data(piece)
            if ended != self._ended:
                self._head_bytes = 0
            elif self._in_head:
                self._count_head(len(piece))
            elif not in_head and self._body_left is None:
                self._count_framing(len(piece) - (self._body_bytes - body_bytes))
        except httptools.HttpParserUpgrade as upgrade:
            rest = piece[upgrade.args[0] :]
            if self._becomes_socket():
                self._become_socket(rest)
            else:
                self._parse_without_upgrade(rest)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause.error if isinstance(cause, _RefusedError) else _invalid(error))
        except _RefusedError as error:
            self._refuse(error.error)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes >= MAX_HEAD:
            message = f"a request's head may have at most {MAX_HEAD} bytes, but it has more"
            raise _RefusedError(431, "head_too_large", message)

    def _count_framing(self, size: int) -> None:
        self._framing_bytes += size
        if self._framing_bytes > MAX_HEAD + FRAMING * self._body_bytes:
            message = f"chunk extensions and trailers may have at most {MAX_HEAD} bytes, but they have more"
            raise _RefusedError(431, "head_too_large", message)

    def _becomes_socket(self) -> bool:
        """Whether the head is a handshake (RFC 6455, 4.2.1) for a route that has a socket, with nothing before it."""
        if self.ws_protocol_class is None or self.parser.get_method() != b"GET" or not self._idle:
            return False
        path = bytes(self.url).partition(b"?")[0]
        upgrade = next((value for name, value in self.headers if name == b"upgrade"), b"")
        return path in SOCKETS and upgrade.lower() == b"websocket"

    def _become_socket(self, rest: memoryview) -> None:
        """Hand the connection over, with what has arrived."""
        fields = b"".join(b"%b: %b\r\n" % field for field in self.headers)
        head = b"GET %b HTTP/1.1\r\n%b\r\n" % (self.url, fields)
        arrived = b"".join((head, rest, *self._unparsed))
        self._unparsed.clear()
        self._stop_timer()
        self.flow.release()
        self.connections.discard(self)
        if self.ws_protocol_class is None:
            raise RuntimeError("there is no protocol for WebSockets")
        protocol: Any = self.ws_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.app_state
        )
        protocol.connection_made(self.transport)
        self.transport.set_protocol(protocol)
        protocol.data_received(arrived)

    def _parse_without_upgrade(self, rest: memoryview) -> None:
        # httptools ends the message after the head. Without that one field it reads the body, and what follows.
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            self._refuse(
                LmserveError.invalid(None, "CONNECT is not supported: this server is not a proxy", "invalid_http")
            )
            return
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version.encode(), b"".join(fields))
        self._upgrading = False
        self._head_bytes = -len(head)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._unparsed.extendleft((rest, memoryview(head)))

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        """A head begins."""
        self._callbacks += 1
        self._fields = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field of a head, or a trailer: trailers are dropped, for nothing here reads them."""
        self._callbacks += 1
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise _RefusedError(
                431, "head_too_large", f"a request may have at most {MAX_FIELDS} header fields, but it has more"
            )
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._stop_timer()
        if self.parser.should_upgrade():
            self._upgrading = True
            return
        super().on_headers_complete()
        self._in_head = False
        self._fields = self._body_bytes = self._framing_bytes = 0
        lengths = [int(value) for name, value in self.headers if name == b"content-length"]
        self._body_left = lengths[0] if lengths else None

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._callbacks += 1
        self._body_bytes += len(body)
        if self._body_left is not None:
            self._body_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there."""
        self._callbacks += 1
        if self._upgrading:
            return
        self._stop_timer()
        self._in_head = True
        self._ended += 1
        super().on_message_complete()

    # Replies

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Go on with what follows on the connection."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._unparsed or not self._idle:
            self.schedule()
        elif self._refusal is not None:
            self.transport.write(self._refusal)
            self.transport.close()
        elif self._eof:
            self.transport.close()
        else:
            if not self._in_head:
                self._start_timer(UNREAD_TIMEOUT)
            self.flow.release()

    @property
    def _idle(self) -> bool:
        """Whether no request has a handler that has not replied."""
        return self._running is None or self._running.response_complete

    def _tell_handler(self) -> None:
        """The client's connection is lost, or as good as lost."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def _refuse(self, error: LmserveError) -> None:
        """Reply with `error` once its turn has come, and close."""
        self._unparsed.clear()
        self._refusal = reply_of(error)
        if self._idle:
            self.transport.write(self._refusal)
            self.transport.close()
        elif self._in_head:
            return
        elif self.pipeline:
            # It has no handler yet.
            self.pipeline.popleft()
        elif self.cycle.response_started:
            # The reply is on its way before its request was whole: it may end.
            self._refusal = b""
            self.cycle.keep_alive = False
        else:
            self._tell_handler()
            self.transport.write(self._refusal)
            self.transport.close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._timed_out, seconds)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self, seconds: float) -> None:
        self._timer = None
        if self._unparsed or self.held or not self._idle:
            # The server did not get to it, or is still replying to what came before it.
            self._start_timer(seconds)
        elif self._head_bytes and self._in_head:
            message = f"a request's head must arrive within {seconds:g} seconds, but only {self._head_bytes} bytes have"
            self._refuse(LmserveError.new(408, "request_timeout", message))
        else:
            self.transport.close()

    # Clients that leave while the transport does not read

    def watch(self, seconds: float = LAST_LOOK) -> None:
        """Check after this many seconds whether the client is still connected."""
        if self._watch is None:
            self._watch = self.loop.call_later(seconds, self._look, seconds)

    def _look(self, waited: float) -> None:
        self._watch = None
        if self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), GONE | ENDED)
        found = sum(events for _, events in poll.poll(0))
        if found & GONE:
            self.transport.abort()
            return
        if found & ENDED and self._running is not None and not self._idle:
            self._probe(self._running)
        if self._eof or not self.flow.reading:
            self.watch(min(2 * waited, LAST_LOOK))

    def _probe(self, waiting: RequestResponseCycle) -> None:
        """Write what a waiting client skips, and what the kernel of one that left answers with a reset."""
        if self._probed or waiting.scope["http_version"] != "1.1":
            return
        self._probed = True
        if not waiting.response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif waiting.chunked_encoding:
            # The size of the next chunk may begin with zeros.
            self.transport.write(b"0")


class _Flow(FlowControl):
    """uvicorn's flow control, which does not read on before what arrived is parsed."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        super().__init__(transport)
        self._connection = connection
        self.reading = True  # the transport

    def pause_reading(self) -> None:
        """The handler has enough, or a request is complete while another one runs."""
        self.read_paused = True
        self.hold()

    def resume_reading(self) -> None:
        """The handler wants more."""
        self.read_paused = False
        if not self.reading:
            self._connection.schedule()

    def hold(self) -> None:
        """Let the transport read nothing."""
        if self.reading and not self._transport.is_closing():
            self.reading = False
            self._transport.pause_reading()
            # Nobody else would notice that the client left.
            self._connection.watch()

    def release(self) -> None:
        """Let the transport read."""
        if not self.reading and not self._transport.is_closing():
            self.reading = True
            self._transport.resume_reading()


def _invalid(error: httptools.HttpParserError) -> LmserveError:
    reason = "" if isinstance(error, httptools.HttpParserCallbackError) else f": {error}"
    return LmserveError.invalid(None, f"this is not an HTTP/1.1 request{reason}", "invalid_http")


def reply_of(error: LmserveError) -> bytes:
    """A whole reply with the error in the API's shape, after which the connection is closed."""
    body = encode({"error": error.error})
    head = (
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        f"x-request-id: {uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
    )
    return STATUS_LINE[error.status] + head.encode() + body
