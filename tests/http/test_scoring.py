"""POST /v1/score, /v1/rerank, /rerank and /v1/classify."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from conftest import MODEL

from wire import error_of

CAT, KITTEN, SPANNER = "A cat.", "A kitten.", "A spanner."


def post(client: httpx.Client, route: str, **fields: Any) -> dict[str, Any]:
    response = client.post(route, json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def vectors(client: httpx.Client, texts: list[str]) -> Any:
    data = post(client, "/v1/embeddings", input=texts)["data"]
    return np.array([item["embedding"] for item in data])


@pytest.mark.parametrize("route", ["/v1/score", "/score"])
def test_scores_are_cosines(client: httpx.Client, route: str) -> None:
    reply = post(client, route, text_1=CAT, text_2=[KITTEN, SPANNER, CAT])
    assert reply.pop("id").startswith("score-")
    assert reply.pop("created") > 1_700_000_000
    data = reply.pop("data")
    assert [(item["index"], item["object"]) for item in data] == [(0, "score"), (1, "score"), (2, "score")]
    cat, *others = vectors(client, [CAT, KITTEN, SPANNER, CAT])
    assert [item["score"] for item in data] == pytest.approx([cat @ other for other in others], abs=1e-5)
    assert data[2]["score"] == pytest.approx(1, abs=1e-6)
    usage = reply.pop("usage")
    assert usage["prompt_tokens"] == usage["total_tokens"] > 0
    assert reply == {"object": "list", "model": MODEL}


def test_pairs(client: httpx.Client) -> None:
    reply = post(client, "/v1/score", text_1=[CAT, SPANNER], text_2=[KITTEN, CAT])
    first, second, third = vectors(client, [CAT, SPANNER, KITTEN])
    assert [item["score"] for item in reply["data"]] == pytest.approx([first @ third, second @ first], abs=1e-5)
    single = post(client, "/v1/score", text_1=[CAT], text_2=KITTEN)
    assert single["data"][0]["score"] == pytest.approx(reply["data"][0]["score"], abs=1e-6)


@pytest.mark.parametrize("route", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_documents_in_order(client: httpx.Client, route: str) -> None:
    documents = [SPANNER, {"text": CAT, "title": "ignored"}, KITTEN, "Something else."]
    texts = [SPANNER, CAT, KITTEN, "Something else."]
    reply = post(client, route, query=CAT, documents=documents)
    cat, *others = vectors(client, [CAT, *texts])
    scores = [cat @ other for other in others]
    order = sorted(range(4), key=lambda index: -scores[index])
    assert [item["index"] for item in reply["results"]] == order
    assert order[0] == 1
    for item in reply["results"]:
        assert item["relevance_score"] == pytest.approx(scores[item["index"]], abs=1e-5)
        assert item["document"] == {"text": texts[item["index"]]}
    assert reply["model"] == MODEL
    assert reply["id"].startswith("rerank-")
    assert reply["usage"]["total_tokens"] > 0


def test_only_the_best(client: httpx.Client) -> None:
    every = post(client, "/v1/rerank", query=CAT, documents=[SPANNER, CAT, KITTEN], return_documents=False)["results"]
    assert all(item.keys() == {"index", "relevance_score"} for item in every)
    best = post(client, "/v1/rerank", query=CAT, documents=[SPANNER, CAT, KITTEN], return_documents=False, top_n=2)
    assert best["results"] == every[:2]
    more = post(client, "/v1/rerank", query=CAT, documents=[SPANNER], top_n=5)
    assert len(more["results"]) == 1


@pytest.mark.parametrize(("route", "version"), [("/v1/rerank", "1"), ("/rerank", "1"), ("/v2/rerank", "2")])
def test_what_cohere_says_beside_the_results(client: httpx.Client, route: str, version: str) -> None:
    reply = post(client, route, query=CAT, documents=[CAT] * 101)
    tokens = {"input_tokens": reply["usage"]["prompt_tokens"], "output_tokens": 0}
    assert reply["meta"] == {"api_version": {"version": version}, "billed_units": {"search_units": 2}, "tokens": tokens}


def test_texts_are_ranked_as_by_tei(client: httpx.Client) -> None:
    best = post(client, "/v1/rerank", query=CAT, documents=[SPANNER, CAT, KITTEN])["results"]
    bare = client.post("/rerank", json={"query": CAT, "texts": [SPANNER, CAT, KITTEN], "raw_scores": True}).json()
    assert bare == [{"index": item["index"], "score": item["relevance_score"]} for item in best]


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("/v1/score", {"text_1": [CAT, CAT], "text_2": CAT}, "text_1"),
        ("/v1/score", {"text_1": [], "text_2": CAT}, "text_1"),
        ("/v1/score", {"text_1": CAT, "text_2": ""}, "text_2"),
        ("/v1/score", {"text_1": CAT, "text_2": [CAT] * 1025}, "text_2"),
        ("/v1/score", {"text_1": CAT}, "text_2"),
        ("/v1/rerank", {"query": CAT, "documents": []}, "documents"),
        ("/v1/rerank", {"query": CAT, "documents": [CAT] * 1025}, "documents"),
        ("/v1/rerank", {"query": CAT, "documents": [{"image": "x"}]}, "documents[0].text"),
        ("/v1/rerank", {"query": CAT, "documents": [CAT], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": CAT, "documents": [CAT], "max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ("/v1/rerank", {"query": "", "documents": [CAT]}, "query"),
        ("/rerank", {"query": CAT}, "texts"),
        ("/rerank", {"query": CAT, "texts": [CAT], "documents": [CAT]}, "documents"),
        ("/rerank", {"query": CAT, "texts": [CAT], "top_n": 1}, "top_n"),
        ("/rerank", {"query": CAT, "documents": [CAT], "raw_scores": True}, "raw_scores"),
        ("/rerank", {"query": CAT, "texts": []}, "texts"),
        ("/v1/classify", {"input": CAT}, "model"),
        ("/v1/classify", {"input": [""]}, "input[0]"),
    ],
)
def test_invalid_parameters_are_named(client: httpx.Client, route: str, fields: dict[str, Any], param: str) -> None:
    error_of(client.post(route, json={"model": MODEL, **fields}), 400, param=param)


def test_unknown_model(client: httpx.Client) -> None:
    body = {"model": "gpt-x", "query": CAT, "documents": [CAT]}
    error_of(client.post("/v1/rerank", json=body), 404, "model_not_found", "model")
