"""POST /tokenize, /detokenize and /v1/encode."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from conftest import MODEL, NAMES, ServerThread
from lmserve import _core
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.text import INLINE, MAX_WAITING, TextLayer
from lmserve.errors import LmserveError
from tiny_engine import MAX_MODEL_LEN, TEMPLATE, byte_tokenizer, formula_engine

from wire import error_of

HELLO = [{"role": "user", "content": "Hello"}]
ASKED = "<|im_start|>user\nHello<|im_end|>\n"
GENERATION_PROMPT = "<|im_start|>assistant\n"
# Short enough for the event loop, and not.
TEXTS = ["", "Hi", "é你😀", "<|im_start|>", "x\0y", "word " * INLINE]


def ids_of(text: str) -> list[int]:
    """One token a byte, and the special ones."""
    ids: list[int] = []
    for part in re.split(r"(<\|im_(?:start|end)\|>)", text):
        ids += {"<|im_start|>": [256], "<|im_end|>": [257]}.get(part, list(part.encode()))
    return ids


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    text = TextLayer(
        byte_tokenizer(),
        _core.ChatTemplate(TEMPLATE, b"{}"),
        template_source=TEMPLATE,
        special_tokens={"eos_token": "<|im_end|>", "additional": "x"},
    )
    engine = AsyncEngine(formula_engine(), max_model_len=MAX_MODEL_LEN, text=text)
    with ServerThread(create_app(engine, NAMES)) as thread:
        yield thread.url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ok(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(client: httpx.Client, text: str) -> None:
    reply = ok(client, "/tokenize", model=MODEL, prompt=text)
    ids = ids_of(text)
    assert reply == {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None}
    assert ok(client, "/detokenize", model=MODEL, tokens=ids) == {"prompt": text}
    assert ok(client, "/v1/encode", input=text) == {"input_ids": ids, "length": len(ids)}


def test_the_texts_of_tokens(client: httpx.Client) -> None:
    assert ok(client, "/tokenize", prompt="aé", return_token_strs=True)["token_strs"] == ["a", "\ufffd", "\ufffd"]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, ASKED + GENERATION_PROMPT),
        ({"add_generation_prompt": False}, ASKED),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "Well"}], "continue_final_message": True},
            f"{ASKED}{GENERATION_PROMPT}Well",
        ),
        ({"messages": [{"role": "user", "content": "x" * INLINE}]}, None),
    ],
)
def test_messages_are_tokenized_as_the_model_sees_them(
    client: httpx.Client, fields: dict[str, Any], prompt: str | None
) -> None:
    body = {"messages": HELLO} | fields
    reply = ok(client, "/tokenize", **body)
    if prompt is not None:
        assert reply["tokens"] == ids_of(prompt)
    chat = client.post("/v1/chat/completions", json=body | {"model": MODEL, "max_tokens": 1}).json()
    assert reply["count"] == len(reply["tokens"]) == chat["usage"]["prompt_tokens"]


def test_several_texts(client: httpx.Client) -> None:
    reply = ok(client, "/v1/encode", input=TEXTS)
    assert reply["input_ids"] == [ids_of(text) for text in TEXTS]
    assert reply["length"] == [len(ids_of(text)) for text in TEXTS]


def test_texts_as_turns(client: httpx.Client) -> None:
    ids = ids_of(ASKED + GENERATION_PROMPT)
    assert ok(client, "/v1/encode", input=["Hello"], do_preprocess=True) == {"input_ids": [ids], "length": [len(ids)]}
    assert ok(client, "/v1/encode", input="Hello", add_bos=False)["input_ids"] == ids_of("Hello")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ("/tokenize", {"prompt": "x", "unknown": 1}, "unknown"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/v1/encode", {"input": []}, "input"),
        ("/v1/encode", {"input": ["x"] * 257}, "input"),
        ("/v1/encode", {"input": [1]}, "input[0]"),
        ("/v1/encode", {"input": "x", "do_preprocess": True, "add_bos": False}, "add_bos"),
    ],
)
def test_invalid_requests_are_named(client: httpx.Client, path: str, body: dict[str, Any], param: str | None) -> None:
    error_of(client.post(path, json=body), 400, param=param)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]}), ("/v1/encode", {"input": "x"})],
)
def test_requests_and_replies_are_as_described(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"][path]["post"]

    def validate(part: dict[str, Any], instance: Any) -> None:
        schema = part["content"]["application/json"]["schema"] | {"components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(instance)

    validate(operation["requestBody"], body)
    validate(operation["responses"]["200"], ok(client, path, **body))
    error_of(client.post(path, json=body | {"model": "gpt-x"}), 404, "model_not_found", "model")


def test_a_model_without_a_tokenizer_says_so(scripted_client: httpx.Client) -> None:
    error_of(scripted_client.post("/tokenize", json={"prompt": "x"}), 400, "unsupported_parameter")


def test_what_the_tokenizer_is(client: httpx.Client, scripted_client: httpx.Client) -> None:
    assert client.get("/tokenizer_info").json() == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "unk_token": None,
        "model_max_length": MAX_MODEL_LEN,
    }
    error_of(scripted_client.get("/tokenizer_info"), 400, "unsupported_parameter")


def test_only_so_many_long_texts_wait() -> None:
    async def run() -> None:
        text = TextLayer(byte_tokenizer(), None)
        release = threading.Event()
        waiting = [asyncio.create_task(text.run(INLINE + 1, release.wait)) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(LmserveError) as refused:
            await text.run(INLINE + 1, release.wait)
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        assert await text.run(INLINE, lambda: "small ones do not wait") == "small ones do not wait"
        release.set()
        assert all(await asyncio.gather(*waiting))
        assert await text.run(INLINE + 1, release.wait)

    asyncio.run(run())
