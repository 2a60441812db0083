"""What was computed outlives the server: real processes, really killed, and what they compute again is counted."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import transformers
from byte_models import SHAPE, lfm2, save
from server_process import ServerProcess, serving

BLOCK = 16
CONVERSATIONS = 6
SETTINGS = ("--kv-memory", "16MiB", "--quantize", "none", "--max-batch", "4", "--max-model-len", "2048")
# Drafts are computed, too: without them, what is computed is what no tier had.
SETTINGS += ("--speculate", "0")


def llama() -> Any:
    return transformers.LlamaConfig(**SHAPE, num_hidden_layers=2)


def turn(server: ServerProcess, session: int, text: str, *, first: bool = False) -> dict[str, Any]:
    body = {
        "prompt": text,
        "instance_id": session,
        "sequence_start": first,
        "request_output_len": 20,
        "temperature": 0,
        "ignore_eos": True,
    }
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def metric(server: ServerProcess, name: str) -> int:
    """The sum over the metric's labels."""
    values = re.findall(rf"^{name}(?:{{.*}})? (\d+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert values, name
    return sum(map(int, values))


def settle(server: ServerProcess, entries: int) -> None:
    """Wait until so many blocks and states are on the disk."""
    deadline = time.monotonic() + 30
    while (found := metric(server, "lmserve_tier_entries")) < entries:
        assert time.monotonic() < deadline, f"{found} of {entries}"
        time.sleep(0.02)
    assert found == entries


def kill(server: ServerProcess) -> None:
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(30)


def said(number: int) -> str:
    return f"This is message {number}, which says little, but takes its time to say it. " * (3 + number % 3)


def length(usage: dict[str, int]) -> int:
    return usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_killed_hybrid_goes_on_from_its_last_state_token_for_token(tmp_path: Path) -> None:
    model = save(lfm2(), tmp_path / "model")
    arguments = (str(model), *SETTINGS, "--session-dir", str(tmp_path / "sessions"))
    with serving(tmp_path, *arguments) as server:
        assert "of disk in" in server.output()
        turns = [turn(server, 1, said(number), first=number == 0) for number in range(3)]
        before = length(turns[-1]["usage"])
        settle(server, (before - 1) // BLOCK + len(turns))
        kill(server)
    with serving(tmp_path, *arguments) as server:
        resumed = turn(server, 1, said(3))
        # All but the last token of the answer, which was sampled but never computed.
        assert resumed["usage"]["cached_tokens"] == before - 1
        new = resumed["usage"]["prompt_tokens"] - before + 1
        assert metric(server, "lmserve_computed_tokens_total") == new + 19
        again = [turn(server, 2, said(number), first=number == 0) for number in range(4)]
        assert [reply["text"] for reply in again] == [reply["text"] for reply in [*turns, resumed]]
        kill(server)
    # A state that is damaged is a miss, and so is what lies before it without one.
    for file in (tmp_path / "sessions" / "kv").glob("s-*"):
        damaged = bytearray(file.read_bytes())
        damaged[100] ^= 1
        file.write_bytes(damaged)
    with serving(tmp_path, *arguments) as server:
        reply = turn(server, 2, said(4))
        assert reply["usage"]["cached_tokens"] == 0
        assert metric(server, "lmserve_tier_failures_total") > 0
        assert metric(server, "lmserve_requests_total") == 1


def test_resumed_conversations_read_what_they_would_compute(tmp_path: Path) -> None:
    model = save(llama(), tmp_path / "model")
    disk = f"{tmp_path / 'kept'},64MiB"
    arguments = (str(model), *SETTINGS, "--session-dir", str(tmp_path / "sessions"), "--kv-disk", disk)
    with serving(tmp_path, *arguments) as server:
        first = [turn(server, at, f"{at}: " + said(2) * 4, first=True) for at in range(CONVERSATIONS)]
        lengths = [length(reply["usage"]) for reply in first]
        blocks = sum((tokens - 1) // BLOCK for tokens in lengths)
        settle(server, blocks)
        kill(server)
    with serving(tmp_path, *arguments) as server:
        resumed = [turn(server, at, "And?")["usage"] for at in range(CONVERSATIONS)]
        prompts = sum(usage["prompt_tokens"] for usage in resumed)
        computed = metric(server, "lmserve_computed_tokens_total") - 19 * CONVERSATIONS
        assert computed == prompts - sum(usage["cached_tokens"] for usage in resumed)
        new = prompts - sum(lengths)
        assert computed - new < 0.03 * prompts
        assert metric(server, "lmserve_tier_hits_total") == blocks
        assert metric(server, "lmserve_failed_steps_total") == 0
        kill(server)


def test_flipped_bits_on_the_disk_change_no_token(tmp_path: Path) -> None:
    model = save(llama(), tmp_path / "model")
    arguments = (str(model), *SETTINGS, "--session-dir", str(tmp_path / "sessions"))
    disk = ("--kv-disk", f"{tmp_path / 'kept'},64MiB")
    with serving(tmp_path, *arguments, *disk) as server:
        first = [turn(server, at, f"{at}: " + said(2) * 2, first=True) for at in range(CONVERSATIONS)]
        settle(server, sum((length(reply["usage"]) - 1) // BLOCK for reply in first))
        kill(server)
    # Somewhere in the header, the contents or the checksum: of one file of three.
    generator = random.Random(5)
    for file in sorted((tmp_path / "kept").iterdir()):
        data = bytearray(file.read_bytes())
        if data and generator.random() < 1 / 3:
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            file.write_bytes(data)
    shutil.copytree(tmp_path / "sessions", tmp_path / "other")
    with serving(tmp_path, *arguments, *disk) as server:
        found = [turn(server, at, "And?") for at in range(CONVERSATIONS)]
        assert metric(server, "lmserve_tier_failures_total") > 0
        assert metric(server, "lmserve_tier_hits_total") > 0
        assert metric(server, "lmserve_failed_steps_total") == 0
        kill(server)
    with serving(tmp_path, *arguments[:-1], str(tmp_path / "other")) as server:
        expected = [turn(server, at, "And?") for at in range(CONVERSATIONS)]
        assert {reply["usage"]["cached_tokens"] for reply in expected} == {0}
    assert [reply["text"] for reply in found] == [reply["text"] for reply in expected]
