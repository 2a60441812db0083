"""A core without a model: the interface of `lmserve._core.Engine`, with text that the request itself scripts.

A prompt may hold directives: `[[refuse 429 queue_full]]` (at once), `[[fail early]]` (before the first byte),
`[[fail late]]` (after three tokens), `[[hold]]` (no end), `[[wait 0.2]]` (seconds until accepted), `[[pace 0.01]]`
(seconds a token).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from lmserve.errors import LmserveError

PIECES = ["Hi", " there", ",", " 你", "好", " é", "😀", " \0", '"', "\n"]
NATURAL_LENGTH = 12
MAX_MODEL_LEN = 4096
EMBEDDING_SIZE = 8

DIRECTIVE = re.compile(r"\[\[([^\]]*)\]\]")


class ScriptedStream:
    """One request: what it will say, and what of it has been said."""

    def __init__(self, core: ScriptedCore, number: int, request: dict[str, Any]) -> None:
        self.id = number
        self.request = request
        self.aborted = False
        self.cancelled = False
        self.tokens = 0
        self.state = 0
        self.listed = False
        self.pending = b""
        self.error: LmserveError | None = None
        self.text = ""
        self.prompt = prompt_of(request)
        self.directives = [d.split() for d in DIRECTIVE.findall(self.prompt)]
        now = time.monotonic()
        self.accept_at = now + self.seconds("wait")
        self.next_at = self.accept_at
        self.prompt_tokens = len(self.prompt.split())
        self.history_tokens = 0
        self._core = core

    def has(self, *words: str) -> bool:
        return list(words) in self.directives

    def seconds(self, name: str) -> float:
        return next((float(d[1]) for d in self.directives if d[0] == name), 0.0)

    def poll(self) -> tuple[int, bytes]:
        with self._core.lock:
            self.listed = False
            if self.error is not None:
                raise self.error
            pending, self.pending = self.pending, b""
            return self.state, pending

    def record(self) -> tuple[int, int, int, float | None, float | None]:
        return (7, 3, 2, 0.001, 0.002) if self.state == 2 else (0, 0, 0, None, None)

    def abort(self) -> None:
        with self._core.lock:
            self.aborted = True
            self._core.aborts += self.state != 2


def prompt_of(request: dict[str, Any]) -> str:
    source = request["input"]
    match source["type"]:
        case "turn" | "text":
            return source["text"]
        case "messages":
            return "\n".join(message["content"] for message in source["messages"])
        case _:
            return " ".join(map(str, source["ids"]))


class ScriptedCore:
    def __init__(self, *, max_queue: int = 1024) -> None:
        self.lock = threading.RLock()
        self.fault: tuple[str, str] | None = None
        self.submitted: list[dict[str, Any]] = []
        self.streams: dict[int, ScriptedStream] = {}
        self.sessions: dict[tuple[int, int | str], int] = {}  # committed tokens
        self.busy: dict[tuple[int, int | str], ScriptedStream] = {}
        self.aborts = 0
        self.max_queue = max_queue
        self._news: list[int] = []
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._next = 1
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scripted-core", daemon=True)
        self._thread.start()

    # The interface of the core.

    def submit(self, submission: bytes) -> ScriptedStream:
        request = json.loads(submission)
        with self.lock:
            self._check_running()
            self.submitted.append(request)
            stream = ScriptedStream(self, self._next, request)
            for directive in stream.directives:
                if directive[0] == "refuse":
                    raise LmserveError.new(int(directive[1]), directive[2], "refused as asked", retry_after=3)
            if len(self.streams) >= self.max_queue:
                raise LmserveError.new(429, "queue_full", f"the queue holds {self.max_queue} requests", retry_after=1)
            self._open_session(stream)
            return self._add(stream)

    def embed(self, submission: bytes) -> ScriptedStream:
        request = json.loads(submission)
        with self.lock:
            self._check_running()
            self.submitted.append(request)
            texts = [i["text"] if "text" in i else " ".join(map(str, i["ids"])) for i in request["inputs"]]
            data = [embedding_object(i, text, request) for i, text in enumerate(texts)]
            tokens = sum(len(text.split()) for text in texts)
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            reply = {"object": "list", "data": data, "model": request["model"], "usage": usage}
            scripted = {"route": "embed", "input": {"type": "text", "text": " ".join(texts)}, "reply": reply}
            return self._add(ScriptedStream(self, self._next, scripted))

    def cancel_session(self, tenant: int, session_id: int | str) -> bool:
        with self.lock:
            stream = self.busy.get((tenant, session_id))
            if stream is None:
                return False
            stream.cancelled = True
            return True

    def end_session(self, tenant: int, session_id: int | str, cancel: bool = False) -> bool:
        if cancel and self.cancel_session(tenant, session_id):
            while (tenant, session_id) in self.busy:
                time.sleep(0.001)
        with self.lock:
            if (tenant, session_id) in self.busy:
                raise session_busy(session_id)
            return self.sessions.pop((tenant, session_id), None) is not None

    def list_sessions(self, tenant: int, after: int | str | None, limit: int) -> list[dict[str, int | str | bool]]:
        with self.lock:
            ids = sorted((name for owner, name in self.sessions if owner == tenant), key=order_of)
            found = [name for name in ids if after is None or order_of(name) > order_of(after)]
            common = {"turns": 1, "tokens": 1, "created_ms": 0, "used_ms": 0}
            return [{"id": name, "busy": (tenant, name) in self.busy} | common for name in found[:limit]]

    def wake_fd(self) -> int:
        return self._fd

    def drain(self) -> list[int]:
        with self.lock:
            try:
                os.eventfd_read(self._fd)
            except BlockingIOError:
                return []
            news, self._news = self._news, []
            return news

    def session_log_fault(self) -> tuple[str, str] | None:
        return self.fault

    def stats(self) -> dict[str, int | float]:
        with self.lock:
            return {"running": len(self.streams), "sessions": len(self.sessions)}

    def usage(self, tenant: int) -> dict[str, Any]:
        with self.lock:
            done = sum(request.get("tenant", 0) == tenant for request in self.submitted)
        nothing = dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens", "in_flight", "waiting"), 0)
        limits = dict.fromkeys(("max_in_flight", "tokens_per_minute", "max_sessions", "max_priority"))
        return {"requests": done, **nothing, "limits": {"weight": 1, **limits}, "remaining": {}}

    def quota(self, tenant: int) -> dict[str, int]:
        del tenant
        return {}

    def check_health(self) -> None:
        """It is never ill."""

    def metrics(self) -> str:
        return "# TYPE lmserve_requests_running gauge\nlmserve_requests_running 0\n"

    def shutdown(self, grace_seconds: float) -> None:
        self._stopping = True
        deadline = time.monotonic() + grace_seconds
        while self.streams and time.monotonic() < deadline:
            time.sleep(0.002)
        with self.lock:
            for stream in self.streams.values():
                stream.cancelled = True
        while self.streams:
            time.sleep(0.002)
        self._thread.join()

    # The engine thread.

    def _run(self) -> None:
        while not (self._stopping and not self.streams):
            time.sleep(0.0005)
            with self.lock:
                for stream in list(self.streams.values()):
                    self._step(stream)
                if self._news:
                    os.eventfd_write(self._fd, 1)

    def _step(self, stream: ScriptedStream) -> None:
        now = time.monotonic()
        if stream.aborted:
            self._end(stream, lambda: b"")
            return
        if stream.state == 0:
            if now < stream.accept_at and not stream.cancelled:
                return
            if stream.has("fail", "early"):
                stream.error = LmserveError.new(500, "internal_error", "the step failed as asked")
                self._end(stream, lambda: b"")
                return
            stream.state = 1
            self._tell(stream, opening(stream))
        if stream.request["route"] == "embed":
            self._end(stream, lambda: json.dumps(stream.request["reply"]).encode())
            return
        if now < stream.next_at and not stream.cancelled:
            return
        stream.next_at = now + stream.seconds("pace")
        reason = self._finish_reason(stream)
        if reason is None:
            piece = PIECES[stream.tokens % len(PIECES)]
            stream.tokens += 1
            stream.text += piece
            self._tell(stream, frame(stream, piece))
        elif reason == "error":
            self._fail(stream)
        else:
            self._end(stream, lambda: ending(stream, reason))

    def _finish_reason(self, stream: ScriptedStream) -> str | None:
        stopping = stream.request.get("stopping", {})
        if stream.cancelled:
            return "abort"
        if stream.tokens == 3 and stream.has("fail", "late"):
            return "error"
        if stream.has("hold"):
            return None
        if stream.tokens >= stopping.get("max_tokens", MAX_MODEL_LEN):
            return "length"
        if stream.tokens >= NATURAL_LENGTH and not stopping.get("ignore_eos"):
            return "stop"
        return None

    def _fail(self, stream: ScriptedStream) -> None:
        error = LmserveError.new(500, "internal_error", "the step failed as asked")
        if not stream.request.get("stream"):
            stream.error = error
            self._end(stream, lambda: b"")
        elif stream.request["route"] == "generate":
            self._end(stream, lambda: generate_object(stream, "", "error", error=error.error) + b"\0")
        else:
            self._end(stream, lambda: b"data: " + json.dumps({"error": error.error}).encode() + b"\n\ndata: [DONE]\n\n")

    def _tell(self, stream: ScriptedStream, data: bytes) -> None:
        stream.pending += data
        if not stream.listed and (data or stream.state != 0):
            stream.listed = True
            self._news.append(stream.id)

    def _end(self, stream: ScriptedStream, last: Callable[[], bytes]) -> None:
        key = session_key(stream.request)
        if key is not None:
            self.busy.pop(key, None)
            session = stream.request["session"]
            kept = not stream.aborted or session.get("on_disconnect") == "keep"
            if kept and stream.error is None:
                self.sessions[key] = stream.history_tokens + stream.prompt_tokens + stream.tokens
            if session.get("end"):
                self.sessions.pop(key, None)
        data = last()
        stream.state = 2
        self._tell(stream, data)
        del self.streams[stream.id]

    def _check_running(self) -> None:
        if self._stopping:
            raise LmserveError.new(503, "draining", "the engine is stopping")

    def _add(self, stream: ScriptedStream) -> ScriptedStream:
        self._next += 1
        self.streams[stream.id] = stream
        return stream

    def _open_session(self, stream: ScriptedStream) -> None:
        key = session_key(stream.request)
        limit = MAX_MODEL_LEN
        if key is not None:
            session = stream.request["session"]
            if key in self.busy:
                raise session_busy(key[1])
            if session.get("start"):
                self.sessions.pop(key, None)
            elif not session.get("create") and key not in self.sessions:
                raise LmserveError.new(404, "session_not_found", f"there is no session {key[1]}", param="instance_id")
            stream.history_tokens = self.sessions.get(key, 0)
        wanted = stream.request.get("stopping", {}).get("max_tokens", 1)
        if stream.request.get("on_overflow") == "truncate_output":
            wanted = 1
        if stream.history_tokens + stream.prompt_tokens + wanted > limit:
            raise LmserveError.invalid(
                "prompt", f"the context holds {limit} tokens, but more were asked for", "context_length_exceeded"
            )
        if key is not None:
            self.busy[key] = stream


def order_of(session_id: int | str) -> tuple[bool, int, str]:
    named = isinstance(session_id, str)
    return (True, 0, session_id) if named else (False, session_id, "")


def session_key(request: dict[str, Any]) -> tuple[int, int | str] | None:
    session = request.get("session")
    return None if session is None else (request.get("tenant", 0), session["id"])


def session_busy(session_id: int | str) -> LmserveError:
    return LmserveError.new(409, "session_busy", f"session {session_id} runs a turn", retry_after=1)


# The wire forms, written as the contract has them.


def usage_of(stream: ScriptedStream) -> dict[str, int]:
    return {
        "prompt_tokens": stream.history_tokens + stream.prompt_tokens,
        "history_tokens": stream.history_tokens,
        "cached_tokens": stream.history_tokens,
        "completion_tokens": stream.tokens,
    }


def generate_object(stream: ScriptedStream, text: str, reason: str | None, **more: Any) -> bytes:
    frame_object = {"text": text, "tokens": stream.tokens, "finish_reason": reason}
    if reason is not None:
        frame_object["usage"] = usage_of(stream)
    return json.dumps(frame_object | more).encode()


def event(stream: ScriptedStream, choices: list[dict[str, Any]], **more: Any) -> bytes:
    request = stream.request
    chunk = {
        "id": request.get("reply_id", ""),
        "object": "chat.completion.chunk",
        "created": request.get("created", 0),
        "model": request["model"],
        "choices": choices,
    }
    return b"data: " + json.dumps(chunk | more, ensure_ascii=False).encode() + b"\n\n"


def choice(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def opening(stream: ScriptedStream) -> bytes:
    if stream.request["route"] == "chat" and stream.request.get("stream"):
        return event(stream, [choice({"role": "assistant", "content": ""})])
    return b""


def frame(stream: ScriptedStream, piece: str) -> bytes:
    if not stream.request.get("stream"):
        return b""
    if stream.request["route"] == "chat":
        return event(stream, [choice({"content": piece})])
    return generate_object(stream, piece, None) + b"\0"


def chat_usage(stream: ScriptedStream) -> dict[str, Any]:
    usage = usage_of(stream)
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": stream.tokens,
        "total_tokens": usage["prompt_tokens"] + stream.tokens,
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
    }


def ending(stream: ScriptedStream, reason: str) -> bytes:
    request = stream.request
    if request["route"] == "generate":
        if request.get("stream"):
            return generate_object(stream, "", reason) + b"\0"
        return generate_object(stream, stream.text, reason)
    reason = "stop" if reason == "abort" else reason
    if request["route"] == "completions":
        return completion_object(stream, reason)
    if request.get("stream"):
        last = event(stream, [choice({}, reason)])
        if request.get("usage_chunks", "none") != "none":
            last += event(stream, [], usage=chat_usage(stream))
        return last + b"data: [DONE]\n\n"
    answer = {"role": "assistant", "content": stream.text, "refusal": None}
    choices = [
        {"index": i, "message": answer, "logprobs": None, "finish_reason": reason} for i in range(request.get("n", 1))
    ]
    reply = {
        "id": request.get("reply_id", ""),
        "object": "chat.completion",
        "created": request.get("created", 0),
        "model": request["model"],
        "choices": choices,
        "usage": chat_usage(stream),
    }
    return json.dumps(reply, ensure_ascii=False).encode()


def completion_object(stream: ScriptedStream, reason: str) -> bytes:
    """The whole reply, with token ids beside the text."""
    choices = [
        {
            "index": i,
            "text": stream.text,
            "logprobs": None,
            "prompt_token_ids": list(range(stream.prompt_tokens)),
            "token_ids": list(range(stream.tokens)),
            "finish_reason": reason,
        }
        for i in range(stream.request.get("n", 1))
    ]
    request = stream.request
    reply = {
        "id": request.get("reply_id", ""),
        "object": "text_completion",
        "created": request.get("created", 0),
        "model": request.get("model", ""),
        "choices": choices,
        "usage": chat_usage(stream),
    }
    return json.dumps(reply, ensure_ascii=False).encode()


def embedding_object(index: int, text: str, request: dict[str, Any]) -> dict[str, Any]:
    size = request.get("dimensions") or EMBEDDING_SIZE
    digest = hashlib.sha256(text.encode()).digest()
    raw = [digest[i % len(digest)] - 127.5 for i in range(size)]
    norm = sum(x * x for x in raw) ** 0.5
    vector: Any = [x / norm for x in raw]
    if request.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
    return {"object": "embedding", "embedding": vector, "index": index}
