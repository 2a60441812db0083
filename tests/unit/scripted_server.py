"""An OpenAI-compatible server that says what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What follows the request's body: the bytes of a whole HTTP reply; the connection is closed where `keep` is False.
Script = Callable[[dict[str, Any]], tuple[bytes, bool]]


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def choice(text: str, *, chat: bool, reason: str | None = None) -> bytes:
    words = {"delta": {"content": text}} if chat else {"text": text}
    return event({"choices": [{"index": 0, "finish_reason": reason, **words}]})


def events(body: dict[str, Any]) -> list[bytes]:
    """The whole stream that `body` asks for."""
    count, chat = body["max_tokens"], "messages" in body
    usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
    words = [choice(f"w{at} ", chat=chat) for at in range(count)]
    return [*words, choice("", chat=chat, reason="length"), event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def chunked(parts: list[bytes]) -> bytes:
    """A streamed reply of these parts, a chunk each."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def whole(status: int, value: object) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def obey(body: dict[str, Any]) -> tuple[bytes, bool]:
    return chunked(events(body)), True


@dataclass
class ScriptedServer:
    """Its address, and the bodies that it was sent, without the client's first request."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def scripted_server(script: Script = obey, *, owner: str = "someone") -> Iterator[ScriptedServer]:
    """A running server. The first request, with which a client warms it up, is always obeyed."""
    warm = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.wfile.write(whole(200, {"data": [{"id": "scripted", "owned_by": owner}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply, keep = (script if warm.is_set() else obey)(body)
            if warm.is_set():
                server.bodies.append(body)
            warm.set()
            self.wfile.write(reply)
            self.close_connection = not keep

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = ScriptedServer(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()
