"""The documentation: every route with its schemas, and nothing from another server."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import httpx
import jsonschema
import pytest
from conftest import MODEL, Running
from lmserve.api.http.examples.failures import ERROR_REPLIES
from lmserve.api.http.openapi import SCHEMAS
from lmserve.app import API, create_app, openapi_document


class Links(HTMLParser):
    """Every address that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]


def test_the_page_loads_only_from_this_server(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    links = Links()
    links.feed(page.text)
    assert len(links.found) == 4
    for link in links.found:
        assert link.startswith("/docs/assets/")
        asset = client.get(link)
        assert asset.status_code == 200
        assert asset.content
    assert "http" not in page.text
    assert client.get("/docs/").text == page.text
    start = client.get("/docs/assets/start.js").text
    assert "http" not in start
    assert "validatorUrl: null" in start
    style = client.get("/docs/assets/swagger-ui.css").text
    loaded = re.findall(r"url\(\s*['\"]?([^'\")]*)", style)
    assert all(address.startswith("data:") for address in loaded)
    assert "@import" not in style
    # What a script may still try, the browser refuses.
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|\*", policy)


@pytest.fixture
def document(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def test_both_addresses_have_the_document(client: httpx.Client, document: dict[str, Any]) -> None:
    assert client.get("/docs/openapi.json").json() == document
    assert document["openapi"].startswith("3.1")
    assert document["info"]["title"] == "lmserve"


def test_the_document_is_made_when_somebody_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> bytes:
        raise AssertionError("it takes half a second of every start")

    monkeypatch.setattr("lmserve.app.openapi_document", refuse)
    app = create_app(lambda: pytest.fail("nothing is loaded"), (MODEL,))
    with pytest.raises(AssertionError, match="half a second"):
        app.state.openapi_json()


def test_every_route_is_described(document: dict[str, Any]) -> None:
    routes = {
        (re.sub(r":\w+}", "}", path), method.lower())
        for handler in API
        for path in handler.paths
        for method in handler.http_methods
    }
    described = {(path, method) for path, item in document["paths"].items() for method in item if method != "options"}
    assert described == routes
    for item in document["paths"].values():
        for method, operation in item.items():
            assert operation["summary"], method
            assert "200" in operation["responses"]
            for status, reply in operation["responses"].items():
                if status >= "400":
                    schema = reply["content"]["application/json"]["schema"]
                    assert schema["$ref"].endswith("ErrorReply"), (status, schema)
            if method == "post":
                assert operation["responses"].keys() >= {"400", "401", "413", "503"}
                # To cancel takes no body, and an upload takes a form.
                if operation["operationId"] == "upload_file":
                    assert operation["requestBody"]["content"]["multipart/form-data"]["schema"]["required"]
                elif not operation["operationId"].startswith("cancel_"):
                    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]


def test_the_key_is_described() -> None:
    document = json.loads(openapi_document(secured=True))
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    needs = {path: operation.get("security") for path, item in document["paths"].items() for operation in item.values()}
    for path in ("/health", "/health/ready", "/health/live", "/ping", "/version"):
        assert needs.pop(path) in ([], [{}])
    assert all(security in (None, [{"key": []}]) for security in needs.values())


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        found = {node["$ref"]} if "$ref" in node else set()
        return found.union(*(references(value) for value in node.values()))
    return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()


def test_every_reference_is_defined(document: dict[str, Any]) -> None:
    defined = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    found = references(document)
    assert found <= defined
    assert len(found) > 12


def integers(node: Any, path: str) -> list[str]:
    """Integers of `node` without both bounds."""
    if isinstance(node, dict):
        unbounded = node.get("type") == "integer" and not {"minimum", "maximum"} <= node.keys()
        found = [path] if unbounded else []
        return found + [hit for key, value in node.items() for hit in integers(value, f"{path}/{key}")]
    if isinstance(node, list):
        return [hit for index, value in enumerate(node) for hit in integers(value, f"{path}/{index}")]
    return []


def test_requests_are_bounded(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in (
        "GenerateRequest",
        "ChatRequest",
        "CompletionRequest",
        "EncodeRequest",
        "TokenizeRequest",
        "DetokenizeRequest",
        "EmbeddingsRequest",
        "ChatMessage",
        "Message",
    ):
        assert integers(schemas[name], name) == []


def test_the_limits_of_session_ids_are_exact(document: dict[str, Any]) -> None:
    number, name = document["components"]["schemas"]["GenerateRequest"]["properties"]["instance_id"]["anyOf"]
    assert (number["minimum"], number["maximum"]) == (-1, 2**63 - 1)
    assert all(isinstance(number[limit], int) for limit in ("minimum", "maximum"))
    (parameter,) = document["paths"]["/v1/sessions/{session_id}"]["get"]["parameters"]
    for schema in (name, parameter["schema"]):
        assert (schema["minLength"], schema["maxLength"]) == (1, 128)
        assert re.search(schema["pattern"], "ada/é")
        assert not re.search(schema["pattern"], "a\x85")


def test_what_is_not_supported_may_be_null(document: dict[str, Any]) -> None:
    chat = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert chat["audio"]["enum"] == [None]
    assert chat["modalities"]["enum"] == [None, ["text"]]


def test_options_tells_every_method_of_a_path(client: httpx.Client, document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        reply = client.options(path.replace("{session_id}", "7"))
        methods = {method.strip() for method in reply.headers["allow"].split(",")}
        expected = {*map(str.upper, item), "OPTIONS"}
        assert methods == (expected | {"HEAD"} if "get" in item else expected), path


def validate(document: dict[str, Any], name: str, instance: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(instance)


def test_schemas_are_schemas(document: dict[str, Any]) -> None:
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_schema_has_examples_that_fit(document: dict[str, Any]) -> None:
    for model in SCHEMAS:
        examples = document["components"]["schemas"][model.__name__].get("examples", [])
        assert examples or model in ERROR_REPLIES, model  # theirs are with each status
        for example in examples:
            validate(document, model.__name__, example)


TEXTS = {
    (path, "200")
    for path in ("/metrics", "/v1/files/{file_id}/content", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
}


def test_every_reply_has_examples_that_fit(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for operation in item.values():
            for status, reply in operation["responses"].items():
                media = reply["content"].get("application/json")
                if media is None:
                    assert (path, status) in TEXTS
                    continue
                assert "example" in media, (path, status)
                # The example of a union is one of its first form.
                schema = media["schema"]["oneOf"][0] if "oneOf" in media["schema"] else media["schema"]
                if "$ref" in schema:
                    validate(document, schema["$ref"].rpartition("/")[2], media["example"])
                else:
                    jsonschema.validate(media["example"], schema)
                streamed = reply["content"].get("text/event-stream")
                if streamed is not None and "properties" in streamed["schema"]:
                    event = re.search(r"^data: (.*)$", streamed["example"], re.MULTILINE)
                    assert event is not None
                    data = streamed["schema"]["properties"]["data"]["anyOf"][1]
                    chunk = data["contentSchema"]["anyOf"][0]["$ref"].rpartition("/")[2]
                    validate(document, chunk, json.loads(event[1]))


def test_requests_and_replies_are_as_described(served: Running, client: httpx.Client, document: dict[str, Any]) -> None:
    for path, request, reply, body in (
        ("/generate", "GenerateRequest", "GenerateReply", {"prompt": "x", "request_output_len": 2}),
        ("/v1/chat/completions", "ChatRequest", "ChatReply", {"model": MODEL, "messages": "x", "max_tokens": 2}),
        ("/v1/embeddings", "EmbeddingsRequest", "EmbeddingsReply", {"model": MODEL, "input": ["x"]}),
    ):
        validate(document, request, body)
        validate(document, reply, client.post(path, json=body).json())
        error = client.post(path, json={}).json()
        validate(document, "GenerateErrorReply" if path == "/generate" else "ErrorReply", error)
    validate(document, "ModelList", client.get("/v1/models").json())
    validate(document, "HealthReply", client.get("/health").json())
    validate(document, "HealthReply", client.get("/ping").json())
    validate(document, "VersionReply", client.get("/version").json())
    props = client.get("/props").json()
    validate(document, "PropsReply", props)
    assert props["default_generation_settings"]["n_ctx"] == client.get("/v1/models").json()["data"][0]["max_model_len"]
    with pytest.raises(jsonschema.ValidationError):
        validate(document, "GenerateRequest", {"prompt": 5})
