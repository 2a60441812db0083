"""A real server whose engine dies: what its clients are told, and how the process ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx

HTTP_TESTS = Path(__file__).parents[1] / "http"
# `lmserve` with a core that dies, as one whose thread panicked, when a line is written to its stdin.
SCRIPT = """
import sys, threading
from scripted_core import MAX_MODEL_LEN, ScriptedCore, generate_object
from lmserve import LmserveError
from lmserve.cli import main
from lmserve.engine import load
from lmserve.engine.async_engine import AsyncEngine

class DyingCore(ScriptedCore):
    error = None

    def die(self):
        sys.stdin.readline()
        with self.lock:
            self.error = LmserveError.new(503, "engine_unavailable", "the engine is down: its thread panicked")
            for stream in list(self.streams.values()):
                last = generate_object(stream, "", "error", error=self.error.error) + b"\\0"
                self._end(stream, lambda: last)

    def check_health(self):
        if self.error is not None:
            raise self.error

core = DyingCore()
load.ModelPlan.load_async_engine = lambda plan: AsyncEngine(core, max_model_len=MAX_MODEL_LEN)
threading.Thread(target=core.die, daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


def test_a_server_whose_engine_dies_tells_its_clients_and_ends_with_an_error(minilm_folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HTTP_TESTS), *sys.path])}
    words = [sys.executable, "-c", SCRIPT, "serve", str(minilm_folder), "--port", "0", "--served-model-name", "tiny"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            url = address_of(process)
            waiting = {"prompt": "[[hold]] Hello", "request_output_len": 4000, "stream": True}
            with (
                httpx.Client(base_url=url, timeout=60) as client,
                client.stream("POST", "/generate", json=waiting) as streamed,
            ):
                chunks = streamed.iter_text()
                assert '"finish_reason": null' in next(chunks)
                assert process.stdin is not None
                process.stdin.write("die\n")
                process.stdin.flush()
                # The stream's last words are the reason, and not a cut connection.
                *_, last, rest = "".join(chunks).split("\0")
                assert rest == ""
                frame = json.loads(last)
                assert (frame["finish_reason"], frame["error"]["code"]) == ("error", "engine_unavailable")
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1, errors
    assert errors.splitlines()[-1] == "lmserve: error: the engine is down: its thread panicked"
    assert "Traceback" not in errors


def address_of(process: subprocess.Popen[str]) -> str:
    """Of a server that is ready."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"API +(http://\S+)", line):
            break
    else:
        raise AssertionError(process.communicate()[1])
    deadline = time.monotonic() + 60
    while httpx.get(f"{match[1]}/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return match[1]
