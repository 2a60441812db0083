"""Structured output over HTTP and by the `openai` SDK."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from conftest import MODEL, Running
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import GuidedWhitespace, JsonSchema, SamplingParams, StopParams, Submission, Text
from pydantic import BaseModel
from tiny_engine import formula_engine

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def sdk(real: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def real_client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


class Colour(BaseModel):
    name: Literal["red", "green"]
    parts: list[Literal[0, 255]]
    known: bool


def test_parse_gives_the_object(sdk: openai.OpenAI) -> None:
    reply = sdk.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Colour, temperature=0)
    colour = reply.choices[0].message.parsed
    assert isinstance(colour, Colour)
    assert reply.choices[0].finish_reason == "stop"


def test_a_streamed_schema_is_the_same(sdk: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "response_format": Colour, "temperature": 0}
    whole = sdk.chat.completions.parse(**options).choices[0].message.content
    with sdk.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole
    assert final.choices[0].message.parsed is not None


GUIDES: list[tuple[dict[str, Any], str]] = [
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"guided_regex": "[0-9]{4}"}, "[0-9]{4}"),
    ({"guided_grammar": 'start: "a" "b" "c"'}, "abc"),
    ({"guided_json": {"enum": [1, 23]}}, "1|23"),
    ({"guided_json": '{"const": "x"}'}, '"x"'),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ({"structured_outputs": {"regex": "a{3}"}}, "aaa"),
    ({"structured_outputs": {"grammar": 'start: "ok"'}}, "ok"),
    ({"structured_outputs": {"json": {"type": "null"}}}, "null"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 7}}}}, "7"),
    ({"response_format": {"type": "text"}, "guided_regex": "b"}, "b"),
]


@pytest.mark.parametrize(("fields", "pattern"), GUIDES)
def test_each_field_guides_both_routes(real_client: httpx.Client, fields: dict[str, Any], pattern: str) -> None:
    chat = real_client.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES, **fields})
    assert chat.status_code == 200, chat.text
    assert re.fullmatch(pattern, chat.json()["choices"][0]["message"]["content"])
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 50, "n": 2, **fields}
    for choice in real_client.post("/v1/completions", json=body).json()["choices"]:
        assert re.fullmatch(pattern, choice["text"])
        assert choice["finish_reason"] == "stop"


def test_json_object(real_client: httpx.Client) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "response_format": {"type": "json_object"}, "max_tokens": 400}
    text = real_client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert text.startswith("{")


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_regex": "["}, "guided_regex", "invalid regex"),
    ({"guided_grammar": "start: X"}, "guided_grammar", "X"),
    ({"guided_json": "[1]"}, "guided_json", "object"),
    ({"guided_json": {"$ref": "#/x"}}, "guided_json", "cannot be compiled"),
    ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "not"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "one field"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "one field"),
    ({"guided_choice": []}, "guided_choice", "length"),
    ({"guided_choice": [""]}, "guided_choice[0]", "length"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "unknown"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "word"), BAD)
def test_what_cannot_guide_is_a_400(
    real_client: httpx.Client, fields: dict[str, Any], param: str, word: str, stream: bool
) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "stream": stream, **fields}
    reply = real_client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert word in error["message"]


def test_a_guided_turn_of_a_session_goes_on(real_client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "session_id": 4711, "max_tokens": 60}
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["a", "b"]}}}
    first = real_client.post("/v1/chat/completions", json=body | {"response_format": schema}).json()
    assert json.loads(first["choices"][0]["message"]["content"]) in ("a", "b")
    second = real_client.post("/v1/chat/completions", json=body).json()
    spoken = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert second["usage"]["prompt_tokens"] > spoken


def test_schemas_need_no_name_and_json_objects_may_have_one(real_client: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"], "additionalProperties": False}
    for form in (
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "json_schema": {"schema": schema}},
    ):
        body = {"model": MODEL, "messages": MESSAGES, "response_format": form, "max_tokens": 400}
        reply = real_client.post("/v1/chat/completions", json=body).json()
        assert reply["choices"][0]["message"]["content"] == '{"a":7}'
    for form in (
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "schema": schema},
    ):
        body = {"model": MODEL, "input": "Hello", "text": {"format": form}, "max_output_tokens": 400}
        reply = real_client.post("/v1/responses", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["output"][0]["content"][0]["text"] == '{"a":7}'


def test_a_request_may_ask_for_white_space(real_client: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 400, "n": 20, "seed": 1}
    body |= {"guided_json": {"type": "array", "items": {"type": "null"}, "minItems": 5, "maxItems": 5}}
    compact = real_client.post("/v1/completions", json=body).json()["choices"]
    assert {choice["text"] for choice in compact} == {"[null,null,null,null,null]"}
    free = real_client.post("/v1/completions", json=body | {"guided_whitespace": "free"}).json()["choices"]
    assert any(c.isspace() for choice in free for c in choice["text"])


def test_a_server_may_leave_white_space_free() -> None:
    core = formula_engine()
    guide = JsonSchema({"type": "array", "items": {"type": "null"}, "minItems": 5, "maxItems": 5})

    async def said(given: GuidedWhitespace | None) -> set[str]:
        face = AsyncEngine(core, max_model_len=core.context_length, guided_whitespace="free")
        sampling, stopping = SamplingParams(seed=1), StopParams(max_tokens=400)
        submission = Submission(
            route="completions",
            input=Text("Hi"),
            guide=guide,
            guided_whitespace=given,
            n=20,
            sampling=sampling,
            stopping=stopping,
        )
        body = json.loads(await face.submit(submission).body())
        face.close()
        return {choice["text"] for choice in body["choices"]}

    try:
        assert any(c.isspace() for text in asyncio.run(said(None)) for c in text)
        assert asyncio.run(said("compact")) == {"[null,null,null,null,null]"}
    finally:
        core.shutdown(5)
