"""POST /v1/chat/completions."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest
from conftest import ALIAS, MODEL, Running

from wire import error_of, events_of

ids = itertools.count(5000)
HELLO = [{"role": "user", "content": "Hello there"}]


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, "max_tokens": 8, **fields}


def test_whole_reply(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=ask(model=ALIAS))
    assert response.status_code == 200
    reply = response.json()
    assert reply["id"].startswith("chatcmpl-")
    assert reply["object"] == "chat.completion"
    assert reply["model"] == ALIAS
    assert reply["created"] > 1_700_000_000
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_stream_equals_whole_reply(client: httpx.Client) -> None:
    body = ask(seed=3, max_tokens=30, ignore_eos=True)
    whole = client.post("/v1/chat/completions", json=body).json()
    response = client.post("/v1/chat/completions", json=body | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response.content)
    assert len({event["id"] for event in events}) == 1
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == whole["choices"][0]["message"]["content"]
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "length"
    assert all("usage" not in event for event in events)


def test_usage_chunk(client: httpx.Client) -> None:
    body = ask(stream=True, stream_options={"include_usage": True})
    events = events_of(client.post("/v1/chat/completions", json=body).content)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] > 0


def test_a_session_holds_the_conversation(client: httpx.Client) -> None:
    session = next(ids)
    first = client.post("/v1/chat/completions", json=ask(session_id=session)).json()
    second = client.post("/v1/chat/completions", json=ask(session_id=session, messages="And then?")).json()
    assert second["usage"]["prompt_tokens"] > first["usage"]["total_tokens"] - 1
    # The same sessions as /generate.
    body = {"prompt": "", "instance_id": session, "request_output_len": 4, "sequence_start": False}
    assert client.post("/generate", json=body).json()["usage"]["history_tokens"] > 0
    renewed = client.post("/v1/chat/completions", json=ask(session_id=session, renew_session=True)).json()
    assert renewed["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]


def test_messages_may_be_a_string(scripted: Running, scripted_client: httpx.Client) -> None:
    assert scripted_client.post("/v1/chat/completions", json=ask(messages="Hi")).status_code == 200
    assert scripted.core.submitted[-1]["input"] == {"type": "turn", "text": "Hi"}


def test_messages_as_templates_take_them(scripted: Running, scripted_client: httpx.Client) -> None:
    echoed = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, "tool_calls": []}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        echoed,
        {"role": "user", "content": "c"},
    ]
    assert scripted_client.post("/v1/chat/completions", json=ask(messages=messages)).status_code == 200
    assert scripted.core.submitted[-1]["input"]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab", "name": "Ann"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "c"},
    ]


def test_what_the_core_is_asked(scripted: Running, scripted_client: httpx.Client) -> None:
    body = ask(
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=None,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.5,
        top_k=5,
        min_p=0.125,
        n=2,
        stop="END",
        seed=11,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "6": 2.5},
        logprobs=True,
        top_logprobs=3,
        ignore_eos=True,
        user="someone",
        metadata={"a": "b"},
        store=True,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        parallel_tool_calls=True,
    )
    assert scripted_client.post("/v1/chat/completions", json=body).status_code == 200
    request = scripted.core.submitted[-1]
    assert request.pop("reply_id").startswith("chatcmpl-")
    assert request.pop("created") > 0
    assert request.pop("envelope")["system_fingerprint"].startswith("fp_")
    assert request == {
        "route": "chat",
        "model": MODEL,
        "adapter": 0,
        "input": {"type": "messages", "messages": HELLO},
        "stream": True,
        "usage_chunks": "last",
        "on_overflow": "truncate_output",
        "n": 2,
        "sampling": {
            "temperature": 0.5,
            "top_p": 0.5,
            "top_k": 5,
            "min_p": 0.125,
            "seed": 11,
            "presence_penalty": 1.0,
            "frequency_penalty": -1.0,
            "repetition_penalty": 1.5,
            "logit_bias": [[5, -100.0], [6, 2.5]],
            "logprobs": 3,
        },
        "stopping": {"max_tokens": 7, "stop": ["END"], "ignore_eos": True},
    }


def test_both_names_of_the_token_limit_hold(client: httpx.Client) -> None:
    for limits in ((3, 5), (5, 3)):
        names = dict(zip(("max_tokens", "max_completion_tokens"), limits, strict=True))
        reply = client.post("/v1/chat/completions", json=ask(ignore_eos=True, **names)).json()
        assert reply["usage"]["completion_tokens"] == 3


def test_a_whole_number_may_have_a_point(scripted: Running, scripted_client: httpx.Client) -> None:
    """JSON Schema calls 3.0 an integer."""
    body = (
        b'{"model": "%b", "messages": "x", "max_tokens": 3.0, "logit_bias": {"5": 1.0}, "temperature": 1.0, "seed": %b}'
    )
    for seed, status in ((b"1e3", 200), (b"2.5", 400), (b"9007199254740993.0", 400)):
        content = body % (MODEL.encode(), seed)
        response = scripted_client.post("/v1/chat/completions", content=content)
        assert response.status_code == status, response.text
    request = scripted.core.submitted[-1]
    assert request["stopping"]["max_tokens"] == 3
    assert request["sampling"]["seed"] == 1000


def test_null_is_absent(scripted: Running, scripted_client: httpx.Client) -> None:
    nullable = [
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "session_id",
        "renew_session",
        "top_k",
        "min_p",
        "repetition_penalty",
        "ignore_eos",
        "on_disconnect",
        "on_overflow",
        "tools",
        "response_format",
        "metadata",
    ]
    body = ask(**dict.fromkeys(nullable))
    assert scripted_client.post("/v1/chat/completions", json=body).status_code == 200
    request = scripted.core.submitted[-1]
    assert request.keys() - {"sampling", "stopping"} == {
        "route",
        "reply_id",
        "model",
        "created",
        "input",
        "on_overflow",
        "envelope",
        "adapter",
    }
    neutral = {"temperature": 1, "top_p": 1, "repetition_penalty": 1}
    assert all(value == neutral.get(name, 0) for name, value in request.get("sampling", {}).items())
    assert not any(request.get("stopping", {}).values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("moderation", {}),
    ],
)
def test_unsupported_parameters_are_refused(client: httpx.Client, field: str, value: Any) -> None:
    error = error_of(
        client.post("/v1/chat/completions", json=ask(**{field: value})), 400, "unsupported_parameter", field
    )
    assert field in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"renew_session": True}, "renew_session"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"function_call": {"name": "f"}}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": ""}, "stop"),
        ({"session_id": -2}, "session_id"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_invalid_parameters_are_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error_of(client.post("/v1/chat/completions", json=ask(**fields)), 400, param=param)


def test_unknown_model(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/chat/completions", json=ask(model="gpt-x")), 404, "model_not_found", "model")
    assert "gpt-x" in error["message"]
    assert MODEL in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_failures(scripted_client: httpx.Client, stream: bool) -> None:
    for prompt, status in (("[[refuse 429 queue_full]]", 429), ("[[fail early]]", 500)):
        response = scripted_client.post("/v1/chat/completions", json=ask(messages=prompt, stream=stream))
        error_of(response, status)


def test_failure_in_the_stream(scripted_client: httpx.Client) -> None:
    response = scripted_client.post("/v1/chat/completions", json=ask(messages="[[fail late]]", stream=True))
    assert response.status_code == 200
    assert events_of(response.content)[-1]["error"]["code"] == "internal_error"
