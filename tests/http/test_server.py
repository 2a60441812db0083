"""The server as a process: its port, its start and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from lmserve.server import BindError, bind, url_of

from wire import error_of, frames_of, wait_until

SCRIPT = """
import sys, time
from scripted_core import ScriptedCore
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.server import bind, serve

def load():
    time.sleep(float(sys.argv[1]))
    if sys.argv[2] == "broken":
        raise ValueError("no such model")
    return AsyncEngine(ScriptedCore(), max_model_len=4096)

app = create_app(load, ["tiny-model"])
serve(app, bind("127.0.0.1", 0), grace=1.0, on_listening=lambda url: print(url, flush=True))
print("stopped", flush=True)
"""


@contextmanager
def process(seconds_to_load: float = 0, kind: str = "good") -> Iterator[tuple[subprocess.Popen[str], str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    words = [sys.executable, "-c", SCRIPT, str(seconds_to_load), kind]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None
            url = child.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), child.stderr
            yield child, url
        finally:
            if child.poll() is None:
                child.kill()


def is_ready(url: str) -> bool:
    return httpx.get(f"{url}/health").status_code == 200


def end(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=20)
    return child.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_stops_on_a_signal(number: signal.Signals) -> None:
    with process() as (child, url):
        wait_until(lambda: is_ready(url), "the model is loaded")
        # An idle connection must not hold it.
        with httpx.Client(base_url=url) as client:
            client.get("/health")
            child.send_signal(number)
            assert end(child) == (0, "stopped\n", "")


def test_requests_while_the_model_is_loaded() -> None:
    with process(seconds_to_load=1.0) as (child, url):
        response = httpx.get(f"{url}/health")
        error_of(response, 503, "loading")
        assert int(response.headers["retry-after"]) > 0
        error_of(httpx.post(f"{url}/generate", json={"prompt": "x"}), 503, "loading")
        error_of(httpx.get(f"{url}/v1/models"), 503, "loading")
        assert httpx.get(f"{url}/docs").status_code == 200
        wait_until(lambda: is_ready(url), "the model is loaded")
        assert httpx.post(f"{url}/generate", json={"prompt": "x"}).status_code == 200
        child.send_signal(signal.SIGINT)
        assert end(child)[0] == 0


def test_a_server_that_is_loading_stops_on_a_signal() -> None:
    with process(seconds_to_load=15) as (child, url):
        error_of(httpx.get(f"{url}/health"), 503, "loading")
        child.send_signal(signal.SIGINT)
        assert end(child)[:2] == (0, "stopped\n")


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    with process(kind="broken") as (child, _):
        code, _, err = end(child)
        assert code == 1
        assert "ValueError: no such model" in err


def test_a_running_turn_may_end_and_new_ones_are_refused() -> None:
    with process() as (child, url):
        wait_until(lambda: is_ready(url), "the model is loaded")
        replies: list[httpx.Response] = []
        body = {"prompt": "[[pace 0.05]]", "stream": True}  # 12 tokens: 0.6 s
        thread = threading.Thread(target=lambda: replies.append(httpx.post(f"{url}/generate", json=body)))
        thread.start()
        time.sleep(0.2)
        child.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_ready(url), "the server drains")
        error_of(httpx.get(f"{url}/health"), 503, "draining")
        error_of(httpx.post(f"{url}/generate", json={"prompt": "x"}), 503, "draining")
        thread.join(20)
        assert frames_of(replies[0].content)[-1]["finish_reason"] == "stop"
        assert end(child)[0] == 0


def test_a_turn_beyond_the_grace_is_aborted_with_a_last_frame() -> None:
    with process() as (child, url):
        wait_until(lambda: is_ready(url), "the model is loaded")
        replies: list[httpx.Response] = []
        body = {"prompt": "[[hold]]", "stream": True}
        thread = threading.Thread(target=lambda: replies.append(httpx.post(f"{url}/generate", json=body)))
        thread.start()
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        thread.join(20)
        assert frames_of(replies[0].content)[-1]["finish_reason"] == "abort"
        assert end(child)[0] == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with process() as (child, url):
        wait_until(lambda: is_ready(url), "the model is loaded")
        body = {"prompt": "[[hold]]", "stream": True}
        with httpx.stream("POST", f"{url}/generate", json=body) as response:
            assert response.status_code == 200
            child.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert child.poll() is None
            child.send_signal(signal.SIGINT)
            assert end(child)[:2] == (130, "")


def test_bind() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(BindError, match=f"port {port} of 127.0.0.1 is in use"):
            bind("127.0.0.1", port)
    with pytest.raises(BindError, match="is not an address of this machine"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(BindError, match="cannot listen on"):
        bind("192.0.2.1", 0)
    with pytest.raises(BindError, match="70000"):
        bind("127.0.0.1", 70000)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_bind_ipv6() -> None:
    try:
        listener = bind("::1", 0)
    except BindError as error:
        pytest.skip(str(error))
    with listener:
        assert url_of(listener).startswith("http://[::1]:")
