"""What agents and older clients send: taken, or refused with the name of what is supported."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from conftest import MAX_MODEL_LEN, MODEL, Running, serve_core
from lmserve import _core
from lmserve.api.convert.thinking import chat_thinking
from lmserve.api.convert.unsupported import Ignored
from lmserve.engine.text import TextLayer
from lmserve.schemas.chat import ChatRequest
from tiny_engine import TEMPLATE, byte_tokenizer, chat_template, formula_engine, reciting_engine

CASES = [
    json.loads(line)
    for path in sorted((Path(__file__).parent / "cases").glob("*.jsonl"))
    for line in path.read_text("utf-8").splitlines()
]
HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
IGNORED = "x-lmserve-ignored"
# A template with the switches of several families, which ends as Qwen3's does where thoughts are off.
SWITCHED = (
    "{%- if reasoning_effort is defined -%}Effort: {{ reasoning_effort }}\n{% endif -%}"
    + TEMPLATE
    + "{%- if add_generation_prompt and enable_thinking is false -%}<think>\n\n</think>\n\n{% endif -%}"
)
OPEN = TEMPLATE.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@contextmanager
def reciting(text: str, template: str = TEMPLATE) -> Iterator[httpx.Client]:
    layer = TextLayer(byte_tokenizer(), chat_template(template))
    with (
        serve_core(reciting_engine(text, template), layer) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield client


def post(client: httpx.Client, route: str, **fields: Any) -> Any:
    reply = client.post(route, json={"model": MODEL, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def said_to_be_ignored(client: httpx.Client, route: str, **fields: Any) -> list[str]:
    reply = client.post(route, json={"model": MODEL, **fields})
    assert reply.status_code == 200, reply.text
    return [name for name in reply.headers.get(IGNORED, "").split(", ") if name]


@pytest.mark.parametrize("case", CASES, ids=[f"{case['route']} {case['case']}" for case in CASES])
def test_cases(client: httpx.Client, case: dict[str, Any]) -> None:
    reply = client.post(case["route"], json=case["body"] | {"model": MODEL})
    expected = case["expect"]
    assert reply.status_code == int(expected[:3]), reply.text
    if "names" in expected:
        assert f"`{expected.rpartition(' ')[2]}`" in reply.json()["error"]["message"]
    for said in ("said", "left out"):
        if said in expected:
            assert IGNORED in reply.headers, expected


@pytest.mark.parametrize("route", [CHAT, "/v1/completions", RESPONSES, MESSAGES])
def test_output_is_clamped_to_what_the_context_has_left(client: httpx.Client, route: str) -> None:
    name = "max_output_tokens" if route == RESPONSES else "max_tokens"
    words = " b" * (MAX_MODEL_LEN // 2 - 60)  # of two tokens each
    said = {"messages": [{"role": "user", "content": words}]}
    given = {"/v1/completions": {"prompt": words}, RESPONSES: {"input": words}}.get(route, said)
    # Anthropic's route knows no ignore_eos: the model may end its reply itself there.
    more = {} if route == MESSAGES else {"ignore_eos": True}
    for limit in (MAX_MODEL_LEN, 2**31 - 1, *([] if route == MESSAGES else [-1])):
        reply = post(client, route, **given, **more, **{name: limit})
        usage = reply["usage"]
        total = usage.get("total_tokens")
        if route == MESSAGES:
            assert reply["stop_reason"] == "end_turn" or sum(usage.values()) == MAX_MODEL_LEN
        else:
            assert total == MAX_MODEL_LEN
            words = reply.get("incomplete_details") or {"reason": reply.get("choices", [{}])[0].get("finish_reason")}
            assert words["reason"] in ("length", "max_output_tokens")
    long = {key: "x" * MAX_MODEL_LEN if isinstance(value, str) else value for key, value in given.items()}
    if "messages" in long:
        long["messages"] = [{"role": "user", "content": "x" * MAX_MODEL_LEN}]
    reply = client.post(route, json={"model": MODEL, **long, name: 5})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
    # What agents look for, to shorten their conversation: Claude Code, and all that know OpenAI's words.
    tokens, most = re.search(r"prompt is too long[^0-9]*(\d+) tokens > (\d+)", error["message"]).groups()
    assert int(tokens) > int(most) == MAX_MODEL_LEN - 1
    assert f"maximum context length is {MAX_MODEL_LEN} tokens" in error["message"]


def test_a_session_keeps_its_on_overflow(client: httpx.Client) -> None:
    turn = {"model": MODEL, "messages": HELLO, "max_tokens": MAX_MODEL_LEN, "session_id": 4001}
    assert client.post(CHAT, json=turn).json()["error"]["code"] == "context_length_exceeded"
    assert client.post(CHAT, json=turn | {"on_overflow": "truncate_output"}).status_code == 200
    stateless = turn | {"session_id": -1, "on_overflow": "error"}
    assert client.post(CHAT, json=stateless).json()["error"]["code"] == "context_length_exceeded"


def test_what_is_left_out_is_named_once(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    tools = [{"type": "computer_20250124", "name": "c"}, {"type": "computer_20250124", "name": "d"}]
    fields: dict[str, Any] = {"messages": HELLO, "max_tokens": 3, "tools": tools, "metadata": {"user_id": "u"}}
    with caplog.at_level(logging.INFO, "lmserve.http"):
        for stream in (False, True):
            assert said_to_be_ignored(client, MESSAGES, **fields, stream=stream) == [
                "metadata",
                "tools.computer_20250124",
            ]
    logged = [record.getMessage() for record in caplog.records if "computer_20250124" in record.getMessage()]
    assert len(logged) == 1
    counted = {key: value for key, value in fields.items() if key not in ("max_tokens", "metadata")}
    assert said_to_be_ignored(client, f"{MESSAGES}/count_tokens", **counted) == ["tools.computer_20250124"]


def test_nothing_is_named_where_all_is_done(client: httpx.Client) -> None:
    assert said_to_be_ignored(client, CHAT, messages=HELLO, max_tokens=1, store=False, verbosity="medium") == []
    assert said_to_be_ignored(client, MESSAGES, messages=HELLO, max_tokens=1, thinking={"type": "disabled"}) == []
    assert said_to_be_ignored(client, RESPONSES, input="Hi", max_output_tokens=1, text={"verbosity": None}) == []


def test_a_name_that_a_client_invents_cannot_break_the_header(client: httpx.Client) -> None:
    tools = [{"type": "evil\r\nSet-Cookie: a=b", "name": "x"}, {"type": "é", "name": "y"}]
    assert said_to_be_ignored(client, RESPONSES, input="Hi", max_output_tokens=1, tools=tools) == [
        "tools.evil",
        "tools.",
    ]


@pytest.mark.parametrize(
    ("route", "name", "nearest"),
    [
        (CHAT, "max_new_tokens", "max_tokens"),
        (CHAT, "repeat_penalty", "repetition_penalty"),
        (CHAT, "temprature", "temperature"),
        (CHAT, "stop_sequences", "stop"),
        ("/generate", "until", "stop_words"),
        ("/generate", "stop_sequences", "stop_words"),
        ("/generate", "eos_token_id", "stop_words"),
        (MESSAGES, "max_completion_tokens", "max_tokens"),
        (MESSAGES, "stop", "stop_sequences"),
        (RESPONSES, "max_tokens", "max_output_tokens"),
        ("/v1/completions", "n_predict", "max_tokens"),
        ("/generate", "max_new_tokens", "request_output_len"),
        ("/generate", "repeat_penalty", "repetition_penalty"),
        ("/generate", "top_P", "top_p"),
        ("/generate", "presence_penalty", "repetition_penalty"),
        ("/v1/chat/interactive", "max_tokens", "request_output_len"),
    ],
)
def test_an_unknown_key_of_sampling_is_refused_by_the_nearest_name(
    client: httpx.Client, route: str, name: str, nearest: str
) -> None:
    given: dict[str, Any] = {"prompt": "Hi", "input": "Hi", "messages": HELLO, "max_tokens": 3, "request_output_len": 3}
    needed = {
        CHAT: ("messages",),
        MESSAGES: ("messages", "max_tokens"),
        RESPONSES: ("input",),
        "/v1/completions": ("prompt",),
    }.get(route, ("prompt", "request_output_len"))
    reply = client.post(route, json={key: given[key] for key in needed} | {name: 1})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "unknown_field", name)
    assert f"`{nearest}`" in error["message"]


@pytest.mark.parametrize("route", ["/generate", "/v1/chat/interactive"])
def test_the_names_that_are_refused_are_listed(client: httpx.Client, route: str) -> None:
    operation = client.get("/openapi.json").json()["paths"][route]["post"]
    listed = re.findall("`([^`]+)`", operation["description"].partition("Unknown keys")[2])
    assert len(listed) > 80
    for name in listed:
        reply = client.post(route, json={"prompt": "Hi", "request_output_len": 3, name: 1})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unknown_field"), name


def test_other_unknown_keys_of_lmdeploys_routes_are_ignored(client: httpx.Client) -> None:
    for route in ("/generate", "/v1/chat/interactive"):
        body = {"prompt": "Hi", "request_output_len": 3, "model": "x", "user": "y", "tools": [], "no_such_thing": 1}
        assert client.post(route, json=body).status_code == 200


def rendered(client: httpx.Client, **fields: Any) -> int:
    """Tokens of the prompt: its bytes, but for the template's marks."""
    return post(client, CHAT, max_tokens=1, **{"messages": HELLO, **fields})["usage"]["prompt_tokens"]


def test_effort_is_told_to_a_template_that_has_a_switch() -> None:
    with reciting("Yes.", SWITCHED) as client:
        plain = rendered(client)
        off = rendered(client, chat_template_kwargs={"enable_thinking": False})
        assert rendered(client, chat_template_kwargs={"enable_thinking": True}) == plain < off
        efforts = {effort: len(f"Effort: {word}\n") for effort, word in (("low", "low"), ("xhigh", "high"))}
        for effort, more in efforts.items():
            assert rendered(client, reasoning_effort=effort) == plain + more
            assert rendered(client, reasoning={"effort": effort}) == plain + more
            reply = post(client, RESPONSES, input="Hello", max_output_tokens=1, reasoning={"effort": effort})
            assert reply["usage"]["input_tokens"] == plain + more
            assert reply["reasoning"] == {"effort": effort, "summary": None}
            given = {"messages": HELLO, "output_config": {"effort": effort}}
            assert post(client, f"{MESSAGES}/count_tokens", **given)["input_tokens"] == plain + more
        for fields in (
            {"reasoning_effort": "none"},
            {"reasoning": {"enabled": False}},
            {"thinking_budget": 0},
            {"thinking": {"type": "disabled"}},
            {"enable_thinking": False},
        ):
            # gpt-oss's template has no word for none.
            assert rendered(client, **fields) == off + len("Effort: low\n"), fields
        explicit = {"enable_thinking": True, "reasoning_effort": "high"}
        kept = rendered(client, reasoning_effort="none", chat_template_kwargs=explicit)
        assert kept == plain + len("Effort: high\n")
        assert said_to_be_ignored(client, CHAT, messages=HELLO, max_tokens=1, reasoning_effort="high") == []
    with reciting("Yes.") as client:
        for effort, named in (("high", ["reasoning_effort"]), ("none", [])):
            given = {"messages": HELLO, "max_tokens": 1, "reasoning_effort": effort}
            assert said_to_be_ignored(client, CHAT, **given) == named


THOUGHTS = "Hm, let me see."
ANSWER = "Forty-two is the answer to that."


@pytest.mark.parametrize("budget", [0, 1, 7, len(THOUGHTS), 1000])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_end_at_their_budget_and_the_answer_follows(budget: int, opened: bool, stream: bool) -> None:
    mark = "" if opened else "<think>"
    said = f"{mark}{THOUGHTS}</think>{ANSWER}"
    template = OPEN if opened else f"{TEMPLATE}{{#- <think> -#}}"
    with reciting(said, template) as client:
        # The prompt's mark is 8 tokens after which the recital begins.
        skipped = len("<think>\n") if opened else 0
        expected = THOUGHTS[skipped:][:budget]
        begins = len(mark) + len(THOUGHTS[:skipped]) + len(expected)
        # What is forced stands in the place of what would have been said there.
        follows = said[begins + len("</think>") :]
        if budget >= len(THOUGHTS) - skipped:
            expected, follows = THOUGHTS[skipped:], ANSWER
        fields: dict[str, Any] = {"messages": HELLO, "thinking_budget": budget, "max_tokens": 200}
        if stream:
            reply = client.post(CHAT, json={"model": MODEL, "stream": True, **fields})
            chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            message = {
                name: "".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content")
            }
        else:
            message = post(client, CHAT, **fields)["choices"][0]["message"]
        assert message.get("reasoning_content", "").strip() == expected.strip()
        assert message["content"].strip() == follows.strip()


def test_a_budget_goes_with_a_grammar() -> None:
    with reciting(f"<think>{THOUGHTS}{THOUGHTS}", f"{TEMPLATE}{{#- <think> -#}}") as client:
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
        guide = {"type": "json_schema", "schema": schema | {"additionalProperties": False}}
        reply = post(
            client,
            MESSAGES,
            messages=HELLO,
            max_tokens=200,
            thinking={"type": "enabled", "budget_tokens": 5},
            output_config={"format": guide},
        )
        thoughts, answer = reply["content"]
        assert thoughts["thinking"] == THOUGHTS[:5].strip()
        assert json.loads(answer["text"]).keys() == {"a"}


def test_a_billing_line_and_a_clock_do_not_spoil_the_cache() -> None:
    rest = "You are a helpful agent. " * 20
    with serve_core(formula_engine(), TextLayer(byte_tokenizer(), _core.ChatTemplate(TEMPLATE, b"{}"))) as running:
        client = httpx.Client(base_url=running.url, timeout=60)

        def cached(number: int) -> int:
            billing = f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number};"
            system = [{"type": "text", "text": billing}, {"type": "text", "text": rest}]
            usage = post(client, MESSAGES, messages=HELLO, max_tokens=1, system=system)["usage"]
            return usage["cache_read_input_tokens"] / (usage["cache_read_input_tokens"] + usage["input_tokens"])

        assert cached(1) < 0.1
        assert cached(22) > 0.9

        def told(minute: int) -> tuple[int, int]:
            clock = f"Current time: 2026-01-01T10:{minute}:07Z\n{rest}"
            usage = post(client, CHAT, messages=[{"role": "system", "content": clock}, *HELLO], max_tokens=1)["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

        told(10)
        again, tokens = told(11)
        assert again > len(rest) * 0.9
        # The line is still there, after the rest.
        assert tokens > len(rest) + len("Current time: 2026-01-01T10:11:07Z")
        client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_lmdeploys_stop_cancels_the_turn_of_a_session(scripted: Running, stream: bool) -> None:
    with httpx.Client(base_url=scripted.url, timeout=60) as client:
        for route, end in ((CHAT, {"messages": "x"}), ("/v1/chat/interactive", {"prompt": "x"})):
            hold = {"prompt": "[[hold]]", "instance_id": 77, "stream": True}
            with client.stream("POST", "/generate", json=hold) as running:
                frames = running.iter_bytes()
                next(frames)
                reply = client.post(route, json={**end, "stop": True, "session_id": 77, "stream": stream})
                assert reply.status_code == 200, reply.text
                assert b'"finish_reason": "abort"' in b"".join(frames)
            assert client.post(route, json={**end, "stop": True}).json()["error"]["param"] == "session_id"
            assert client.post(route, json={**end, "stop": False}).status_code == 200
    if stream:
        assert reply.headers["content-type"].startswith(("text/event-stream", "application/json"))


PATCH = '*** Begin Patch\n+é "quoted"\n*** End Patch'
CUSTOM_CALL = f"<tool_call>\n{json.dumps({'name': 'apply_patch', 'arguments': {'input': PATCH}})}\n</tool_call>"
NAMESPACED_CALL = '<tool_call>\n{"name": "search", "arguments": {"q": 1}}\n</tool_call>'
TOOLS: Any = [
    {"type": "custom", "name": "apply_patch", "description": "Edit files", "format": {"type": "text"}},
    {"type": "namespace", "name": "mcp__docs", "tools": [{"type": "function", "name": "search"}]},
    {"type": "web_search"},
]


def test_custom_tools_and_namespaces_are_called_as_their_client_knows_them() -> None:
    with reciting(f"{CUSTOM_CALL}\n{NAMESPACED_CALL}") as client:
        whole = post(client, RESPONSES, input="Hello", tools=TOOLS)
        custom, function = whole["output"]
        assert (custom["type"], custom["name"], custom["input"]) == ("custom_tool_call", "apply_patch", PATCH)
        named = (function["type"], function["name"], function["namespace"], json.loads(function["arguments"]))
        assert named == ("function_call", "search", "mcp__docs", {"q": 1})
        assert [tool["type"] for tool in whole["tools"]] == ["custom", "namespace"]
        reply = client.post(RESPONSES, json={"input": "Hello", "tools": TOOLS, "stream": True})
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
        inputs = [event for event in events if "custom_tool_call_input" in event["type"]]
        assert [(event["type"].rpartition(".")[2], event.get("delta", event.get("input"))) for event in inputs] == [
            ("delta", PATCH),
            ("done", PATCH),
        ]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert [(item["type"], item.get("input"), item.get("namespace")) for item in done] == [
            ("custom_tool_call", PATCH, None),
            ("function_call", None, "mcp__docs"),
        ]
        # What was said is taken back as it was received.
        output = [{"type": f"{item['type']}_output", "call_id": item["call_id"], "output": "done"} for item in done]
        assert post(client, RESPONSES, input=[{"role": "user", "content": "Hello"}, *done, *output], tools=TOOLS)


def test_a_function_that_two_namespaces_have_is_told_apart() -> None:
    two = [
        {"type": "namespace", "name": name, "tools": [{"type": "function", "name": "search"}]} for name in ("a", "b")
    ]
    call = '<tool_call>\n{"name": "b__search", "arguments": {}}\n</tool_call>'
    with reciting(call) as client:
        (item,) = post(client, RESPONSES, input="Hello", tools=two)["output"]
        assert (item["name"], item["namespace"]) == ("search", "b")


def test_allowed_tools_are_the_ones_that_are_shown(client: httpx.Client) -> None:
    names = ("first", "second")
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    one = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "second"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": one}
    flat = [{"type": "function", "name": name} for name in names]
    flat_choice = {"type": "allowed_tools", "mode": "auto", "tools": [flat[1]]}

    def size(route: str, **fields: Any) -> int:
        usage = post(client, route, **fields)["usage"]
        return usage.get("prompt_tokens", usage.get("input_tokens"))

    assert size(CHAT, messages=HELLO, max_tokens=1, tools=tools, tool_choice=choice) == size(
        CHAT, messages=HELLO, max_tokens=1, tools=tools[1:]
    )
    assert size(RESPONSES, input="Hello", max_output_tokens=1, tools=flat, tool_choice=flat_choice) == size(
        RESPONSES, input="Hello", max_output_tokens=1, tools=flat[1:]
    )
    dropped = {"tools": [{"type": "web_search"}], "tool_choice": "required"}
    assert post(client, RESPONSES, input="Hello", max_output_tokens=1, **dropped)


CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "é"}}\n</tool_call>'


def test_a_custom_tool_of_a_chat_is_called_as_one() -> None:
    custom = {"type": "custom", "custom": {"name": "apply_patch", "format": {"type": "text"}}}
    search = {"type": "function", "function": {"name": "search"}}
    fields: dict[str, Any] = {"messages": HELLO, "tools": [custom, search], "max_tokens": 900}
    with reciting(f"So.\n{CUSTOM_CALL}\n{NAMESPACED_CALL}\n{CUSTOM_CALL}") as client:
        choice = post(client, CHAT, **fields)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        first, second, third = choice["message"]["tool_calls"]
        assert (first["type"], first["custom"]) == ("custom", {"name": "apply_patch", "input": PATCH})
        assert (second["type"], second["function"]) == ("function", {"name": "search", "arguments": '{"q": 1}'})
        assert third["custom"] == first["custom"]
        reply = client.post(CHAT, json={"model": MODEL, **fields, "stream": True})
        chunks = [json.loads(line[6:])["choices"][0] for line in reply.text.splitlines() if line.startswith("data: {")]
        told: dict[int, dict[str, Any]] = {}
        for delta in (call for chunk in chunks for call in chunk["delta"].get("tool_calls", ())):
            call = told.setdefault(delta["index"], {"id": delta.get("id"), "type": delta.get("type")})
            for kind in ("function", "custom"):
                for name, text in delta.get(kind, {}).items():
                    called = call.setdefault(kind, {})
                    called[name] = called.get(name, "") + text
        ids = [call["id"] for call in told.values()]
        whole = [{**call, "id": ids[at]} for at, call in enumerate((first, second, third))]
        assert list(told.values()) == whole
        # It goes back as it came, and the answer must be text.
        answered = [
            {"role": "assistant", "content": None, "tool_calls": [first]},
            {"role": "tool", "tool_call_id": first["id"], "content": "Done"},
        ]
        assert post(client, CHAT, **fields | {"messages": [*HELLO, *answered]})
    # Cut off, it is told as far as it came.
    with reciting(f"So.\n{CUSTOM_CALL}") as client:
        cut = fields | {"max_tokens": len("So.\n") + CUSTOM_CALL.index("Begin")}
        (call,) = post(client, CHAT, **cut)["choices"][0]["message"]["tool_calls"]
        assert "*** " in call["custom"]["input"]


IMAGES: Any = {
    MESSAGES: {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
    CHAT: {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    RESPONSES: {"type": "input_image", "image_url": "data:image/png;base64,AA=="},
}


@pytest.mark.parametrize("route", IMAGES)
def test_an_image_that_a_tool_gave_is_left_out_and_said_to_be(client: httpx.Client, route: str) -> None:
    image = IMAGES[route]
    noted = f"[{image['type']} left out: this model reads text only]"

    def conversation(given: Any) -> dict[str, Any]:
        if route == RESPONSES:
            called = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
            output = {"type": "function_call_output", "call_id": "c", "output": given}
            return {"input": [*HELLO, called, output], "max_output_tokens": 1}
        if route == CHAT:
            called = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
            answer = {"role": "assistant", "content": None, "tool_calls": [called]}
            return {"messages": [*HELLO, answer, {"role": "tool", "tool_call_id": "c", "content": given}]}
        called = {"type": "tool_use", "id": "c", "name": "look", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "c", "content": given}
        return {"messages": [*HELLO, {"role": "assistant", "content": [called]}, {"role": "user", "content": [result]}]}

    def asked(given: Any) -> tuple[int, str]:
        limit = {} if route == RESPONSES else {"max_tokens": 1}
        reply = client.post(route, json={"model": MODEL, **conversation(given), **limit})
        assert reply.status_code == 200, reply.text
        usage = reply.json()["usage"]
        names = ("prompt_tokens", "input_tokens", "cache_read_input_tokens")
        return sum(usage.get(name, 0) for name in names), reply.headers.get(IGNORED, "")

    text = {"type": "input_text" if route == RESPONSES else "text", "text": "Here: "}
    tokens, names = asked([text, image])
    assert (tokens, "") == asked(f"Here: {noted}")
    assert names.endswith(f".{image['type']}")
    # From a user it is refused: an answer that ignores it would be wrong.
    content = {"role": "user", "content": [image]}
    fields = {"input": [content]} if route == RESPONSES else {"messages": [content], "max_tokens": 1}
    refused = client.post(route, json={"model": MODEL, **fields})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_content_type")


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES, "/v1/completions", "/v1/embeddings"])
def test_a_model_that_is_null_is_the_served_one(client: httpx.Client, route: str) -> None:
    given = {"/v1/completions": {"prompt": "Hi", "max_tokens": 1}, RESPONSES: {"input": "Hi", "max_output_tokens": 1}}
    fields = given.get(route, {"messages": HELLO, "max_tokens": 1} if "embed" not in route else {"input": "Hi"})
    reply = client.post(route, json={"model": None, **fields})
    assert (reply.status_code, reply.json()["model"]) == (200, MODEL)


def test_an_effort_is_a_budget_where_the_template_has_no_word_for_it() -> None:
    said = f"<think>{'a' * 600}</think>{ANSWER}"
    for switch in ("", "{%- if enable_thinking -%}{%- endif -%}"):
        template = f"{TEMPLATE}{{#- <think> -#}}{switch}"
        with reciting(said, template) as client:

            def thought(**fields: Any) -> int:
                fields = {"messages": HELLO, "max_tokens": 900, **fields}
                assert said_to_be_ignored(client, CHAT, **fields) == []
                return len(post(client, CHAT, **fields)["choices"][0]["message"]["reasoning_content"])

            assert thought(reasoning_effort="minimal") == 512
            assert thought(reasoning={"effort": "minimal"}) == 512
            for effort in ("low", "high", "max"):
                assert thought(reasoning_effort=effort) == 600
            # What is said in tokens is before what is said in words.
            assert thought(reasoning_effort="minimal", thinking_budget=550) == 550
            reply = post(client, RESPONSES, input="Hi", max_output_tokens=900, reasoning={"effort": "minimal"})
            assert len(reply["output"][0]["content"][0]["text"]) == 512


HARMONY = f"{TEMPLATE}{{#- <|start|><|channel|>analysis<|message|> -#}}"


def test_thoughts_that_are_messages_have_a_budget_too() -> None:
    answer = f"<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}"
    with reciting(f"<|channel|>analysis<|message|>{THOUGHTS}{answer}", HARMONY) as client:

        def told(**fields: Any) -> tuple[str, str]:
            message = post(client, CHAT, messages=HELLO, max_tokens=300, **fields)["choices"][0]["message"]
            return message["reasoning_content"], message["content"]

        assert told() == told(thinking_budget=1000) == (THOUGHTS, ANSWER)
        # What is forced stands in the place of what would have been said there.
        assert told(thinking_budget=5) == (THOUGHTS[:5], THOUGHTS[5 + len("<|end|>") :] + ANSWER)


def test_gpt_oss_is_told_an_effort_in_its_words() -> None:
    source = (Path(__file__).parents[1] / "unit" / "templates" / "gpt-oss.jinja").read_text("utf-8")
    template = chat_template(source)
    words = {"none": "low", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high"}
    for effort, word in words.items():
        ignored = Ignored(CHAT)
        request = msgspec.convert({"messages": HELLO, "reasoning_effort": effort}, ChatRequest)
        found = chat_thinking(request, template, ignored)
        assert found.variables == {"reasoning_effort": word}
        assert found.budget == (0 if effort == "none" else None)
        assert ignored.headers() == {}
        rendered = template.render(json.dumps(HELLO).encode(), kwargs=json.dumps(found.variables).encode())
        assert f"Reasoning: {word}" in rendered


def test_functions_are_answered_in_their_own_form() -> None:
    fields: dict[str, Any] = {"messages": HELLO, "functions": [{"name": "now"}], "function_call": "auto"}
    with reciting(f"So.\n{CALL}\n{CALL}") as client:
        choice = post(client, CHAT, **fields)["choices"][0]
        called = choice["message"]["function_call"]
        assert (choice["finish_reason"], called["name"]) == ("function_call", "now")
        assert json.loads(called["arguments"]) == {"zone": "é"}
        assert "tool_calls" not in choice["message"]
        reply = client.post(CHAT, json={**fields, "stream": True})
        chunks = [json.loads(line[6:])["choices"][0] for line in reply.text.splitlines() if line.startswith("data: {")]
        parts = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
        assert "".join(part.get("name", "") for part in parts) == "now"
        assert "".join(part["arguments"] for part in parts) == called["arguments"]
        assert chunks[-1]["finish_reason"] == "function_call"
        answered = {"role": "function", "name": "now", "content": "noon"}
        history = [*HELLO, {"role": "assistant", "content": None, "function_call": called}, answered]
        assert post(client, CHAT, **fields | {"messages": history})
        assert post(client, CHAT, **fields | {"function_call": {"name": "now"}})


# As Gemma's, which takes a system message only at the beginning, and refuses two messages of one role.
ALTERNATING = """\
{%- if messages[0].role == 'system' -%}
    {%- set note = messages[0].content -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set note = '' -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    <|im_start|>{{ message.role }}
{{ note if loop.first else '' }}{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def test_a_system_message_on_the_way_is_the_users_note_where_the_template_has_none() -> None:
    note = {"role": "system", "content": "Two branches."}
    answer = {"role": "assistant", "content": "Hi."}
    conversations = ([*HELLO, note, *HELLO], [*HELLO, answer, note], [*HELLO, note, answer, *HELLO, note])
    with reciting("Yes.", ALTERNATING) as strict, reciting("Yes.") as free:
        for messages in conversations:
            texts = [message["content"] for message in messages]
            counted = {"messages": messages, "max_tokens": 1}
            for client, joined in ((strict, True), (free, False)):
                usage = post(client, MESSAGES, **counted)["usage"]
                tokens = usage["input_tokens"] + usage["cache_read_input_tokens"]
                assert tokens == post(client, f"{MESSAGES}/count_tokens", messages=messages)["input_tokens"]
                assert tokens > sum(map(len, texts))
                chat = post(client, CHAT, **counted)["usage"]["prompt_tokens"]
                assert (chat == tokens) or not joined
