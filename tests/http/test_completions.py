"""POST /v1/completions, over the real core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from conftest import MODEL, Running
from tiny_engine import MAX_MODEL_LEN
from wire import error_of, events_of

ROUTE = "/v1/completions"
PROMPTS = ["Once upon a time", "In the beginning", "It was a dark night"]


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@pytest.fixture
def sdk(real: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 8, "seed": 5, "ignore_eos": True, **fields}


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(ROUTE, json=ask(**fields))
    assert response.status_code == 200, response.text
    return response.json()


def text_of(client: httpx.Client, **fields: Any) -> str:
    return complete(client, **fields)["choices"][0]["text"]


def test_whole_reply(client: httpx.Client) -> None:
    reply = complete(client)
    assert reply.pop("id").startswith("cmpl-")
    assert reply.pop("created") > 1_700_000_000
    (choice,) = reply.pop("choices")
    assert choice.pop("text")
    assert choice == {"index": 0, "logprobs": None, "finish_reason": "length"}
    usage = reply.pop("usage")
    assert usage.pop("prompt_tokens_details").keys() == {"cached_tokens"}
    assert usage == {"prompt_tokens": 16, "completion_tokens": 8, "total_tokens": 24}
    assert reply == {"object": "text_completion", "model": MODEL}


def test_sixteen_tokens_unless_told_otherwise(client: httpx.Client) -> None:
    body = ask()
    del body["max_tokens"]
    assert client.post(ROUTE, json=body).json()["usage"]["completion_tokens"] == 16
    assert complete(client, max_tokens=None)["usage"]["completion_tokens"] == 16


def test_no_token_may_be_asked_for(client: httpx.Client) -> None:
    reply = complete(client, max_tokens=0)
    assert reply["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    assert reply["usage"]["completion_tokens"] == 0


def test_chunks(client: httpx.Client) -> None:
    fields = {"max_tokens": 30, "stream_options": {"include_usage": True}, "stream": True}
    response = client.post(ROUTE, json=ask(**fields))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last = events_of(response.content)
    whole = complete(client, max_tokens=30)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    head = {name: chunks[0][name] for name in ("id", "created")}
    assert head["id"].startswith("cmpl-")
    for at, chunk in enumerate(chunks):
        text = chunk["choices"][0]["text"]
        reason = "length" if at == len(chunks) - 1 else None
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        assert chunk == head | {"object": "text_completion", "model": MODEL, "choices": [choice], "usage": None}
    assert last.pop("usage")["completion_tokens"] == 30
    assert last == head | {"object": "text_completion", "model": MODEL, "choices": []}
    plain = events_of(client.post(ROUTE, json=ask(stream=True)).content)
    assert all("usage" not in chunk for chunk in plain)


def test_logprobs_of_chunks_add_up_to_those_of_the_whole(client: httpx.Client) -> None:
    fields = {"max_tokens": 60, "logprobs": 2}
    whole = complete(client, **fields)["choices"][0]["logprobs"]
    assert {name: len(whole[name]) for name in whole} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), 60
    )
    assert set(whole["token_logprobs"]) == {-1.5}
    assert whole["top_logprobs"][0] == {"A": -1.0, "B": -2.0}
    assert any(token.startswith("bytes:\\x") for token in whole["tokens"])
    chunks = events_of(client.post(ROUTE, json=ask(**fields, stream=True)).content)
    assert len(chunks) > 10
    for name, values in whole.items():
        assert [value for chunk in chunks for value in chunk["choices"][0]["logprobs"][name]] == values
    assert complete(client, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] == [{}] * 8


def test_offsets_point_into_the_text(client: httpx.Client) -> None:
    choice = complete(client, prompt="Where?", max_tokens=12, logprobs=0, seed=1)["choices"][0]
    tokens = zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
    ascii_tokens = [(token, offset) for token, offset in tokens if not token.startswith("bytes:")]
    assert ascii_tokens[0] == (choice["text"][0], 0)
    if len(ascii_tokens) == 12:
        assert [offset for _, offset in ascii_tokens] == list(range(12))


def test_several_prompts(client: httpx.Client) -> None:
    alone = [complete(client, prompt=prompt, n=2) for prompt in PROMPTS]
    reply = complete(client, prompt=PROMPTS, n=2)
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    assert [choice["text"] for choice in reply["choices"]] == [
        choice["text"] for single in alone for choice in single["choices"]
    ]
    usage = reply["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[name] == sum(single["usage"][name] for single in alone)
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    assert complete(client, prompt=PROMPTS[:1])["choices"] == complete(client)["choices"]


def test_prompts_of_token_ids(client: httpx.Client, sdk: openai.OpenAI) -> None:
    ids = [list(prompt.encode()) for prompt in PROMPTS]
    texts = [choice["text"] for choice in complete(client, prompt=PROMPTS)["choices"]]
    assert text_of(client, prompt=ids[0]) == texts[0]
    reply = sdk.completions.create(model=MODEL, prompt=ids, max_tokens=8, seed=5, extra_body={"ignore_eos": True})
    assert [choice.text for choice in reply.choices] == texts


def test_several_prompts_with_logprobs(client: httpx.Client) -> None:
    reply = complete(client, prompt=PROMPTS, logprobs=1)
    single = complete(client, prompt=PROMPTS[1], logprobs=1)
    assert reply["choices"][1] == single["choices"][0] | {"index": 1}


def test_echo(client: httpx.Client) -> None:
    assert text_of(client, echo=True) == PROMPTS[0] + text_of(client)
    reply = complete(client, prompt=PROMPTS, echo=True, max_tokens=0)
    assert [choice["text"] for choice in reply["choices"]] == PROMPTS


def test_a_failing_prompt_fails_all_and_leaves_nothing_behind(real: Running, client: httpx.Client) -> None:
    bad = [*PROMPTS, "x" * MAX_MODEL_LEN]
    error_of(client.post(ROUTE, json=ask(prompt=bad, max_tokens=2000)), 400, "context_length_exceeded")
    assert real.engine.open_streams == 0


def test_stop(client: httpx.Client) -> None:
    text = text_of(client, max_tokens=40)
    at = next(i for i, character in enumerate(text) if character.isascii() and i > 3 and character not in text[:i])
    reply = complete(client, max_tokens=40, stop=text[at])["choices"][0]
    assert (reply["text"], reply["finish_reason"]) == (text[:at], "stop")
    kept = text_of(client, max_tokens=40, stop=["never said", text[at]], include_stop_str_in_output=True)
    assert kept == text[: at + 1]
    ids = {"stop_token_ids": [ord(text[at])], "max_tokens": 40}
    assert complete(client, **ids)["choices"][0]["finish_reason"] == "stop"
    assert text_of(client, **ids, min_tokens=40) == text


def test_special_tokens_in_the_text(client: httpx.Client) -> None:
    plain = text_of(client, max_tokens=100)
    special = text_of(client, max_tokens=100, skip_special_tokens=False)
    assert "<|im_end|>" not in plain
    assert special.replace("<|im_end|>", "") == plain
    assert special != plain


def test_what_the_core_is_asked(scripted: Running, scripted_client: httpx.Client) -> None:
    body = ask(
        stream=True,
        stream_options={"include_usage": True},
        temperature=0.5,
        top_p=0.5,
        top_k=5,
        min_p=0.125,
        n=2,
        best_of=2,
        stop="END",
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "6": 2.5},
        logprobs=3,
        min_tokens=2,
        stop_token_ids=[9],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        priority=-4,
        echo=False,
        suffix="",
        user="someone",
    )
    assert scripted_client.post(ROUTE, json=body).status_code == 200
    request = scripted.core.submitted[-1]
    assert request.pop("reply_id").startswith("cmpl-")
    assert request.pop("created") > 0
    assert request == {
        "route": "completions",
        "model": MODEL,
        "input": {"type": "text", "text": PROMPTS[0]},
        "stream": True,
        "include_usage": True,
        "n": 2,
        "priority": -4,
        "sampling": {
            "temperature": 0.5,
            "top_p": 0.5,
            "top_k": 5,
            "min_p": 0.125,
            "seed": 5,
            "presence_penalty": 1.0,
            "frequency_penalty": -1.0,
            "repetition_penalty": 1.5,
            "logit_bias": [[5, -100.0], [6, 2.5]],
            "logprobs": 3,
        },
        "stopping": {
            "max_tokens": 8,
            "min_tokens": 2,
            "stop": ["END"],
            "stop_token_ids": [9],
            "include_stop": True,
            "ignore_eos": True,
            "skip_special_tokens": False,
        },
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [5, [5]]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [[1], [2**31 - 1]]}, "prompt"),
        ({"prompt": ["a"] * 200, "n": 6}, "n"),
        ({"prompt": ["a", "b"], "stream": True}, "stream"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 65}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
        ({"echo": True, "stream": True}, "echo"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [5]}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"priority": 2**31}, "priority"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_invalid_parameters_are_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error_of(client.post(ROUTE, json=ask(**fields)), 400, param=param)


def test_unknown_model(client: httpx.Client) -> None:
    error_of(client.post(ROUTE, json=ask(model="gpt-x")), 404, "model_not_found", "model")


def test_the_sdk_streams(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=20, seed=4, n=2)
    stream = sdk.completions.create(
        model=MODEL,
        prompt=PROMPTS[0],
        max_tokens=20,
        seed=4,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunk.usage is not None
    assert whole.usage is not None
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens


def test_replies_are_as_described(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()

    def validate(name: str, instance: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(instance)

    body = ask(logprobs=1, prompt=PROMPTS)
    validate("CompletionRequest", body)
    validate("CompletionReply", client.post(ROUTE, json=body).json())
    for chunk in events_of(client.post(ROUTE, json=ask(logprobs=1, stream=True)).content):
        validate("CompletionChunk", chunk)
