"""Clients that leave: their requests end in the core, and nothing of them stays in the server."""

from __future__ import annotations

import json
import logging
import socket
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import MODEL, Running

from wire import wait_until

ROUNDS = 200


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def send(running: Running, path: str, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    connection = socket.create_connection(running.address, timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def reset(connection: socket.socket) -> None:
    """Close with a RST, as a killed client does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


REQUESTS = {
    "generate": ("/generate", {"prompt": "[[hold]]"}),
    "generate stream": ("/generate", {"prompt": "[[hold]]", "stream": True}),
    "chat": ("/v1/chat/completions", {"model": MODEL, "messages": "[[hold]]"}),
    "chat stream": ("/v1/chat/completions", {"model": MODEL, "messages": "[[hold]]", "stream": True}),
    "not yet accepted": ("/generate", {"prompt": "[[wait 60]]", "stream": True}),
    "embeddings": ("/v1/embeddings", {"model": MODEL, "input": "[[wait 60]]"}),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_nothing_is_left(scripted: Running, kind: str) -> None:
    path, body = REQUESTS[kind]
    core = scripted.core
    wait_until(lambda: (not core.streams and scripted.open_tasks() == 0) or not core.streams, "quiet")
    tasks, fds, aborts = scripted.open_tasks(), open_fds(), core.aborts
    submitted = len(core.submitted)
    for number in range(ROUNDS):
        connection = send(scripted, path, body)
        if number % 2 and "stream" in kind:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        else:
            wait_until(lambda n=number: len(core.submitted) > submitted + n, "the request is in the core")
        (reset if number % 3 == 0 else socket.socket.close)(connection)
    wait_until(lambda: core.aborts == aborts + ROUNDS, "every request is aborted")
    wait_until(lambda: not core.streams, "no stream runs")
    assert scripted.engine.open_streams == 0
    wait_until(lambda: scripted.open_tasks() <= tasks, "no task is left")
    wait_until(lambda: open_fds() <= fds, "no file descriptor is left")


def test_a_turn_that_was_left_is_rolled_back(scripted: Running) -> None:
    with httpx.Client(base_url=scripted.url) as client:
        session = {"instance_id": 77, "request_output_len": 4}
        first = client.post("/generate", json={"prompt": "one", **session}).json()["usage"]
        left = {"prompt": "[[hold]] two", "instance_id": 77, "sequence_start": False, "stream": True}
        connection = send(scripted, "/generate", left)
        connection.recv(4096)
        connection.close()
        wait_until(lambda: (0, 77) not in scripted.core.busy, "the turn ends")
        following = {"prompt": "three", "sequence_start": False, "sequence_end": True, **session}
        usage = client.post("/generate", json=following).json()["usage"]
        assert usage["history_tokens"] == first["prompt_tokens"] + first["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_is_logged(scripted: Running, caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    caplog.set_level(logging.INFO, "lmserve.access")
    connection = send(scripted, "/generate", {"prompt": "[[hold]]", "stream": stream})
    if stream:
        connection.recv(4096)
    else:
        wait_until(lambda: scripted.core.streams, "the request runs")
    connection.close()
    wait_until(lambda: any(r.name == "lmserve.access" for r in caplog.records), "a line is logged")
    (record,) = [r for r in caplog.records if r.name == "lmserve.access"]
    assert record.getMessage().endswith('"POST /generate HTTP/1.1" 499')


def test_a_client_that_reads_nothing_stalls_nobody(scripted: Running) -> None:
    body = {"prompt": "[[hold]]", "stream": True}
    stalled = [send(scripted, "/generate", body) for _ in range(3)]
    with httpx.Client(base_url=scripted.url) as client:
        for _ in range(20):
            reply = client.post("/generate", json={"prompt": "x", "request_output_len": 3})
            assert reply.json()["tokens"] == 3
    for connection in stalled:
        reset(connection)
    wait_until(lambda: not scripted.core.streams, "the stalled requests end")


def test_the_next_request_of_a_connection_waits_for_the_first(scripted: Running) -> None:
    """Two requests in one packet: the second must not be taken for a disconnect of the first."""
    data = json.dumps({"prompt": "x", "request_output_len": 3}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection(scripted.address, timeout=10) as connection:
        connection.sendall((head + data) * 2)
        said = b""
        while said.count(b'"tokens": 3') < 2:
            chunk = connection.recv(65536)
            assert chunk, said
            said += chunk
    assert said.count(b"HTTP/1.1 200 ") == 2


LONG = {"prompt": "x", "request_output_len": 4000, "ignore_eos": True, "instance_id": 900}


def is_at_baseline(running: Running) -> bool:
    stats = running.core.stats()
    return not any(stats[name] for name in ("running", "waiting", "open_requests", "owned_blocks"))


@pytest.mark.parametrize("stream", [False, True])
def test_no_block_is_left(real: Running, stream: bool) -> None:
    wait_until(lambda: is_at_baseline(real), "earlier requests end")
    tasks, fds = real.open_tasks(), open_fds()
    for number in range(ROUNDS):
        waits = number % 3 == 0
        # One that is waited for must not find its session busy.
        session = 1000 + number if waits else 900 + number % 4
        body = LONG | {"stream": stream, "instance_id": session if number % 2 else -1}
        connection = send(real, "/generate", body)
        if waits:
            wait_until(lambda: real.core.stats()["open_requests"] > 0, "the request runs")
        if stream and number % 5 == 0:
            assert connection.recv(4096).startswith(b"HTTP/1.1 ")
        (reset if number % 7 == 0 else socket.socket.close)(connection)
    wait_until(lambda: is_at_baseline(real), "the pool is at its baseline")
    assert real.engine.open_streams == 0
    wait_until(lambda: real.open_tasks() <= tasks, "no task is left")
    wait_until(lambda: open_fds() <= fds, "no file descriptor is left")


@pytest.mark.parametrize(("policy", "kept"), [("rollback", False), ("keep", True)])
def test_what_a_client_that_left_leaves_behind(real: Running, policy: str, kept: bool) -> None:
    with httpx.Client(base_url=real.url, timeout=30) as client:
        session = {"instance_id": 950, "request_output_len": 4}
        first = client.post("/generate", json={"prompt": "one", **session}).json()["usage"]
        left = LONG | {"instance_id": 950, "sequence_start": False, "stream": True, "on_disconnect": policy}
        connection = send(real, "/generate", left)
        while b'"tokens": 20' not in connection.recv(65536):
            pass
        connection.close()
        wait_until(lambda: is_at_baseline(real), "the turn ends")
        following = {"prompt": "three", "sequence_start": False, "sequence_end": True, **session}
        usage = client.post("/generate", json=following).json()["usage"]
        before = first["prompt_tokens"] + first["completion_tokens"]
        assert (usage["history_tokens"] > before + 20) if kept else (usage["history_tokens"] <= before)
