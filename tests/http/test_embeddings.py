"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import numpy as np
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


def test_forms_of_8_bits_and_of_one(client: httpx.Client) -> None:
    vector = np.array(embed(client, "Hello")["data"][0]["embedding"])

    def form(name: str) -> Any:
        return np.array(embed(client, "Hello", encoding_format=name)["data"][0]["embedding"])

    assert np.abs(form("int8")).max() == 127
    np.testing.assert_allclose(form("int8") * np.abs(vector).max() / 127, vector, atol=np.abs(vector).max() / 250)
    np.testing.assert_array_equal(form("uint8"), form("int8") + 128)
    np.testing.assert_array_equal(form("ubinary"), np.packbits(vector > 0))
    np.testing.assert_array_equal(form("binary"), np.packbits(vector > 0).astype(int) - 128)


def test_cohere_embeds_in_several_forms(client: httpx.Client) -> None:
    forms = ["float", "base64", "int8", "uint8", "binary", "ubinary"]
    body = {"texts": ["Hello", "Bye"], "input_type": "search_document", "embedding_types": forms}
    reply = client.post("/v2/embed", json=body).json()
    assert reply["id"].startswith("embed-")
    assert (reply["texts"], reply["response_type"]) == (body["texts"], "embeddings_by_type")
    assert reply["embeddings"].keys() == set(forms)
    for form in forms:
        expected = [item["embedding"] for item in embed(client, body["texts"], encoding_format=form)["data"]]
        found = reply["embeddings"][form]
        assert found == (pytest.approx(np.array(expected), abs=1e-6) if form == "float" else expected)
    tokens = reply["meta"]["tokens"]["input_tokens"]
    assert reply["meta"] == {
        "api_version": {"version": "2"},
        "billed_units": {"input_tokens": tokens},
        "tokens": {"input_tokens": tokens, "output_tokens": 0},
    }
    plain = client.post("/v2/embed", json={"texts": ["Hello"], "output_dimension": 4}).json()["embeddings"]
    assert plain.keys() == {"float"}
    assert len(plain["float"][0]) == 4


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("/v2/embed", {"texts": []}, "texts"),
        ("/v2/embed", {"texts": ["a"] * 2049}, "texts"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["int4"]}, "embedding_types[0]"),
        ("/v2/embed", {"texts": ["a"], "truncate": "MIDDLE"}, "truncate"),
        ("/embed", {"inputs": []}, "inputs"),
        ("/embed", {"inputs": ["a", 1]}, "inputs"),
        ("/embed", {"inputs": "a", "normalize": False}, "normalize"),
        ("/embed", {"inputs": "a", "prompt_name": "x"}, "prompt_name"),
    ],
)
def test_invalid_fields_are_named(client: httpx.Client, route: str, fields: dict[str, Any], param: str) -> None:
    error_of(client.post(route, json=fields), 400, param=param)


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
