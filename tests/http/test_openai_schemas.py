"""Replies and stream chunks of OpenAI's routes against the models of its own SDK: every type exact, no key unknown.

The SDK reads leniently (any key, any string for a number); here its models are held to what they declare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from conftest import MODEL, NAMES, Running
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter, ValidationError

HELLO = [{"role": "user", "content": "Hello there"}]
CHAT = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "ignore_eos": True}
COMPLETION = {"model": MODEL, "prompt": "Hello", "max_tokens": 6, "ignore_eos": True}
RESPONSE = {"model": MODEL, "input": "Hello", "max_output_tokens": 6, "ignore_eos": True}

# Keys that the SDK does not declare: in a model's card, LMDeploy's and ours for the model's own sampling; vLLM's for a
# prompt's log-probabilities; a token's bytes in the Responses API's deltas as everywhere else, and one that OpenAI's
# API sends.
ADDED = {
    "Model": {"root", "parent", "permission", "max_model_len", "default_sampling_params"},
    "ChatCompletion": {"prompt_logprobs"},
    "Logprob": {"bytes"},
    "LogprobTopLogprob": {"bytes"},
    "Response": {"store"},
}


def additions(value: Any) -> Iterator[str]:
    """Keys of a parsed value that its model does not declare."""
    if isinstance(value, BaseModel):
        name = type(value).__name__
        yield from (f"{name}.{key}" for key in set(value.model_extra or ()) - ADDED.get(name, set()))
        for field in type(value).model_fields:
            yield from additions(getattr(value, field))
    elif isinstance(value, dict):
        yield from (found for each in value.values() for found in additions(each))
    elif isinstance(value, list):
        yield from (found for each in value for found in additions(each))


def hold(model: Any, given: str | bytes) -> Any:
    """The JSON as `model`, once it is exactly that."""
    parsed = TypeAdapter(model).validate_json(given, strict=True)
    assert not list(additions(parsed))
    return parsed


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> bytes:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.content


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[str]:
    """The `data` of each event before `[DONE]`."""
    lines = post(client, path, body | {"stream": True}).decode().split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return data[:-1] if data[-1] == "[DONE]" else data


CHATS = [
    {},
    {"n": 3},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 4, "n": 2},
    {"ignore_eos": False, "max_tokens": 200},
    {"stop": ["e"], "max_tokens": 50},
    {"session_id": 91},
]


@pytest.mark.parametrize("options", CHATS)
def test_chat_completions(client: httpx.Client, options: dict[str, Any]) -> None:
    reply = hold(ChatCompletion, post(client, "/v1/chat/completions", CHAT | options))
    assert len(reply.choices) == options.get("n", 1)
    assert reply.usage is not None
    # A session may have one turn at a time, and keeps what it has.
    for more in ({}, {"stream_options": {"include_usage": True}}):
        chunks = [
            hold(ChatCompletionChunk, each) for each in events(client, "/v1/chat/completions", CHAT | options | more)
        ]
        assert len(chunks) >= 3
        assert (chunks[-1].usage is not None) == bool(more)
        assert {choice.index for chunk in chunks for choice in chunk.choices} == set(range(options.get("n", 1)))


def test_prompt_logprobs(client: httpx.Client) -> None:
    hold(ChatCompletion, post(client, "/v1/chat/completions", CHAT | {"prompt_logprobs": 2}))


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 2}, {"logprobs": 3}, {"echo": True}, {"prompt": ["a", "b"]}, {"prompt": [72, 105]}, {"best_of": 3}],
)
def test_completions(client: httpx.Client, options: dict[str, Any]) -> None:
    reply = hold(Completion, post(client, "/v1/completions", COMPLETION | options))
    assert reply.usage is not None
    if "best_of" in options:
        return
    chunks = [hold(Chunk, each) for each in events(client, "/v1/completions", COMPLETION | options)]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == 0)


class Chunk(Completion):
    """A chunk of a streamed completion: OpenAI declares no other model for it, and its reason is null until the end."""

    choices: list[ChunkChoice]


class ChunkChoice(openai.types.CompletionChoice):
    """As above."""

    finish_reason: str | None = None


Chunk.model_rebuild()


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"input": ["a", "b"], "dimensions": 4}])
def test_embeddings(client: httpx.Client, options: dict[str, Any]) -> None:
    body = {"model": MODEL, "input": "Hello"} | options
    assert hold(CreateEmbeddingResponse, post(client, "/v1/embeddings", body)).data


def test_models(client: httpx.Client) -> None:
    listing = client.get("/v1/models").json()
    assert listing.keys() == {"object", "data"}
    assert [hold(Model, json.dumps(card)).id for card in listing["data"]] == NAMES
    hold(Model, client.get(f"/v1/models/{MODEL}").content)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"instructions": "Be brief."},
        {"store": False},
    ],
)
def test_responses(client: httpx.Client, options: dict[str, Any]) -> None:
    reply = hold(Response, post(client, "/v1/responses", RESPONSE | options))
    if options.get("store", True):
        hold(Response, client.get(f"/v1/responses/{reply.id}").content)
    found = [hold(ResponseStreamEvent, each) for each in events(client, "/v1/responses", RESPONSE | options)]
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert {"response.created", "response.output_text.delta"} <= {event.type for event in found}


@pytest.mark.parametrize(
    "broken",
    [
        {"created": "1"},
        {"object": "chat"},
        {"choices": [{"index": 0}]},
        {"usage": {"prompt_tokens": 1.5}},
        {"unknown": 1},
    ],
)
def test_what_is_otherwise_is_found(client: httpx.Client, broken: dict[str, Any]) -> None:
    """The SDK itself would take each of these."""
    reply = json.loads(post(client, "/v1/chat/completions", CHAT))
    with pytest.raises((ValidationError, AssertionError)):
        hold(ChatCompletion, json.dumps(reply | broken))
