"""Function calls and thoughts over HTTP and by the `openai` SDK, from a model that is made to say them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.engine.text import TextLayer
from tiny_engine import byte_tokenizer, chat_template, formula_engine

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, 7]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def sdk(real: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def real_client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    reply = client.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def saying(text: str) -> dict[str, str]:
    """A grammar that lets the model say `text` alone."""
    return {"guided_grammar": f"start: {json.dumps(text)}"}


def test_a_named_function_is_called_with_arguments_that_its_schema_allows(sdk: openai.OpenAI) -> None:
    for seed in range(10):
        reply = sdk.chat.completions.create(
            model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=NAMED, seed=seed, max_tokens=400
        )
        choice = reply.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.function.name == "get_weather"
        assert call.id.startswith("call_")
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_required_calls_and_nothing_else(real_client: httpx.Client) -> None:
    names = set()
    for seed in range(10):
        fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        (choice,) = ask(real_client, **fields, temperature=1, max_tokens=500)["choices"]
        (call,) = choice["message"]["tool_calls"]
        names.add(call["function"]["name"])
        json.loads(call["function"]["arguments"])
    assert names <= {"get_weather", "now"}


@pytest.mark.parametrize("tool_choice", ["required", NAMED])
def test_a_stream_says_the_same_as_a_whole_reply(sdk: openai.OpenAI, tool_choice: Any) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": tool_choice}
    options |= {"temperature": 0, "max_tokens": 500, "parallel_tool_calls": False}
    whole = sdk.chat.completions.create(**options).choices[0]
    calls: dict[int, list[str]] = {}
    chunks = list(sdk.chat.completions.create(**options, stream=True))
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or []:
            if delta.id is not None:
                calls[delta.index] = [delta.function.name, ""]
            calls[delta.index][1] += delta.function.arguments or ""
    assert [[c.function.name, c.function.arguments] for c in whole.message.tool_calls] == list(calls.values())
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "tool_calls"
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 5
    with sdk.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.arguments == whole.message.tool_calls[0].function.arguments


def test_calls_among_words_are_found_with_auto(real_client: httpx.Client) -> None:
    text = 'Let me see.\n<tool_call>\n{"name": "now", "arguments": {"zone": "é"}}\n</tool_call>'
    (choice,) = ask(real_client, tools=TOOLS, **saying(text))["choices"]
    message = choice["message"]
    # The grammar allows calls of its own too; the words are its beginning.
    if message["content"]:
        assert message["content"] == "Let me see."
        assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"zone": "é"}'}
    assert choice["finish_reason"] == "tool_calls"
    (choice,) = ask(real_client, **saying(text))["choices"]
    assert choice["message"]["content"] == text
    assert choice["finish_reason"] == "stop"


def test_none_neither_shows_nor_calls(real_client: httpx.Client) -> None:
    plain = ask(real_client, max_tokens=30, temperature=0)
    none = ask(real_client, max_tokens=30, temperature=0, tools=TOOLS, tool_choice="none")
    assert none["choices"] == plain["choices"]
    shown = ask(real_client, max_tokens=30, temperature=0, tools=TOOLS)
    assert shown["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 100


def test_calls_and_what_they_gave_are_messages(sdk: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "max_tokens": 400}
    answer = sdk.chat.completions.create(messages=MESSAGES, tool_choice=NAMED, **options).choices[0].message
    given = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "sunny"}
    more = sdk.chat.completions.create(messages=[*MESSAGES, answer, given], tool_choice="none", **options)
    assert more.choices[0].finish_reason in ("stop", "length")


def test_a_session_goes_on_after_a_call(real_client: httpx.Client) -> None:
    fields: dict[str, Any] = {"session_id": 90210, "tools": TOOLS, "max_tokens": 400}
    first = ask(real_client, tool_choice=NAMED, **fields)
    call = first["choices"][0]["message"]["tool_calls"][0]
    given = [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    second = ask(real_client, **fields | {"messages": given})
    spoken = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert second["usage"]["prompt_tokens"] > spoken


@pytest.fixture(scope="module", params=["hermes", "llama3", "mistral"])
def format_sdk(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    engine = formula_engine(template=chat_template(tool_parser=request.param))
    layer = TextLayer(byte_tokenizer(), chat_template())
    with (
        serve_core(engine, layer) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize("tool_choice", ["required", NAMED])
def test_every_format_calls_and_streams_alike(format_sdk: openai.OpenAI, tool_choice: Any) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": tool_choice}
    for seed in range(4):
        options |= {"seed": seed, "max_tokens": 600, "parallel_tool_calls": False}
        whole = format_sdk.chat.completions.create(**options).choices[0]
        assert whole.finish_reason == "tool_calls"
        (call,) = whole.message.tool_calls
        if call.function.name == "get_weather":
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
        else:
            assert (call.function.name, tool_choice) == ("now", "required")
        with format_sdk.chat.completions.stream(**options) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        assert streamed.function.arguments == call.function.arguments
        assert streamed.function.name == call.function.name


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": TOOLS * 80}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}],
            "tool_choice": "required",
        },
        "tools",
    ),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_cannot_be_called_is_a_400(real_client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES} | fields
    reply = real_client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
