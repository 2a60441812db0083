"""Function calls and thoughts in `/v1/responses` and `/v1/messages`, by their SDKs and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest
from conftest import MODEL, Running, serve_core
from lmserve import _core
from lmserve.engine.text import TextLayer
from tiny_engine import TEMPLATE, byte_tokenizer, reciting_engine

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, 7]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NAMED: Any = {"type": "function", "name": "get_weather"}
TOOLS: list[Any] = [
    NAMED | {"description": "The weather", "parameters": PARAMETERS},
    {"type": "function", "name": "now"},
]
CUSTOM_TOOLS: list[Any] = [
    {"name": "get_weather", "description": "The weather", "input_schema": PARAMETERS},
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]
CHAT_TOOLS: list[Any] = [{"type": "function", "function": {"name": tool["name"]}} for tool in TOOLS]
HELLO: Any = [{"role": "user", "content": "Hello"}]
CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "é"}}\n</tool_call>'
SAID = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
THINKING = TEMPLATE + "{%- if enable_thinking is false -%}<think>\n\n</think>\n\n{% endif -%}"


@contextmanager
def reciting(text: str, template: str = THINKING) -> Iterator[Running]:
    layer = TextLayer(byte_tokenizer(), _core.ChatTemplate(template, b"{}"))
    with serve_core(reciting_engine(text, template), layer) as running:
        yield running


@pytest.fixture(scope="module")
def recital() -> Iterator[httpx.Client]:
    with reciting(SAID) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@pytest.fixture
def gpt(real: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def claude(real: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=real.url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def post(client: httpx.Client, route: str, **fields: Any) -> Any:
    reply = client.post(route, json={"model": MODEL, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def events(client: httpx.Client, route: str, **fields: Any) -> list[dict[str, Any]]:
    reply = client.post(route, json={"model": MODEL, "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    return [json.loads(line.removeprefix("data: ")) for line in reply.text.splitlines() if line.startswith("data: ")]


def validate(client: httpx.Client, name: str, value: Any) -> None:
    components = client.get("/openapi.json").json()["components"]
    jsonschema.validate(value, {"$ref": f"#/components/schemas/{name}", "components": components})


def test_a_response_calls_a_named_function_with_arguments_that_its_schema_allows(gpt: openai.OpenAI) -> None:
    for seed in range(5):
        reply = gpt.responses.create(
            model=MODEL, input="Hello", tools=TOOLS, tool_choice=NAMED, max_output_tokens=400, extra_body={"seed": seed}
        )
        (call,) = reply.output
        assert (call.type, call.name, call.status, reply.status) == ("function_call", "get_weather", *["completed"] * 2)
        jsonschema.validate(json.loads(call.arguments), PARAMETERS)
        assert reply.tools[0].name == "get_weather"
        assert reply.tool_choice.name == "get_weather"


def test_a_streamed_response_calls_as_a_whole_one_does(gpt: openai.OpenAI, client: httpx.Client) -> None:
    options: dict[str, Any] = {"model": MODEL, "input": "Hello", "tools": TOOLS, "tool_choice": "required"}
    options |= {"temperature": 0, "max_output_tokens": 500, "parallel_tool_calls": False}
    (whole,) = gpt.responses.create(**options).output
    with gpt.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        (final,) = stream.get_final_response().output
    assert (final.name, final.arguments) == (whole.name, whole.arguments)
    deltas = kinds.count("response.function_call_arguments.delta")
    assert deltas > 5
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * deltas,
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    for event in events(client, "/v1/responses", **{key: value for key, value in options.items() if key != "model"}):
        validate(client, "ResponseEvent", event)


def test_thoughts_words_and_calls_are_items_in_their_order(recital: httpx.Client) -> None:
    options: dict[str, Any] = {"input": "Hello", "tools": TOOLS, "include": ["message.output_text.logprobs"]}
    whole = post(recital, "/v1/responses", **options)
    validate(recital, "ResponseReply", whole)
    thoughts, words, first, second = whole["output"]
    assert (thoughts["type"], thoughts["summary"]) == ("reasoning", [])
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    (part,) = words["content"]
    assert part["text"] == "Let me see."
    assert "".join(token["token"] for token in part["logprobs"]) == "Let me see."
    assert [call["name"] for call in (first, second)] == ["now", "now"]
    assert [json.loads(call["arguments"]) for call in (first, second)] == [{"zone": "é"}] * 2
    assert first["call_id"] != second["call_id"]
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == len("<think>\nHm.\n</think>\n\n")
    streamed = events(recital, "/v1/responses", **options)
    for event in streamed:
        validate(recital, "ResponseEvent", event)
    final = streamed[-1]["response"]["output"]
    done = [event["item"] for event in streamed if event["type"] == "response.output_item.done"]
    assert done == final
    unnamed = [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in final]
    assert unnamed == [
        {key: value for key, value in item.items() if key not in ("id", "call_id")} for item in whole["output"]
    ]
    said = ["", "", "", ""]
    for event in streamed:
        if event["type"].endswith(".delta"):
            said[event["output_index"]] += event["delta"]
    assert said == ["Hm.", "Let me see.", first["arguments"], second["arguments"]]


def test_a_response_that_is_cut_short_has_an_incomplete_item(recital: httpx.Client) -> None:
    limit = len(SAID.encode()) - len(CALL) - 20
    cut = post(recital, "/v1/responses", input="Hello", tools=TOOLS, max_output_tokens=limit)
    assert cut["status"] == "incomplete"
    assert [item["status"] for item in cut["output"]] == ["completed", "completed", "incomplete"]
    assert cut["output"][-1]["arguments"].startswith('{"zone')


def test_what_a_call_gave_goes_on_from_the_response(gpt: openai.OpenAI, client: httpx.Client) -> None:
    options: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "max_output_tokens": 400}
    first = gpt.responses.create(input="Hello", tool_choice=NAMED, **options)
    (call,) = first.output
    given: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = gpt.responses.create(input=[given], previous_response_id=first.id, tool_choice="none", **options)
    spoken = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens > spoken
    assert second.usage.input_tokens_details.cached_tokens >= spoken - 16
    (item,) = gpt.responses.input_items.list(second.id).data
    assert (item.type, item.call_id, item.output) == ("function_call_output", call.call_id, "sunny")
    # The same without what the server holds: every item is sent back.
    sent: Any = [*HELLO, call.model_dump(exclude_none=True), given]
    third = gpt.responses.create(input=sent, tool_choice="none", **options)
    assert third.output[0].type == "message"
    listed = client.get(f"/v1/responses/{third.id}/input_items", params={"order": "asc"}).json()
    assert [item["type"] for item in listed["data"]] == ["message", "function_call", "function_call_output"]
    validate(client, "ItemList", listed)


def test_a_message_uses_a_tool_with_input_that_its_schema_allows(claude: anthropic.Anthropic) -> None:
    for _ in range(5):
        message = claude.messages.create(
            model=MODEL,
            messages=HELLO,
            tools=CUSTOM_TOOLS,
            tool_choice={"type": "tool", "name": "get_weather"},
            max_tokens=400,
        )
        (block,) = message.content
        assert (block.type, block.name, message.stop_reason) == ("tool_use", "get_weather", "tool_use")
        assert block.id.startswith("toolu_")
        jsonschema.validate(block.input, PARAMETERS)


def test_a_streamed_message_uses_tools_as_a_whole_one_does(claude: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": CUSTOM_TOOLS, "max_tokens": 500}
    options |= {"extra_body": {"temperature": 0}, "tool_choice": {"type": "tool", "name": "get_weather"}}
    (whole,) = claude.messages.create(**options).content
    with claude.messages.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    (block,) = final.content
    assert (block.type, block.name, block.input) == ("tool_use", whole.name, whole.input)
    assert final.stop_reason == "tool_use"
    assert kinds.count("input_json") > 5


def test_thoughts_words_and_uses_are_blocks_in_their_order(recital: httpx.Client) -> None:
    options: dict[str, Any] = {"messages": HELLO, "tools": CUSTOM_TOOLS, "max_tokens": 400}
    whole = post(recital, "/v1/messages", **options)
    validate(recital, "MessageReply", whole)
    thoughts, words, first, second = whole["content"]
    assert thoughts == {"type": "thinking", "thinking": "Hm.", "signature": ""}
    assert words == {"type": "text", "text": "Let me see."}
    assert [(use["type"], use["name"], use["input"]) for use in (first, second)] == [
        ("tool_use", "now", {"zone": "é"})
    ] * 2
    assert whole["stop_reason"] == "tool_use"
    with anthropic.Anthropic(base_url=str(recital.base_url), api_key="unused", max_retries=0) as sdk:
        with sdk.messages.stream(model=MODEL, **options) as stream:
            final = stream.get_final_message()
        blocks = [block.model_dump(include={"type", "thinking", "text", "name", "input"}) for block in final.content]
        kept = ("type", "thinking", "text", "name", "input")
        assert blocks == [{key: block[key] for key in kept if key in block} for block in whole["content"]]
        # What was received can be sent back.
        given: Any = [{"type": "tool_result", "tool_use_id": block["id"], "content": "12"} for block in (first, second)]
        turns: Any = [*HELLO, {"role": "assistant", "content": final.content}, {"role": "user", "content": given}]
        more = {"model": MODEL, "messages": turns, "tools": CUSTOM_TOOLS}
        usage = sdk.messages.create(**more, max_tokens=400).usage
        assert sdk.messages.count_tokens(**more).input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    for event in events(recital, "/v1/messages", **options):
        validate(recital, "MessageEvent", event)


def prompt_of(client: httpx.Client, **fields: Any) -> int:
    return post(client, "/v1/messages/count_tokens", **{"messages": HELLO, **fields})["input_tokens"]


def test_results_become_turns_of_their_own(recital: httpx.Client) -> None:
    use = {"type": "tool_use", "id": "t", "name": "now", "input": {}}
    asked = [*HELLO, {"role": "assistant", "content": [use]}]

    def after(*blocks: dict[str, Any]) -> int:
        return prompt_of(recital, messages=[*asked, {"role": "user", "content": list(blocks)}])

    result = {"type": "tool_result", "tool_use_id": "t", "content": "12"}
    plain = after(result)
    assert after(result | {"is_error": True}) == plain + len("Error: ")
    assert after(result | {"content": [{"type": "text", "text": "12"}]}) == plain
    assert after(result, {"type": "text", "text": "so?"}) == plain + len("<user\nso?>\n")


def test_arguments_that_are_no_object_are_handed_on(recital: httpx.Client) -> None:
    wrong = '<tool_call>{"name": "now", "arguments": [1, }</tool_call>'
    with reciting(wrong) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        reply = post(client, "/v1/messages", messages=HELLO, tools=CUSTOM_TOOLS, max_tokens=200)
        (use,) = reply["content"]
        assert list(use["input"]) == ["INVALID_JSON"]
        assert use["input"]["INVALID_JSON"].startswith("[1,")


def test_a_message_may_have_to_use_one_tool_alone(client: httpx.Client) -> None:
    options: dict[str, Any] = {"messages": HELLO, "tools": CUSTOM_TOOLS, "max_tokens": 500, "temperature": 1}
    for _ in range(5):
        alone = {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
        assert len(post(client, "/v1/messages", **options, **alone)["content"]) == 1


def test_who_wants_one_call_gets_the_first_alone(recital: httpx.Client) -> None:
    chat = post(recital, "/v1/chat/completions", messages=HELLO, tools=CHAT_TOOLS, parallel_tool_calls=False)
    (choice,) = chat["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    streamed = chat_chunks(recital, messages=HELLO, tools=CHAT_TOOLS, parallel_tool_calls=False)
    calls = [call for event in streamed for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert {call["index"] for call in calls} == {0}
    response = post(recital, "/v1/responses", input="Hello", tools=TOOLS, parallel_tool_calls=False)
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    alone = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    message = post(recital, "/v1/messages", messages=HELLO, tools=CUSTOM_TOOLS, max_tokens=200, **alone)
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]


def test_thinking_reaches_the_template(recital: httpx.Client) -> None:
    as_it_likes = prompt_of(recital)
    assert prompt_of(recital, thinking={"type": "adaptive"}) == as_it_likes
    assert prompt_of(recital, thinking={"type": "disabled"}) > as_it_likes


def test_without_tools_a_call_is_text(recital: httpx.Client) -> None:
    for choice in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        reply = post(recital, "/v1/responses", input="Hello", **choice)
        assert reply["output"][1]["content"][0]["text"] == SAID.partition("</think>\n\n")[2]


def test_chat_tells_thoughts_from_words(recital: httpx.Client) -> None:
    whole = post(recital, "/v1/chat/completions", messages=HELLO)
    message = whole["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm."
    thoughts = {"reasoning_tokens": len("<think>\nHm.\n</think>\n\n")}
    assert whole["usage"]["completion_tokens_details"] == thoughts
    assert post(recital, "/v1/chat/completions", messages=HELLO, n=2)["usage"]["completion_tokens_details"] == {
        "reasoning_tokens": 2 * thoughts["reasoning_tokens"]
    }
    assert message["content"] == SAID.partition("</think>\n\n")[2]
    deltas = [event["choices"][0]["delta"] for event in chat_chunks(recital, messages=HELLO)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    usage = chat_chunks(recital, messages=HELLO, stream_options={"include_usage": True})[-1]["usage"]
    assert usage["completion_tokens_details"] == thoughts
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    reply = post(recital, "/v1/chat/completions", messages=HELLO, **off)
    assert "reasoning_content" not in reply["choices"][0]["message"]
    assert "completion_tokens_details" not in reply["usage"]


def chat_chunks(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    reply = client.post("/v1/chat/completions", json={"model": MODEL, "stream": True, **fields})
    *chunks, done = [line for line in reply.text.splitlines() if line]
    assert done == "data: [DONE]"
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("/v1/responses", {"tools": [{"type": "function"}]}, "tools[0].name"),
        ("/v1/responses", {"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ("/v1/responses", {"tools": TOOLS, "tool_choice": NAMED | {"name": "nobody"}}, "tool_choice"),
        ("/v1/responses", {"input": [{"type": "reasoning", "content": [{"type": "image", "text": "x"}]}]}, None),
        ("/v1/messages", {"tools": [CUSTOM_TOOLS[0], CUSTOM_TOOLS[0]]}, "tools"),
        ("/v1/messages", {"tools": CUSTOM_TOOLS, "tool_choice": {"type": "tool", "name": "nobody"}}, "tool_choice"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
    ],
)
def test_what_cannot_be_called_is_a_400(
    client: httpx.Client, route: str, fields: dict[str, Any], param: str | None
) -> None:
    body = {"model": MODEL, "input": "Hello"} if route == "/v1/responses" else {"model": MODEL, "max_tokens": 5}
    if route == "/v1/messages":
        body["messages"] = HELLO
    reply = client.post(route, json=body | fields)
    assert reply.status_code == 400, reply.text
    if param is not None:
        assert reply.json()["error"]["param"] == param
