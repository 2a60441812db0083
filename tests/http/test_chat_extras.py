"""Parameters of /v1/chat/completions that other servers added to OpenAI's, over the real core."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import MODEL, Running, serve_core
from lmserve import _core
from tiny_engine import EOS, FormulaRunner, byte_tokenizer

from wire import error_of, events_of

TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ " (" ~ message.name ~ ")" if message.name }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ date_string }}
{%- endif -%}
"""
USER = {"role": "user", "content": "Hello there"}
OPEN = {"role": "assistant", "content": "The answer is"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    template = _core.ChatTemplate(TEMPLATE, b'{"eos_token": "<|im_end|>"}')
    core = _core.Engine(FormulaRunner(), byte_tokenizer(), template, eos_token_ids=[EOS])
    with serve_core(core) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER], "max_tokens": 40, "seed": 5, "ignore_eos": True, **fields}


def chat(client: httpx.Client, **fields: Any) -> tuple[str, int]:
    """The answer, and how many tokens the prompt had."""
    response = client.post("/v1/chat/completions", json=ask(**fields))
    assert response.status_code == 200, response.text
    reply = response.json()
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]


def continued(client: httpx.Client, prompt: str) -> tuple[str, int]:
    """What follows `prompt` as it stands."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 40, "seed": 5, "ignore_eos": True}
    reply = client.post("/v1/completions", json=body).json()
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens"]


ASKED = "<|im_start|>user\nHello there<|im_end|>\n"


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, f"{ASKED}<|im_start|>assistant\n"),
        ({"add_generation_prompt": True}, f"{ASKED}<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, ASKED),
        (
            {"messages": [USER, OPEN], "continue_final_message": True},
            f"{ASKED}<|im_start|>assistant\nThe answer is",
        ),
        ({"chat_template_kwargs": {"enable_thinking": False}}, f"{ASKED}<|im_start|>assistant\n<think></think>"),
        ({"chat_template_kwargs": {"date_string": "today"}}, f"{ASKED}<|im_start|>assistant\ntoday"),
        ({"chat_template_kwargs": {"thinking_budget": 5}}, f"{ASKED}<|im_start|>assistant\n"),
        ({"chat_template_kwargs": {}}, f"{ASKED}<|im_start|>assistant\n"),
        (
            {"messages": "Hello there", "chat_template_kwargs": {"date_string": "today"}},
            f"{ASKED}<|im_start|>assistant\ntoday",
        ),
        (
            {"messages": [USER | {"name": "Ann"}]},
            "<|im_start|>user (Ann)\nHello there<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be "}] * 2}, USER]},
            f"<|im_start|>system\nBe Be <|im_end|>\n{ASKED}<|im_start|>assistant\n",
        ),
    ],
)
def test_the_template_is_given_it(client: httpx.Client, fields: dict[str, Any], prompt: str) -> None:
    assert chat(client, **fields) == continued(client, prompt)


def test_stopping(client: httpx.Client) -> None:
    text, _ = chat(client)
    at = next(i for i, character in enumerate(text) if character.isascii() and i > 3 and character not in text[:i])
    assert chat(client, stop=text[at])[0] == text[:at]
    assert chat(client, stop=text[at], include_stop_str_in_output=True)[0] == text[: at + 1]
    stop_token_ids = [ord(text[at])]
    assert len(chat(client, stop_token_ids=stop_token_ids)[0]) <= at + 1
    assert chat(client, stop_token_ids=stop_token_ids, min_tokens=40)[0] == text


def test_special_tokens_in_the_text(client: httpx.Client) -> None:
    plain, _ = chat(client, max_tokens=100)
    special, _ = chat(client, max_tokens=100, skip_special_tokens=False)
    assert "<|im_end|>" not in plain
    assert special != plain
    assert special.replace("<|im_end|>", "") == plain


def test_logprobs_of_the_prompt(client: httpx.Client) -> None:
    reply = client.post("/v1/chat/completions", json=ask(prompt_logprobs=0, n=2)).json()
    prompt = f"{ASKED}<|im_start|>assistant\n"
    first, *others = reply["prompt_logprobs"]
    assert first is None
    assert len(others) == reply["usage"]["prompt_tokens"] - 1
    decoded = "<|im_start|>" + "".join(token["decoded_token"] for position in others for token in position.values())
    assert decoded == prompt
    (token_id,) = others[0]
    assert others[0][token_id] == {"logprob": -int(token_id) / 64, "rank": None, "decoded_token": "u"}


def test_usage_in_every_chunk(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = ask(stream=True, stream_options=options, max_tokens=5)
    *chunks, last = events_of(client.post("/v1/chat/completions", json=body).content)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert (counts[0], counts[-1]) == (0, 5)
    assert counts == sorted(counts)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_the_model_is_text_only_and_nothing_is_fetched(client: httpx.Client, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/cat.png"
        part = {"type": kind, kind: {"url": url, "data": url, "file_data": url}}
        messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
        response = client.post("/v1/chat/completions", json=ask(messages=messages))
        error = error_of(response, 400, "unsupported_content_type", "messages[0].content[1].type")
        assert "text-only" in error["message"]
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_priority_reaches_the_core(scripted: Running, scripted_client: httpx.Client) -> None:
    assert scripted_client.post("/v1/chat/completions", json=ask(priority=-7)).status_code == 200
    assert scripted.core.submitted[-1]["priority"] == -7


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 41}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"priority": 2**31}, "priority"),
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {"messages": [USER, OPEN], "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "session_id": 5}, "prompt_logprobs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"date_string": "x" * 513}}, "chat_template_kwargs.date_string"),
    ],
)
def test_invalid_parameters_are_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error_of(client.post("/v1/chat/completions", json=ask(**fields)), 400, param=param)


def test_the_limits_are_said(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=ask(logit_bias={"258": 1}))
    message = error_of(response, 400, "invalid_value", "logit_bias")["message"]
    assert "[0, 258)" in message
    assert json.loads(response.content)["error"]["message"].endswith("258 was given")
