"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import pytest
from conftest import ALIAS, MODEL, Running

from wire import error_of


def embed(client: httpx.Client, source: Any, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": source, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_shape(client: httpx.Client) -> None:
    reply = embed(client, ["Hello", "你好"], model=ALIAS, user="someone")
    assert reply["object"] == "list"
    assert reply["model"] == ALIAS
    assert [item["index"] for item in reply["data"]] == [0, 1]
    assert {item["object"] for item in reply["data"]} == {"embedding"}
    assert reply["data"][0]["embedding"] != reply["data"][1]["embedding"]
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] > 0


def test_base64_holds_the_same_floats(client: httpx.Client) -> None:
    (plain,) = embed(client, "Hello", encoding_format="float")["data"]
    (packed,) = embed(client, "Hello", encoding_format="base64")["data"]
    raw = base64.b64decode(packed["embedding"], validate=True)
    assert struct.unpack(f"<{len(plain['embedding'])}f", raw) == pytest.approx(plain["embedding"], abs=1e-6)


def test_dimensions(client: httpx.Client) -> None:
    (item,) = embed(client, "Hello", dimensions=4)["data"]
    assert len(item["embedding"]) == 4
    assert sum(x * x for x in item["embedding"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("source", "inputs"),
    [
        ("a", [{"text": "a"}]),
        (["a", "b"], [{"text": "a"}, {"text": "b"}]),
        ([1, 2], [{"ids": [1, 2]}]),
        ([[1, 2], [3]], [{"ids": [1, 2]}, {"ids": [3]}]),
    ],
)
def test_what_the_core_is_asked(
    scripted: Running, scripted_client: httpx.Client, source: Any, inputs: list[dict[str, Any]]
) -> None:
    embed(scripted_client, source)
    assert scripted.core.submitted[-1] == {"model": MODEL, "inputs": inputs}


def test_mixed_inputs(client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": ["a", 1]})
    assert "mixed" in error_of(response, 400, "invalid_value", "input")["message"]


def test_unknown_model(client: httpx.Client) -> None:
    error_of(client.post("/v1/embeddings", json={"model": "x", "input": "a"}), 404, "model_not_found", "model")
