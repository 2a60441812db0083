"""POST /v1/completions, over the real core."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import msgspec
import openai
import pytest
from conftest import MODEL, Running
from lmserve.api.routes.completions import GatheredCompletion
from lmserve.schemas.chat import ChatUsage
from lmserve.schemas.completions import CompletionChoice, CompletionLogprobs, CompletionReply
from tiny_engine import EOS, MAX_MODEL_LEN

from wire import error_of, events_of, wait_until

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
    assert reply.pop("system_fingerprint", "fp_").startswith("fp_")
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
    head = {name: chunks[0][name] for name in ("id", "created", "system_fingerprint") if name in chunks[0]}
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


@pytest.mark.parametrize("include_usage", [False, True])
def test_several_prompts_in_one_stream(client: httpx.Client, include_usage: bool) -> None:
    fields = {"prompt": PROMPTS, "n": 2, "max_tokens": 20, "echo": True}
    whole = complete(client, **fields)
    options = {"stream": True, "stream_options": {"include_usage": include_usage}}
    chunks = events_of(client.post(ROUTE, json=ask(**fields, **options)).content)
    texts = [""] * 6
    reasons: list[str | None] = [None] * 6
    if include_usage:
        last = chunks.pop()
        assert last["choices"] == []
        usage, expected = last["usage"], whole["usage"]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert usage[name] == expected[name]
    for chunk in chunks:
        assert ("usage" in chunk) == include_usage
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == ["length"] * 6
    assert len({chunk["id"] for chunk in chunks}) == 1
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order)  # they mix


def test_usage_in_every_chunk(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = client.post(ROUTE, json=ask(n=2, max_tokens=5, stream=True, stream_options=options))
    *chunks, last = events_of(response.content)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 10
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {16}
    assert all(chunk["usage"]["total_tokens"] == count + 16 for chunk, count in zip(chunks, counts, strict=True))


def test_a_failing_prompt_of_a_stream_fails_all(real: Running, client: httpx.Client) -> None:
    body = ask(prompt=[*PROMPTS, "x" * MAX_MODEL_LEN], max_tokens=2000, stream=True)
    error_of(client.post(ROUTE, json=body), 400, "context_length_exceeded")
    assert real.engine.open_streams == 0


def test_a_client_that_leaves_stops_all_its_prompts(real: Running, client: httpx.Client) -> None:
    body = ask(prompt=PROMPTS, max_tokens=3000, stream=True)
    with client.stream("POST", ROUTE, json=body) as response:
        chunks = response.iter_bytes()
        assert next(chunks)
        assert real.engine.open_streams == 3
    wait_until(lambda: real.engine.stats()["open_requests"] == 0, "nothing runs any more")


def test_several_prompts_with_logprobs(client: httpx.Client) -> None:
    reply = complete(client, prompt=PROMPTS, logprobs=1)
    single = complete(client, prompt=PROMPTS[1], logprobs=1)
    assert reply["choices"][1] == single["choices"][0] | {"index": 1}


def test_echo(client: httpx.Client) -> None:
    assert text_of(client, echo=True) == PROMPTS[0] + text_of(client)
    reply = complete(client, prompt=PROMPTS, echo=True, max_tokens=0)
    assert [choice["text"] for choice in reply["choices"]] == PROMPTS
    ids = [[*PROMPTS[0].encode(), EOS], list(PROMPTS[1].encode())]
    reply = complete(client, prompt=ids, echo=True, max_tokens=0)
    assert [choice["text"] for choice in reply["choices"]] == [f"{PROMPTS[0]}<|im_end|>", PROMPTS[1]]
    chunks = events_of(client.post(ROUTE, json=ask(echo=True, stream=True)).content)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PROMPTS[0] + text_of(client)


@pytest.mark.parametrize("max_tokens", [0, 6])
def test_echo_with_logprobs(client: httpx.Client, max_tokens: int) -> None:
    prompt = "Where to? é" * 30  # longer than the rows of a step
    fields = {"prompt": prompt, "max_tokens": max_tokens, "logprobs": 2}
    plain = complete(client, **fields)["choices"][0]
    for _ in range(2):  # what the first has put into the prefix cache is scored all the same
        reply = complete(client, **fields, echo=True)
        echoed = reply["choices"][0]
        assert echoed["text"] == prompt + plain["text"]
        bytes_of_prompt = prompt.encode()
        logprobs = echoed["logprobs"]
        assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(
            plain["logprobs"], len(bytes_of_prompt) + max_tokens
        )
        assert logprobs["tokens"][:5] == list("Where")
        expected = [None, *(-byte / 64 for byte in bytes_of_prompt[1:]), *plain["logprobs"]["token_logprobs"]]
        assert logprobs["token_logprobs"] == expected
        assert logprobs["top_logprobs"][:2] == [None, {"A": -1.0, "B": -2.0}]
        offsets = [offset + len(prompt) for offset in plain["logprobs"]["text_offset"]]
        assert logprobs["text_offset"][len(bytes_of_prompt) :] == offsets
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    chunks = events_of(client.post(ROUTE, json=ask(**fields, echo=True, stream=True)).content)
    for name, values in logprobs.items():
        assert [value for chunk in chunks for value in chunk["choices"][0]["logprobs"][name]] == values


def test_logprobs_of_the_prompt(client: httpx.Client) -> None:
    def position(token: int) -> dict[str, Any]:
        found = {str(65 + k): {"logprob": -1.0 - k, "rank": k + 1, "decoded_token": chr(65 + k)} for k in range(2)}
        own = {str(token): {"logprob": -token / 64, "rank": None, "decoded_token": chr(token)}}
        return found if token in (65, 66) else found | own

    reply = complete(client, prompt=["A cAB", "xy"], prompt_logprobs=2, n=2, max_tokens=3)
    assert [choice["prompt_logprobs"] for choice in reply["choices"]] == [
        [None, *(position(byte) for byte in prompt[1:])] for prompt in (b"A cAB", b"A cAB", b"xy", b"xy")
    ]
    assert reply["choices"][0]["logprobs"] is None
    plain = complete(client, prompt="xy", prompt_logprobs=0, echo=True, logprobs=1)["choices"][0]
    assert list(plain["prompt_logprobs"][1]) == [str(ord("y"))]
    assert plain["logprobs"]["top_logprobs"][1] == {"A": -1.0}
    assert "prompt_logprobs" not in complete(client)["choices"][0]


def test_best_of(client: httpx.Client) -> None:
    every = complete(client, n=4, logprobs=0, max_tokens=30, ignore_eos=False, temperature=1)
    assert len({choice["text"] for choice in every["choices"]}) == 4
    best = complete(client, n=2, best_of=4, max_tokens=30, ignore_eos=False, temperature=1)
    # All tokens are as likely as each other here, so the first win.
    for at, choice in enumerate(best["choices"]):
        assert choice == every["choices"][at] | {"logprobs": None}
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]
    assert (
        complete(client, best_of=3, prompt=PROMPTS, logprobs=1)["choices"]
        == (complete(client, prompt=PROMPTS, logprobs=1)["choices"])
    )


class BodyOf:
    """A stream that has a body."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def body(self) -> bytes:
        return self._body


def test_the_best_have_the_highest_logprob_a_token() -> None:
    def choice(index: int, *logprobs: float) -> CompletionChoice:
        count = len(logprobs)
        lists = CompletionLogprobs(["x"] * count, list(logprobs), [{}] * count, [0] * count)
        return CompletionChoice(index, str(index), lists, "stop")

    choices = [choice(0, -3.0), choice(1, -1.0, -1.5, -1.0), choice(2, -1.0, -1.0), choice(3, -9.0)]
    usage = ChatUsage(1, 7, 8)
    reply = CompletionReply(id="a", object="text_completion", created=1, model=MODEL, choices=choices, usage=usage)
    stream = BodyOf(msgspec.json.encode(reply))
    for with_logprobs in (False, True):
        gathered = GatheredCompletion([stream], 2, with_logprobs=with_logprobs)
        best = msgspec.json.decode(asyncio.run(gathered.body()), type=CompletionReply).choices
        assert [(choice.index, choice.text) for choice in best] == [(0, "2"), (1, "1")]
        assert all((choice.logprobs is not None) == with_logprobs for choice in best)


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
    assert request.pop("envelope")["system_fingerprint"].startswith("fp_")
    assert request == {
        "route": "completions",
        "on_overflow": "truncate_output",
        "model": MODEL,
        "adapter": 0,
        "input": {"type": "text", "text": PROMPTS[0]},
        "stream": True,
        "usage_chunks": "last",
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
        ({"max_tokens": -2}, "max_tokens"),
        ({"n": 65}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 65}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 200, "best_of": 6}, "best_of"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"suffix": "the end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
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
    scored = ask(logprobs=1, echo=True, prompt_logprobs=2)
    validate("CompletionReply", client.post(ROUTE, json=scored).json())
    options = {"include_usage": True, "continuous_usage_stats": True}
    for chunk in events_of(client.post(ROUTE, json=ask(logprobs=1, stream=True, stream_options=options)).content):
        validate("CompletionChunk", chunk)
