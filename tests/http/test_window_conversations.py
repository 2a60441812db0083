"""A model whose layers give the blocks out of their window back goes on with conversations as if it had kept them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import byte_models
import httpx
import pytest
import transformers
from byte_models import SHAPE, turn

TURNS = 8
WINDOW = 40
ids = itertools.count(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("windows")
    config = transformers.Gemma3TextConfig(
        **SHAPE,
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    return byte_models.save(config, path)


def serve(folder: Path, **changes: Any) -> Iterator[httpx.Client]:
    plan = byte_models.planned(folder, **{"kv_memory": 4 << 20, "max_batch_tokens": 64} | changes)
    assert plan.memory.window == WINDOW
    yield from byte_models.serve(plan)


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[httpx.Client]:
    yield from serve(folder, ops="cpu")


@pytest.fixture(scope="module")
def forgetful(folder: Path) -> Iterator[httpx.Client]:
    """The same model, which computes everything anew."""
    yield from serve(folder, ops="cpu", prefix_cache=False)


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Iterator[httpx.Client]:
    """The same model with fewer window blocks than the turns of three conversations end in."""
    yield from serve(folder, ops="cpu", kv_memory=1 << 20, max_model_len=1024, max_batch=1)


def words(number: int) -> str:
    return f"This is message {number}; it says little. " * (1 + number % 3)


def said(web: httpx.Client, before: list[str], text: str) -> str:
    """The answer to a text in a session of its own, after others."""
    session = next(ids)
    for number, other in enumerate(before):
        turn(web, session, other, sequence_start=number == 0)
    return str(turn(web, session, text)["text"])


def windows(web: httpx.Client) -> dict[str, int]:
    """How many window blocks are in which state, once nothing runs."""
    found = re.findall(r'lmserve_window_blocks\{.*state="(\w+)".*\} (\d+)', web.get("/metrics").text)
    return {state: int(count) for state, count in found}


def test_each_turn_computes_its_new_tokens_alone(web: httpx.Client, forgetful: httpx.Client) -> None:
    session, before = next(ids), 0
    for number in range(TURNS):
        start = {"sequence_start": True} if number == 0 else {}
        reply = turn(web, session, words(number), **start)
        # The last token of the answer was sampled, but not computed.
        assert reply["usage"]["cached_tokens"] == max(before - 1, 0)
        before = reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"]
        assert reply["text"] == turn(forgetful, session, words(number), **start)["text"]
    assert before > 10 * WINDOW
    assert windows(web)["owned"] == 0


def test_forks_and_rewinds_to_the_end_of_a_turn_compute_what_is_new_alone(
    web: httpx.Client, forgetful: httpx.Client
) -> None:
    session, lengths, texts = next(ids), [], []
    for number in range(4):
        reply = turn(web, session, words(number), sequence_start=number == 0)
        lengths.append(reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"])
        texts.append(words(number))
    fork = next(ids)
    web.post(f"/v1/sessions/{session}/fork", json={"session_id": fork, "turns": 4}).raise_for_status()
    web.post(f"/v1/sessions/{session}/rewind", json={"turns": 2}).raise_for_status()
    for name, kept in ((fork, 4), (session, 2)):
        reply = turn(web, name, "What then?")
        # In whole blocks, where another has written on behind the turn; a message that begins alike is found, too.
        assert abs(reply["usage"]["cached_tokens"] - lengths[kept - 1]) < 16
        assert reply["text"] == said(forgetful, texts[:kept], "What then?")


def test_what_is_out_of_memory_is_computed_again(narrow: httpx.Client, forgetful: httpx.Client) -> None:
    sessions = [next(ids) for _ in range(3)]
    for number in range(5):
        for session in sessions:
            start = {"sequence_start": True} if number == 0 else {}
            text = f"{session}: {words(number)}"
            reply = turn(narrow, session, text, **start)
            assert reply["text"] == turn(forgetful, session, text, **start)["text"]
    narrow.post(f"/v1/sessions/{sessions[0]}/rewind", json={"turns": 1}).raise_for_status()
    reply = turn(narrow, sessions[0], "And?")
    assert reply["usage"]["cached_tokens"] < reply["usage"]["history_tokens"] - 16
    assert reply["text"] == said(forgetful, [f"{sessions[0]}: {words(0)}"], "And?")
    counts = windows(narrow)
    assert counts["owned"] == 0
    assert sum(counts.values()) < 3 * 5 * WINDOW // 16
