"""`lmserve serve --worker process`: kill -9 of the process that computes, and of the server."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import byte_models
import httpx
import pytest
import transformers
from server_process import ServerProcess, children, serving

FIRST, SECOND = "What is the capital of Japan?", "How many people live there?"


@pytest.fixture
def server(smollm2_gguf: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    arguments = [str(smollm2_gguf), "--worker", "process", "--kv-memory", "256MiB", "--max-batch", "8"]
    with serving(tmp_path, *arguments) as server:
        yield server


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def turn(client: httpx.Client, session: int, prompt: str, *, start: bool) -> dict[str, Any]:
    body = {"prompt": prompt, "instance_id": session, "sequence_start": start, "temperature": 0}
    reply = client.post("/generate", json=body | {"request_output_len": 16})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[ServerProcess]:
    """A tiny model, split among two processes."""
    model = byte_models.save(transformers.LlamaConfig(**byte_models.SHAPE, num_hidden_layers=2), tmp_path / "model")
    arguments = [str(model), "--tensor-parallel", "2", "--threads", "1", "--max-batch", "8"]
    with serving(tmp_path, *arguments) as server:
        yield server


class Load:
    """Requests that would go on for long, each on a thread; their last frames once they have ended."""

    def __init__(self, url: str, count: int) -> None:
        self.last: list[dict[str, Any]] = []
        self._begun = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._ask, args=(url, 100 + index)) for index in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._begun.acquire(timeout=60)

    def _ask(self, url: str, session: int) -> None:
        body = {"prompt": "Count.", "instance_id": session, "request_output_len": 1500, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/generate", json=body | {"stream": True}, timeout=60) as reply:
            text = ""
            for chunk in reply.iter_text():
                if not text:
                    self._begun.release()
                text += chunk
        self.last.append(json.loads(text.split("\0")[-2]))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)


def test_the_death_of_the_process_that_computes_is_survived(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        expected = [turn(client, 5, FIRST, start=True)["text"], turn(client, 5, SECOND, start=False)["text"]]
        assert turn(client, 6, FIRST, start=True)["text"] == expected[0]
        (pid,) = children(server)
        load = Load(server.url, 4)
        os.kill(pid, signal.SIGKILL)
        down = []
        while (health := client.get("/health")).status_code != 200 or children(server) in ([], [pid]):
            down += [health] if health.status_code != 200 else []
            assert client.get("/health/live").status_code == 200
        load.join()
        assert [(frame["finish_reason"], frame["error"]["code"]) for frame in load.last] == [
            ("error", "worker_unavailable")
        ] * 4
        assert {reply.json()["error"]["code"] for reply in down} == {"worker_unavailable"}
        assert all(reply.headers["retry-after"] == "2" for reply in down)
        # The session stands where it was: the tokens that are computed anew are the same.
        again = turn(client, 6, SECOND, start=False)
        assert again["text"] == expected[1]
        assert again["usage"]["history_tokens"] > 0
        assert again["usage"]["cached_tokens"] == 0
        assert metric(server, "lmserve_worker_restarts_total") == 1
        assert metric(server, "lmserve_worker_processes") == 1
        assert client.get("/v1/sessions/100").status_code == 404


def test_the_death_of_a_rank_is_survived(ranks: ServerProcess) -> None:
    with httpx.Client(base_url=ranks.url, timeout=60) as client:
        expected = [turn(client, 5, FIRST, start=True)["text"], turn(client, 5, SECOND, start=False)["text"]]
        assert turn(client, 6, FIRST, start=True)["text"] == expected[0]
        before = children(ranks)
        assert metric(ranks, "lmserve_worker_processes") == len(before) == 2
        load = Load(ranks.url, 4)
        os.kill(before[1], signal.SIGKILL)
        load.join()
        assert [frame["error"]["code"] for frame in load.last] == ["worker_unavailable"] * 4
        wait_until(lambda: len(set(children(ranks)) - set(before)) == 2 and client.get("/health").status_code == 200)
        assert turn(client, 6, SECOND, start=False)["text"] == expected[1]
        assert metric(ranks, "lmserve_worker_restarts_total") == 1
        # The other rank was ended with it; nothing is left of either.
        assert all(map(is_gone, before))
        again = children(ranks)
        ranks.process.kill()
        wait_until(lambda: all(map(is_gone, again)))


def test_a_process_that_dies_while_nothing_runs_costs_no_request(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        expected = [turn(client, 5, FIRST, start=True)["text"], turn(client, 5, SECOND, start=False)["text"]]
        turn(client, 6, FIRST, start=True)
        (pid,) = children(server)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: children(server) not in ([], [pid]) and client.get("/health").status_code == 200)
        assert turn(client, 6, SECOND, start=False)["text"] == expected[1]


def test_nothing_is_left_of_a_server_that_is_killed(server: ServerProcess) -> None:
    (pid,) = children(server)
    load = threading.Thread(target=_ask_in_vain, args=(server.url,))
    load.start()
    wait_until(lambda: metric(server, "lmserve_requests_running") == 1)
    server.process.kill()
    wait_until(lambda: is_gone(pid))
    load.join(60)


def test_a_server_that_is_told_to_stop_ends_its_processes(server: ServerProcess) -> None:
    (pid,) = children(server)
    server.process.terminate()
    assert server.process.wait(60) == 0
    assert is_gone(pid)


def metric(server: ServerProcess, name: str) -> float:
    found = re.search(rf"^{name}\{{.*\}} (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def _ask_in_vain(url: str) -> None:
    body = {"prompt": "Count.", "request_output_len": 1500, "ignore_eos": True}
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"{url}/generate", json=body, timeout=60)
