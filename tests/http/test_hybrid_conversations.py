"""A model with recurrent layers takes conversations up where they ended: what each turn computes is counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import byte_models
import httpx
import pytest
import transformers
from byte_models import turn
from conftest import MODEL

TURNS = 20
BLOCK = 16
EVERY = 64
SYSTEM = "You answer in letters." * 4
ids = itertools.count(1)

# What a tiny model says by itself is no text. One that says letters says the same tokens when they are sent back.
LETTERS = {str(token): 100 for token in range(ord("a"), ord("z") + 1)}

CONFIGS: dict[str, Callable[[], Any]] = {
    "lfm2": byte_models.lfm2,
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.3,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_local_experts=4,
        shared_intermediate_size=32,
        mamba_n_heads=4,
        mamba_d_state=8,
    ),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    return byte_models.save(CONFIGS[request.param](), path)


def serve(folder: Path, **changes: Any) -> Iterator[httpx.Client]:
    settings = {"kv_memory": 16 << 20, "state_every": EVERY} | changes
    yield from byte_models.serve(byte_models.planned(folder, **settings))


@pytest.fixture(scope="module", params=["cpu", "torch"])
def web(request: pytest.FixtureRequest, folder: Path) -> Iterator[httpx.Client]:
    quantize = "none" if request.param == "cpu" else "auto"
    yield from serve(folder, ops=request.param, quantize=quantize)


@pytest.fixture(scope="module")
def forgetful(folder: Path) -> Iterator[httpx.Client]:
    """The same model, which computes everything anew."""
    yield from serve(folder, ops="cpu", prefix_cache=False)


def computed(usage: dict[str, int]) -> int:
    return usage["prompt_tokens"] - usage["cached_tokens"]


def words(number: int) -> str:
    return f"This is message {number} of a conversation; it says little. " * (1 + number % 3)


def test_each_turn_of_a_session_computes_its_new_tokens_alone(web: httpx.Client, forgetful: httpx.Client) -> None:
    session = next(ids)
    before = 0
    for number in range(TURNS):
        start = {"sequence_start": True} if number == 0 else {}
        reply = turn(web, session, words(number), **start)
        usage = reply["usage"]
        assert usage["history_tokens"] == before
        # The last token of the answer was sampled, but not computed.
        assert computed(usage) == usage["prompt_tokens"] - max(before - 1, 0)
        before = usage["prompt_tokens"] + usage["completion_tokens"]
        assert reply["text"] == turn(forgetful, session, words(number), **start)["text"]


def test_forks_and_rewinds_compute_what_is_new_alone(web: httpx.Client, forgetful: httpx.Client) -> None:
    session = next(ids)
    lengths, texts = [], []
    for number in range(5):
        reply = turn(web, session, words(number), sequence_start=number == 0)
        lengths.append(reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"])
        texts.append(words(number))
    for kept in (5, 3, 2):
        forks = [next(ids) for _ in range(2)]
        for fork in forks:
            made = web.post(f"/v1/sessions/{session}/fork", json={"session_id": fork, "turns": kept})
            assert made.status_code == 200, made.text
        asked = [f"And now, {fork}?" for fork in forks]
        replies = [turn(web, fork, text) for fork, text in zip(forks, asked, strict=True)]
        # A fork begins where the turn ended, whatever others have written behind it since.
        begins = [reply["usage"]["cached_tokens"] - lengths[kept - 1] for reply in replies]
        # The second may find how the first one's message begins.
        assert begins[0] == -1 <= begins[1] < 20
        assert [reply["text"] for reply in replies] == [said(forgetful, texts[:kept], text) for text in asked]
    web.post(f"/v1/sessions/{session}/rewind", json={"turns": 2}).raise_for_status()
    reply = turn(web, session, "What then?")
    assert reply["usage"]["cached_tokens"] == lengths[1] - 1
    assert reply["text"] == said(forgetful, texts[:2], "What then?")


def said(web: httpx.Client, before: list[str], text: str) -> str:
    """The answer to a text in a session of its own, after others."""
    session = next(ids)
    for number, other in enumerate(before):
        turn(web, session, other, sequence_start=number == 0)
    return str(turn(web, session, text)["text"])


def chat(web: httpx.Client, messages: list[dict[str, str]], **changes: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 20, "logit_bias": LETTERS}
    reply = web.post("/v1/chat/completions", json=body | changes)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def cached(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_client_that_sends_its_whole_history_computes_what_is_new_alone(
    web: httpx.Client, forgetful: httpx.Client
) -> None:
    messages = [{"role": "system", "content": SYSTEM}]
    before = 0
    for number in range(TURNS):
        messages.append({"role": "user", "content": words(number)})
        reply = chat(web, messages)
        usage = reply["usage"]
        if number:
            assert cached(reply) == before - 1
        before = usage["prompt_tokens"] + usage["completion_tokens"]
        said = reply["choices"][0]["message"]["content"]
        assert said == chat(forgetful, messages)["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": said})


def test_an_answer_that_comes_back_changed_is_missed_and_the_message_before_it_is_found(web: httpx.Client) -> None:
    messages = [{"role": "user", "content": f"Number {next(ids)}. {words(2)}"}]
    first = chat(web, messages)
    header = len("<|im_start|>assistant\n") - len("<|im_start|>") + 1
    said = first["choices"][0]["message"]["content"]
    changed = [*messages, {"role": "assistant", "content": said.upper()}, {"role": "user", "content": "And?"}]
    second = chat(web, changed)
    assert cached(second) == first["usage"]["prompt_tokens"] - header
    # So is the message of a client that asks again.
    assert cached(chat(web, messages)) == first["usage"]["prompt_tokens"] - header


def test_conversations_share_a_system_prompt_and_choices_share_their_prompt(web: httpx.Client) -> None:
    system = f"System {next(ids)}. {SYSTEM}"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "One."}]
    chat(web, messages)
    other = chat(web, [messages[0], {"role": "user", "content": "Two, which is another."}])
    assert cached(other) >= len(system)
    long = [{"role": "user", "content": f"Number {next(ids)}. {words(5)}"}]
    reply = chat(web, long, n=3, temperature=1.0, seed=1)
    prompt, computed_before = reply["usage"]["prompt_tokens"], counted(web)
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert len(set(texts)) == 3
    again = chat(web, long, n=3, temperature=1.0, seed=1)
    assert [choice["message"]["content"] for choice in again["choices"]] == texts
    # Of each choice the header of the answer, which comes behind what is kept, and its own tokens but the last.
    header = len("<|im_start|>assistant\n") - len("<|im_start|>") + 1
    assert counted(web) - computed_before == 3 * (header + 19)
    assert cached(again) == prompt - header


def counted(web: httpx.Client) -> int:
    lines = web.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("lmserve_computed_tokens_total")]
    return int(line.split()[-1])


def test_long_prompts_are_kept_at_intervals_and_the_metrics_say_so(web: httpx.Client) -> None:
    prompt = f"{next(ids)} " + "x" * 300
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 1}
    web.post("/v1/completions", json=body).raise_for_status()
    other = web.post("/v1/completions", json=body | {"prompt": prompt[:200] + "y" * 50})
    assert cached(other.json()) == 200 // EVERY * EVERY
    metrics = web.get("/metrics").text
    for name in ("lmserve_state_snapshots_total", "lmserve_state_snapshot_hits_total"):
        (line,) = [line for line in metrics.splitlines() if line.startswith(name)]
        assert float(line.split()[-1]) > 0
    (line,) = [line for line in metrics.splitlines() if line.startswith("lmserve_state_slots") and "snapshot" in line]
    assert float(line.split()[-1]) > 0
