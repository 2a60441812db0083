"""A trace of requests as a workload: each is sent when it is due."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
from msgspec import Struct

from lmserve.bench.workload import Conversation, Sizes, Turn, Workload, text


class TraceRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """One line; src/sim/capacity/setup.rs says what the fields mean."""

    arrival: float
    prompt_tokens: int
    output_tokens: int
    session: int | None = None
    shared_tokens: int = 0


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file of JSON lines, by arrival. Raises ValueError that names the line that is wrong."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"--trace {path} cannot be read: {error.strerror}") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = msgspec.json.decode(line, type=TraceRequest)
        except msgspec.DecodeError as error:
            raise ValueError(f"line {number} of {path}: {error}") from error
        if request.arrival < 0 or request.output_tokens < 1 or not 0 <= request.shared_tokens <= request.prompt_tokens:
            raise ValueError(f"line {number} of {path} has an impossible number: {line.decode()}")
        requests.append(request)
    if not requests:
        raise ValueError(f"{path} has no requests")
    return sorted(requests, key=lambda request: request.arrival)


def trace_workload(path: Path) -> Workload:
    """The trace as a workload of one run, in which every conversation has a client of its own. Raises ValueError."""
    requests = read_trace(path)
    talks = any(request.session is not None for request in requests)
    count = len({at if request.session is None else (request.session,) for at, request in enumerate(requests)})

    def draw(source: random.Random, _concurrency: int, _sizes: Sizes) -> list[Conversation]:
        shared = text(source, max(request.shared_tokens for request in requests)).split()
        conversations: dict[object, list[Turn]] = {}
        for at, request in enumerate(requests):
            own = text(source, request.prompt_tokens - request.shared_tokens).split()
            prompt = " ".join([*shared[: request.shared_tokens], *own])
            key = at if request.session is None else (request.session,)
            conversations.setdefault(key, []).append(Turn(prompt, request.output_tokens, request.arrival))
        return [tuple(turns) for turns in conversations.values()]

    return Workload(path.name, f"{len(requests)} requests", "chat" if talks else "completions", (count,), draw)
