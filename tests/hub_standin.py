"""A hub on loopback with huggingface's routes for models, which can break off, lie, and count what it was asked."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class StandIn(ThreadingHTTPServer):
    """`files`: bytes by repository and path. Large ones are named by SHA-256, others by git's SHA-1, as there."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commit = COMMIT
        self.token: str | None = None  # that a request must have
        self.break_after: list[int] = []  # bytes after which the next replies break off
        self.damaged: set[str] = set()  # paths of which other bytes come
        self.claimed: dict[str, int] = {}  # sizes that the list of files claims
        self.sent: list[tuple[str, int, int]] = []  # of each file: path, first byte, bytes sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bytes_of(self, path: str) -> int:
        return sum(count for sent, _, count in self.sent if sent == path)


def digest(content: bytes, path: str) -> tuple[str, bool]:
    if path.endswith((".gguf", ".safetensors")):
        return hashlib.sha256(content).hexdigest(), True
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), False


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._reply(401, b"{}")
        elif listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self._list(listing[1])
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            content = hub.files.get(file[1], {}).get(file[3]) if file[2] in (hub.commit, "main") else None
            self._send(file[3], content)
        else:
            self._reply(404, b"{}")

    def _list(self, name: str) -> None:
        files = self.server.files.get(name)
        if files is None:
            self._reply(404, b'{"error": "Repository not found"}')
            return
        siblings = []
        for path, content in files.items():
            checksum, large = digest(content, path)
            size = self.server.claimed.get(path, len(content))
            lfs = {"lfs": {"sha256": checksum, "size": size}} if large else {"blobId": checksum}
            siblings.append({"rfilename": path, "size": size, **lfs})
        self._reply(200, json.dumps({"sha": self.server.commit, "siblings": siblings}).encode())

    def _send(self, path: str, content: bytes | None) -> None:
        if content is None:
            self._reply(404, b"")
            return
        if path in self.server.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        first, last = 0, len(content) - 1
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first = int(asked[1])
            last = min(last, int(asked[2] or last))
            if first > last:
                self._reply(416, b"")
                return
        part = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{digest(content, path)[0]}"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if self.server.break_after:
            part = part[: self.server.break_after.pop(0)]
            self.close_connection = True
        self.server.sent.append((path, first, len(part)))
        try:
            self.wfile.write(part)
        except ConnectionError:
            # Who wanted only the beginning has left.
            self.close_connection = True

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def hub_standin() -> Iterator[StandIn]:
    hub = StandIn()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
