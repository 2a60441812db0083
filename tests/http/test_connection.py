"""What one connection may send, counted at the parser; and what a half-closed one gets."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Running
from lmserve import connection
from lmserve.connection import CALLBACKS, MAX_FIELDS, MAX_HEAD, PIECE, Connection
from test_disconnect import reset, send
from test_server import end, is_ready, process
from uvicorn import Config
from uvicorn.server import ServerState

from wire import frames_of, wait_until

RECEIVED = 262_144  # bytes that uvloop hands over at once
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False
        self.reading = True

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Counted(Connection):
    """Counts what its parser takes, in all and between two rounds of the loop."""

    taken = 0
    most_at_once = 0
    now = 0

    def _feed(self, piece: memoryview) -> None:
        self.taken += len(piece)
        super()._feed(piece)
        self.most_at_once = max(self.most_at_once, self._callbacks)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Replies once the body is there; a path says for what it waits."""
    seen.append(scope)
    if scope["path"] == "/wait":
        await waiting[-1].wait()
    message: dict[str, Any] = {"more_body": scope["method"] == "POST"}
    size = 0
    while message["more_body"]:
        message = await receive()
        if message["type"] == "http.disconnect":
            seen.append("left")
            return
        size += len(message["body"])
    body = str(size).encode()
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}
    await send(head)
    await send({"type": "http.response.body", "body": body})


seen: list[Any] = []
waiting: list[asyncio.Event] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    seen.clear()
    waiting.clear()


async def until(condition: Callable[[], bool]) -> None:
    """Give the loop away until `condition` holds."""
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("not within a million rounds of the loop")


def talk(scenario: Callable[[Counted, Transport], Any]) -> tuple[Counted, Transport]:
    """Run `scenario` on a connection over a transport that only counts."""

    async def run() -> tuple[Counted, Transport]:
        config = Config(app, lifespan="off", ws="none", log_config=None, access_log=False)
        made, transport = Counted(config, ServerState(), {}, asyncio.get_running_loop()), Transport()
        waiting.append(asyncio.Event())
        made.connection_made(transport)
        await scenario(made, transport)
        await until(lambda: transport.closing or not (made.unparsed or not made._idle))
        made.connection_lost(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return made, transport

    return asyncio.run(run())


def receive_all(*parts: bytes) -> Callable[[Counted, Transport], Any]:
    """Hand the parts over as uvloop does, as long as the transport reads."""

    async def scenario(made: Counted, transport: Transport) -> None:
        for part in parts:
            for at in range(0, len(part), RECEIVED):
                if transport.closing:
                    return
                await until(lambda: transport.reading)
                made.data_received(part[at : at + RECEIVED])

    return scenario


def refusal(transport: Transport) -> dict[str, Any]:
    assert transport.closing
    head, _, body = transport.written.partition(b"\r\n\r\n")
    assert b"\r\nx-request-id: " in head
    assert b"\r\nconnection: close" in head
    return {"status": int(head.split()[1])} | json.loads(body)["error"]


HEADS = {
    "one field": b"GET / HTTP/1.1\r\nX-Big: " + b"a" * (64 << 20),
    "a name": b"GET / HTTP/1.1\r\n" + b"a" * (8 << 20),
    "a path": b"GET /" + b"a" * (8 << 20),
    "empty lines": b"\r\n" * (4 << 20),
    "fields": b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 1_000_000,
    "large fields": b"GET / HTTP/1.1\r\n" + (b"a: " + b"b" * 300 + b"\r\n") * 1000,
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_too_large_is_refused_where_the_limit_is(kind: str) -> None:
    made, transport = talk(receive_all(HEADS[kind]))
    error = refusal(transport)
    assert (error["status"], error["code"]) == (431, "head_too_large")
    assert str(MAX_FIELDS if kind == "fields" else MAX_HEAD) in error["message"]
    assert made.taken <= MAX_HEAD
    assert seen == []


@pytest.mark.parametrize("size", [1, 7, 1000, RECEIVED])
def test_the_largest_head_is_taken_however_it_arrives(size: int) -> None:
    start = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"a%d: b\r\n" % n for n in range(MAX_FIELDS - 2)) + b"Big: "
    head = start + b"c" * (MAX_HEAD - len(start) - 4) + b"\r\n\r\n"
    assert len(head) == MAX_HEAD
    _, transport = talk(receive_all(*(head[at : at + size] for at in range(0, len(head), size))))
    assert transport.written.startswith(b"HTTP/1.1 200 ")
    assert len(seen[0]["headers"]) == MAX_FIELDS
    _, transport = talk(receive_all(head.replace(b"Big: ", b"Big: c")))
    assert refusal(transport)["status"] == 431


def test_the_limit_is_each_heads_own() -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nBig: " + b"c" * 20_000 + b"\r\n\r\n"
    _, transport = talk(receive_all(head * 20))
    assert transport.written.count(b"HTTP/1.1 200 ") == 20


def test_a_head_has_a_deadline_while_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0.05)

    async def scenario(made: Counted, transport: Transport) -> None:
        made.data_received(b"GET / HTTP/1.1\r\n")
        while not transport.closing:
            made.data_received(b"a: b\r\n")
            await asyncio.sleep(0.01)

    _, transport = talk(scenario)
    error = refusal(transport)
    assert (error["status"], error["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("part", [b"", b"\r\n"])
def test_a_connection_that_sends_no_head_is_closed(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0.05)

    async def scenario(made: Counted, transport: Transport) -> None:
        made.data_received(GET)
        await until(lambda: bool(transport.written))
        while not transport.closing:
            made.data_received(part or b"G")
            await asyncio.sleep(0.01)

    talk(scenario)


def test_a_body_that_nobody_reads_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "UNREAD_TIMEOUT", 0.05)

    async def scenario(made: Counted, transport: Transport) -> None:
        made.data_received(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        while not transport.closing:
            made.data_received(b"x")
            await asyncio.sleep(0.01)

    _, transport = talk(scenario)
    assert transport.written.count(b"HTTP/1.1 200 ") == 1


FLOODS = {
    "chunks of one byte": CHUNKED + b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n",
    "requests": GET * 10_000,
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_of_small_parts_gives_the_loop_back(kind: str) -> None:
    made, transport = talk(receive_all(FLOODS[kind]))
    assert made.most_at_once <= CALLBACKS + PIECE
    assert made.taken == len(FLOODS[kind])
    if kind == "requests":
        assert transport.written.count(b"HTTP/1.1 200 ") == 10_000
    else:
        assert transport.written.endswith(b"100000")


def test_requests_behind_one_that_runs_wait_unparsed() -> None:
    async def scenario(made: Counted, transport: Transport) -> None:
        made.data_received(GET.replace(b"/health", b"/wait") + GET * 1000)
        for _ in range(20):
            await asyncio.sleep(0)
        assert made.taken <= PIECE
        assert made.unparsed >= 1000 * len(GET) - PIECE
        assert not transport.reading
        assert len(seen) == 1
        waiting[-1].set()
        await until(lambda: not made.unparsed and made._idle)
        assert transport.reading

    _, transport = talk(scenario)
    assert transport.written.count(b"HTTP/1.1 200 ") == 1001


def test_a_broken_request_does_not_cut_the_reply_before_it() -> None:
    async def scenario(made: Counted, transport: Transport) -> None:
        made.data_received(GET.replace(b"/health", b"/wait") + b"not http\r\n\r\n")
        await asyncio.sleep(0)
        assert transport.written == b""
        waiting[-1].set()

    _, transport = talk(scenario)
    good, bad = transport.written.split(b"HTTP/1.1 400 ")
    assert good.startswith(b"HTTP/1.1 200 ")
    assert b'"invalid_http"' in bad


@pytest.mark.parametrize("part", [b"1;" + b"e" * (8 << 20), b"1" * (1 << 20), b"0\r\n" + b"t: u\r\n" * 100_000])
def test_chunk_extensions_and_trailers_are_bounded(part: bytes) -> None:
    made, transport = talk(receive_all(CHUNKED + part))
    assert refusal(transport)["status"] in (400, 431)
    assert made.taken <= MAX_HEAD + 2 * PIECE
    assert seen[1:] == ["left"]


def test_trailers_are_no_headers() -> None:
    body = b"3;a=b\r\nabc\r\n0\r\nAuthorization: Bearer stolen\r\nX-Api-Key: k\r\n\r\n"
    _, transport = talk(receive_all(CHUNKED + body + GET))
    assert transport.written.count(b"HTTP/1.1 200 ") == 2
    assert [name for name, _ in seen[0]["headers"]] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"TLS/1.2"])
@pytest.mark.parametrize("size", [1, 30, 10_000])
def test_an_upgrade_is_not_made_and_its_body_is_read(upgrade: bytes, size: int) -> None:
    fields = b"Upgrade: " + upgrade + b"\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
    whole = b"POST / HTTP/1.1\r\nHost: x\r\n" + fields + b"Content-Length: 500\r\n\r\n" + b"b" * 500
    whole += CHUNKED.replace(b"Host: x\r\n", fields) + b"5\r\nabcde\r\n0\r\n\r\n" + GET.replace(b"Host: x\r\n", fields)
    _, transport = talk(receive_all(*(whole[at : at + size] for at in range(0, len(whole), size))))
    replies = [reply.rpartition(b"\r\n")[2] for reply in transport.written.split(b"HTTP/1.1 200 OK")[1:]]
    assert replies == [b"500", b"5", b"0"]
    assert (b"http2-settings", b"AAMAAABkAAQ") in seen[0]["headers"]


def test_connect_is_refused() -> None:
    _, transport = talk(receive_all(b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert "not a proxy" in refusal(transport)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_sending_half_gets_its_reply(scripted: Running, stream: bool) -> None:
    with send(scripted, "/generate", {"prompt": "[[pace 0.02]]", "stream": stream}) as connection:
        if stream:
            connection.recv(1)
        connection.shutdown(socket.SHUT_WR)
        said = b""
        while part := connection.recv(65536):
            said += part
    if stream:
        assert said.endswith(b"0\r\n\r\n")
        assert b'"finish_reason": "stop"' in said
    else:
        interim, reply = said.split(b"\r\n\r\n", 1)
        assert interim == b"HTTP/1.1 100 Continue"
        assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
        assert json.loads(reply.split(b"\r\n\r\n", 1)[1])["finish_reason"] == "stop"


def test_a_probe_is_invisible_in_a_stream(scripted: Running) -> None:
    from http.client import HTTPResponse

    with send(scripted, "/generate", {"prompt": "[[pace 0.02]]", "stream": True}) as connection:
        connection.shutdown(socket.SHUT_WR)
        reply = HTTPResponse(connection)
        reply.begin()
        assert frames_of(reply.read())[-1]["finish_reason"] == "stop"


def test_half_of_a_request_and_its_end_get_no_reply(scripted: Running) -> None:
    before = len(scripted.core.submitted)
    for part in (b"POST /generate HTTP/1.1\r\n", b'POST /generate HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"prompt'):
        with socket.create_connection(scripted.address, timeout=10) as connection:
            connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
    assert len(scripted.core.submitted) == before


@pytest.mark.parametrize("leave", [reset, socket.socket.close])
def test_a_client_that_leaves_with_a_second_request_in_line_is_noticed(
    scripted: Running, leave: Callable[[socket.socket], None]
) -> None:
    aborts = scripted.core.aborts
    connection = send(scripted, "/generate", {"prompt": "[[hold]]"})
    connection.sendall(GET)
    wait_until(lambda: len(scripted.core.streams) > 0, "the request is in the core")
    leave(connection)
    wait_until(lambda: scripted.core.aborts > aborts, "the request is aborted")


def test_sighup_drains() -> None:
    with process() as (child, url):
        wait_until(lambda: is_ready(url), "the model is loaded")
        child.send_signal(signal.SIGHUP)
        assert end(child) == (0, "stopped\n", "")
