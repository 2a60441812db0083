"""The calls of a trainer, with the fields that it sends, and what it reads of the replies.

TRL: `VLLMClient.generate` and `VLLMClient.chat` of trl/generation/vllm_client.py, commit 02adeb8 of 2026.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import Running
from tiny_engine import byte_tokenizer, chat_template

SAMPLING = {"repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 16}
IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}
PROMPTS = [[72, 105], [72, 111, 33]]
MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        yield client


def post(client: httpx.Client, route: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = client.post(route, json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def number(name: str) -> int:
    assert name.startswith("token_id:")
    return int(name.removeprefix("token_id:"))


@pytest.mark.parametrize("alternatives", [0, 2])
def test_trl_generates_from_token_ids(client: httpx.Client, alternatives: int) -> None:
    model = client.get("/v1/models").json()["data"][0]["id"]
    own = {"n": 2, **SAMPLING, "logprobs": alternatives, "seed": 3, "structured_outputs": {"regex": "[a-z]{9}"}}
    choices = post(client, "/v1/completions", {"model": model, "prompt": PROMPTS, **IDS, **own})["choices"]
    assert [choice["prompt_token_ids"] for choice in choices[::2]] == PROMPTS
    assert len(choices) == 4
    for choice in choices:
        told = choice["logprobs"]
        positions = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
        ids = []
        for name, logprob, top in positions:
            ids.append(number(name))
            assert logprob <= 0
            assert len([number(each) for each in top or {}]) >= alternatives
        assert ids == choice["token_ids"]
        assert byte_tokenizer().decode(ids[:9], skip_special=False).isalpha()


@pytest.mark.parametrize("tools", [{}, {"tools": [TOOL], "tool_choice": "none"}])
def test_trl_chats(client: httpx.Client, tools: dict[str, Any]) -> None:
    model = client.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "n": 2, **SAMPLING, "logprobs": True, "top_logprobs": 0, **IDS, **tools}
    reply = post(client, "/v1/chat/completions", {**body, "messages": MESSAGES})
    if not tools:
        assert reply["prompt_token_ids"] == byte_tokenizer().encode(
            chat_template().render(b'[{"role": "user", "content": "Hello"}]')
        )
    assert len(reply["choices"]) == 2
    for choice in reply["choices"]:
        entries = choice["logprobs"]["content"]
        assert [number(entry["token"]) for entry in entries] == choice["token_ids"]
        assert all(entry["logprob"] <= 0 and entry["top_logprobs"] == [] for entry in entries)


def test_areal_asks_for_all_tokens_by_a_top_k_beyond_any_vocabulary(client: httpx.Client) -> None:
    model = client.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": PROMPTS[0], "seed": 3, "max_tokens": 16, "temperature": 1.0}
    text = [post(client, "/v1/completions", body | more)["choices"][0]["text"] for more in ({}, {"top_k": 10**8})]
    assert text[0] == text[1]
