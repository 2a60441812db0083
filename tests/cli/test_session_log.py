"""Sessions that outlive the server, whichever way it ends: real processes, really killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from server_process import ServerProcess, serving

SETTINGS = ["--max-model-len", "1024", "--kv-memory", "64MiB"]
LONG = {"prompt": "Count to a thousand.", "request_output_len": 600, "ignore_eos": True, "stream": True}


def start(folder: Path, *arguments: str) -> Any:
    """The default model over the log in `folder`."""
    return serving(folder, *SETTINGS, "--session-dir", str(folder / "sessions"), *arguments)


def turn(server: ServerProcess, session: int, prompt: str, *, key: str | None = None, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "instance_id": session, "sequence_start": False, "request_output_len": 12}
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    response = httpx.post(
        f"{server.url}/generate", json=body | {"temperature": 0} | fields, headers=headers, timeout=120
    )
    assert response.status_code == 200, response.text
    return response.json()


def end(server: ServerProcess, how: signal.Signals) -> None:
    server.process.send_signal(how)
    code = server.process.wait(30)
    assert code == (0 if how == signal.SIGTERM else -how)


def talk(server: ServerProcess, session: int, prompts: list[str]) -> list[str]:
    return [turn(server, session, prompt)["text"] for prompt in prompts]


def failure(folder: Path) -> str:
    """What a server says that cannot have the log in `folder`."""
    command = [sys.executable, "-m", "lmserve", "serve", *SETTINGS, "--port", "0"]
    command += ["--session-dir", str(folder / "sessions")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_conversation_goes_on_as_if_nothing_had_happened(tmp_path: Path, smollm2_gguf: Path) -> None:
    assert smollm2_gguf.is_file()
    prompts = ["My name is Ada.", "What is my name?", "Thank you.", "Good night."]
    log = tmp_path / "sessions" / "sessions.log"

    with start(tmp_path, "--session-fsync", "never") as server:
        texts = [turn(server, 7, prompts[0], sequence_start=True)["text"], *talk(server, 7, prompts[1:2])]
        # A turn that runs when the server dies is none.
        running = LONG | {"instance_id": 7, "sequence_start": False}
        with httpx.stream("POST", f"{server.url}/generate", json=running, timeout=60) as reply:
            chunks = reply.iter_raw()
            next(chunks)
            end(server, signal.SIGKILL)
            chunks.close()

    with start(tmp_path) as server:
        cards = httpx.get(f"{server.url}/v1/sessions").json()["data"]
        assert [(card["id"], card["turns"], card["busy"]) for card in cards] == [(7, 2, False)]
        assert f"1 sessions of {cards[0]['tokens']} tokens were restored" in server.output()
        texts += talk(server, 7, prompts[2:3])
        end(server, signal.SIGTERM)

    whole = log.read_bytes()
    log.write_bytes(whole + b"half a rec")
    with start(tmp_path) as server:
        assert "WARNING" in server.output()
        assert "10 bytes were cut off its end, and kept in sessions.log.damaged-" in server.output()
        assert httpx.get(f"{server.url}/v1/sessions/7").json()["turns"] == 3
        texts += talk(server, 7, prompts[3:])
        # The same conversation without a break.
        assert texts == [turn(server, 8, prompts[0], sequence_start=True)["text"], *talk(server, 8, prompts[1:])]
        assert "is in use by another running server" in failure(tmp_path)
        end(server, signal.SIGTERM)

    assert [path.read_bytes() for path in log.parent.glob("*.damaged-*")] == [b"half a rec"]


def test_damage_is_told_and_costs_no_other_session(tmp_path: Path, smollm2_gguf: Path) -> None:
    assert smollm2_gguf.is_file()
    log = tmp_path / "sessions" / "sessions.log"
    with start(tmp_path) as server:
        turn(server, 1, "My name is Ada.", sequence_start=True)
        turn(server, 2, "My name is Bob.", sequence_start=True)
        first = log.stat().st_size
        turn(server, 1, "What is my name?")
        turn(server, 2, "What is my name?")
        end(server, signal.SIGTERM)
    damaged = bytearray(log.read_bytes())
    damaged[first + 100] ^= 1
    log.write_bytes(damaged)

    check = sessions_command("check", log.parent)
    assert check.returncode == 1
    assert "session 1: turn 2 lost; it is read-only at turn 1" in check.stdout
    assert log.read_bytes() == damaged
    with start(tmp_path) as server:
        assert "session 1: turn 2 lost; it is read-only at turn 1" in server.output()
        cards = httpx.get(f"{server.url}/v1/sessions").json()["data"]
        assert [(card["turns"], card["read_only"]) for card in cards] == [(1, True), (2, False)]
        body = {"prompt": "Go on.", "instance_id": 1, "sequence_start": False, "request_output_len": 4}
        refused = httpx.post(f"{server.url}/generate", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "session_damaged")
        assert httpx.post(f"{server.url}/v1/sessions/1/rewind", json={"turns": 1}).json()["read_only"] is False
        turn(server, 1, "Go on.")
        end(server, signal.SIGTERM)
    check = sessions_command("check", log.parent)
    assert (check.returncode, check.stdout.splitlines()[-1]) == (0, "nothing is lost")


def sessions_command(action: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmserve", "sessions", action, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def faulty(server: ServerProcess) -> int:
    """What /metrics says of the session log."""
    (value,) = re.findall(
        r"^lmserve_session_log_faulty\{.*\} (\d)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE
    )
    return int(value)


def test_a_folder_that_is_deleted_is_made_again_with_all_that_was_said(tmp_path: Path, smollm2_gguf: Path) -> None:
    assert smollm2_gguf.is_file()
    folder = tmp_path / "sessions"
    with start(tmp_path) as server:
        turn(server, 1, "My name is Ada.", sequence_start=True)
        shutil.rmtree(folder)
        turn(server, 2, "My name is Bob.", sequence_start=True)
        # Something else in the log's place is nobody's to delete.
        (folder / "sessions.log").unlink()
        os.mkfifo(folder / "sessions.log")
        body = {"prompt": "Go on.", "instance_id": 2, "sequence_start": False, "request_output_len": 4}
        refused = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_failed")
        assert faulty(server) == 1
        health = httpx.get(f"{server.url}/health").json()
        assert (health["status"], [fault["code"] for fault in health["faults"]]) == ("degraded", ["storage_failed"])
        assert httpx.get(f"{server.url}/health/live").json() == {"status": "ok"}
        (folder / "sessions.log").unlink()
        deadline = time.monotonic() + 60
        while faulty(server):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        turn(server, 2, "What is my name?")
        assert server.output().count("are refused (storage_failed)") == 1
        end(server, signal.SIGKILL)
    with start(tmp_path) as server:
        cards = httpx.get(f"{server.url}/v1/sessions").json()["data"]
        assert [(card["id"], card["turns"]) for card in cards] == [(1, 1), (2, 2)]


def test_keys_find_their_own_sessions_in_any_order(tmp_path: Path, smollm2_gguf: Path) -> None:
    assert smollm2_gguf.is_file()
    ada, bob = "key-of-ada", "key-of-bob"
    with start(tmp_path, "--api-key", ada, "--api-key", bob) as server:
        turn(server, 7, "I am Ada.", key=ada, sequence_start=True)
        turn(server, 7, "I am Bob.", key=bob, sequence_start=True)
        end(server, signal.SIGKILL)
    log = (tmp_path / "sessions" / "sessions.log").read_bytes()
    assert not any(key.encode() in log for key in (ada, bob))
    with start(tmp_path, "--api-key", "key-of-eve", "--api-key", bob, "--api-key", ada) as server:
        for key, name in ((ada, "Ada"), (bob, "Bob"), ("key-of-eve", None)):
            headers = {"Authorization": f"Bearer {key}"}
            response = httpx.get(f"{server.url}/v1/sessions/7/transcript", headers=headers)
            assert response.status_code == (404 if name is None else 200)
            assert name is None or f"I am {name}." in response.json()["turns"][0]["input"]


def respond(server: ServerProcess, text: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "SmolLM2-135M-Instruct", "input": text, "max_output_tokens": 12, "temperature": 0} | fields
    response = httpx.post(f"{server.url}/v1/responses", json=body, timeout=120)
    assert response.status_code == 200, response.text
    if "stream" not in fields:
        return response.json()
    return json.loads(response.text.rpartition("\ndata: ")[2])["response"]


def stored(server: ServerProcess, response_id: str) -> tuple[bytes, bytes]:
    response = httpx.get(f"{server.url}/v1/responses/{response_id}")
    items = httpx.get(f"{server.url}/v1/responses/{response_id}/input_items")
    assert (response.status_code, items.status_code) == (200, 200)
    return response.content, items.content


def test_stored_responses_are_there_and_go_on(tmp_path: Path, smollm2_gguf: Path) -> None:
    assert smollm2_gguf.is_file()
    asked: dict[str, Any] = {"text": "What is my name?", "instructions": "Be brief."}
    with start(tmp_path, "--session-fsync", "never") as server:
        first = respond(server, "My name is Ada.", instructions="Be brief.")
        whole = respond(server, **asked, previous_response_id=first["id"])
        gone = respond(server, "Forget me.")
        assert httpx.delete(f"{server.url}/v1/responses/{gone['id']}").status_code == 200
        streamed = respond(server, "My name is Bob.", stream=True)
        before = [stored(server, response["id"]) for response in (first, whole, streamed)]
        end(server, signal.SIGKILL)
    with start(tmp_path) as server:
        assert "3 stored responses were restored" in server.output()
        assert [stored(server, response["id"]) for response in (first, whole, streamed)] == before
        assert httpx.get(f"{server.url}/v1/responses/{gone['id']}").status_code == 404
        again = respond(server, **asked, previous_response_id=first["id"])
        assert again["output"][0]["content"] == whole["output"][0]["content"]
        # The instructions are known to be there already.
        assert again["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
        respond(server, "Who am I?", previous_response_id=streamed["id"])
        end(server, signal.SIGTERM)
