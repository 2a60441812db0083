"""A proxy that makes agents ask greedily, and keeps what they asked and heard."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import httpx

ROUTES: Final = ("/v1/messages", "/v1/responses", "/v1/chat/completions")
# Headers that belong to a connection.
OWN: Final = ("host", "connection", "content-length", "transfer-encoding", "accept-encoding", "expect")
TIMEOUT: Final = 240  # seconds


@dataclass(frozen=True)
class Exchange:
    """A streamed answer of a model, with what it was asked for by."""

    path: str
    headers: dict[str, str]
    body: bytes
    reply: bytes

    def asked_of(self, url: str) -> Exchange:
        """The same request to another server."""
        reply = httpx.post(url + self.path, content=self.body, headers=self.headers, timeout=TIMEOUT)
        assert reply.status_code == 200, reply.text
        return Exchange(self.path, self.headers, self.body, reply.content)

    @property
    def said(self) -> tuple[str, list[str]]:
        """All text, thoughts included, and the names and arguments of calls."""
        text, calls = "", []
        for event in self._events():
            match event:
                case {"type": "content_block_delta", "delta": delta}:
                    text += delta.get("text", "") + delta.get("thinking", "") + delta.get("partial_json", "")
                case {"type": "response.completed" | "response.incomplete", "response": response}:
                    for item in response["output"]:
                        text += "".join(part["text"] for part in item.get("content") or ())
                        calls += [item[name] for name in ("name", "arguments", "input") if name in item]
                case {"choices": [{"delta": delta}]}:
                    text += (delta.get("reasoning_content") or "") + (delta.get("content") or "")
                    calls += [json.dumps(call["function"]) for call in delta.get("tool_calls") or ()]
        return text, calls

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Of the prompt, of these cached, and of the answer."""
        usage: dict[str, Any] = {}
        for event in self._events():
            usage = event.get("response", event).get("usage") or usage
        if self.path == "/v1/messages":
            cached = usage["cache_read_input_tokens"]
            return usage["input_tokens"] + cached, cached, usage["output_tokens"]
        if self.path == "/v1/responses":
            cached = usage["input_tokens_details"]["cached_tokens"]
            return usage["input_tokens"], cached, usage["output_tokens"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return usage["prompt_tokens"], cached, usage["completion_tokens"]

    def _events(self) -> list[dict[str, Any]]:
        lines = [line.removeprefix("data: ") for line in self.reply.decode().splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


@contextmanager
def recording(upstream: str) -> Iterator[tuple[str, list[Exchange]]]:
    """The proxy's URL, and the exchanges so far."""
    exchanges: list[Exchange] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self._body())
            path = self.path.partition("?")[0]
            if path in ROUTES:
                body["temperature"] = 0
            headers = {name: value for name, value in self.headers.items() if name.lower() not in OWN}
            sent = json.dumps(body).encode()
            reply = httpx.post(upstream + self.path, content=sent, headers=headers, timeout=TIMEOUT)
            if path in ROUTES and reply.status_code == 200 and body.get("stream"):
                exchanges.append(Exchange(path, headers, sent, reply.content))
            self._answer(reply)

        def do_GET(self) -> None:
            self._answer(httpx.get(upstream + self.path, timeout=TIMEOUT))

        def do_HEAD(self) -> None:
            self._answer(httpx.head(upstream + self.path, timeout=TIMEOUT))

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the class above
            del format, args

        def _body(self) -> bytes:
            if "content-length" in self.headers:
                return self.rfile.read(int(self.headers["content-length"]))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self, reply: httpx.Response) -> None:
            self.send_response(reply.status_code)
            self.send_header("content-type", reply.headers.get("content-type", "application/json"))
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", exchanges
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
