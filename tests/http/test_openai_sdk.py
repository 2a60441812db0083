"""The `openai` SDK as a client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from conftest import ALIAS, MODEL, NAMES, SLASHED, Running
from openai.types.chat import ChatCompletionMessageParam


@pytest.fixture
def sdk(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def scripted_sdk(scripted: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


HELLO: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello there"},
]


def test_chat(sdk: openai.OpenAI) -> None:
    reply = sdk.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=9)
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage is not None
    assert 0 < reply.usage.completion_tokens <= 9
    assert reply.usage.prompt_tokens_details is not None


def test_chat_stream(sdk: openai.OpenAI) -> None:
    options = {"model": ALIAS, "messages": HELLO, "max_tokens": 20, "seed": 4, "extra_body": {"ignore_eos": True}}
    whole = sdk.chat.completions.create(**options)
    stream = sdk.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert {chunk.model for chunk in chunks} == {ALIAS}


def test_chat_stream_helper(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(model=MODEL, messages=HELLO, max_tokens=8) as stream:
        kinds = {event.type for event in stream}
        final = stream.current_completion_snapshot
    assert "content.delta" in kinds
    assert final.choices[0].finish_reason in ("stop", "length")


def test_an_answer_may_be_sent_back_as_it_came(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4).choices[0].message
    messages = [*HELLO, answer, {"role": "user", "content": "And?"}]
    assert sdk.chat.completions.create(model=MODEL, messages=messages, max_tokens=4).choices


def test_embeddings(sdk: openai.OpenAI) -> None:
    # The SDK asks for base64 where it is not told otherwise.
    packed = sdk.embeddings.create(model=MODEL, input=["one", "two"])
    plain = sdk.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1]
    for a, b in zip(packed.data, plain.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding, abs=1e-6)
        assert sum(x * x for x in b.embedding) == pytest.approx(1, abs=1e-4)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == NAMES
    for name in NAMES:
        model = sdk.models.retrieve(name)
        assert model.id == name
        assert model.owned_by == "lmserve"
    assert "/" in SLASHED


def test_errors_have_the_sdks_classes(sdk: openai.OpenAI, scripted_sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        sdk.chat.completions.create(model="gpt-x", messages=HELLO)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
    assert bad.value.param == "temperature"
    assert "9" in bad.value.message
    for directive, expected in (
        ("[[refuse 409 session_busy]]", openai.ConflictError),
        ("[[refuse 429 queue_full]]", openai.RateLimitError),
        ("[[refuse 503 unavailable]]", openai.InternalServerError),
    ):
        with pytest.raises(expected):
            scripted_sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": directive}])


def test_an_error_in_the_stream_is_raised(scripted_sdk: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "[[fail late]]"}]
    stream = scripted_sdk.chat.completions.create(model=MODEL, messages=messages, stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="failed as asked"):
        seen.extend(stream)
    assert len(seen) == 4
