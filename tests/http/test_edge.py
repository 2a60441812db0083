"""What every reply has, and what is refused before any route sees it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.api.http.edge import is_loopback, unversioned
from lmserve.app import API, PAGES
from lmserve.keys import Keyring
from scripted_core import ScriptedCore

from wire import error_of, events_of, frames_of

EVIL = "https://evil.example"
CHAT = {"messages": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    """A server without keys on this machine alone."""
    with serve_core(ScriptedCore(), allowed_hosts=["friend.example"], cors_origins=["https://page.example"]) as running:
        yield running


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with serve_core(ScriptedCore(), keys=Keyring.of("sk-1")) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/nothing", 404),
        ("PUT", "/generate", 405),
        ("POST", "/generate", 400),
        ("POST", "/v1/messages", 400),
        ("OPTIONS", "/generate", 204),
        ("HEAD", "/v1/models", 200),
    ],
)
def test_every_reply_has_an_id(client: httpx.Client, method: str, path: str, status: int) -> None:
    own = client.request(method, path).headers["x-request-id"]
    assert len(own) == 32
    assert client.request(method, path).headers["x-request-id"] != own
    response = client.request(method, path, headers={"X-Request-Id": "mine-7/8"})
    assert response.status_code == status
    assert response.headers["x-request-id"] == "mine-7/8"
    assert response.headers.get("request-id") == ("mine-7/8" if path.startswith("/v1/messages") else None)


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "\u00e9"])
def test_an_id_that_is_none_is_replaced(client: httpx.Client, given: str) -> None:
    headers = {"X-Request-Id": given.encode()}
    assert len(client.get("/health", headers=headers).headers["x-request-id"]) == 32


def test_replies_of_the_core_have_an_id(client: httpx.Client) -> None:
    body = {"prompt": "x", "request_output_len": 2}
    for stream in (False, True):
        response = client.post("/generate", json=body | {"stream": stream}, headers={"X-Request-Id": "a"})
        assert response.headers["x-request-id"] == "a"
    message = {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
    assert client.post("/v1/messages", json=message).headers["request-id"]


def test_head_is_answered_where_get_is(client: httpx.Client) -> None:
    for path in ("/", "/health", "/v1/models", f"/v1/models/{MODEL}", "/docs", "/openapi.json", "/metrics"):
        got, headed = client.get(path), client.head(path)
        assert (headed.status_code, headed.content) == (got.status_code, b""), path
        assert headed.headers.keys() == got.headers.keys()
        if path != "/metrics":
            assert headed.headers["content-length"] == got.headers["content-length"]
    assert client.head("/nothing").status_code == 404
    assert client.head("/generate").status_code == 405
    assert "HEAD" in client.post("/health").headers["allow"]
    assert "HEAD" not in client.get("/generate").headers["allow"]


def test_paths_without_their_version() -> None:
    paths = [path for handler in (*API, *PAGES) for path in handler.paths]
    found = unversioned(paths)
    assert found >= {"chat", "completions", "embeddings", "models", "responses", "messages", "sessions", "usage"}
    assert not found & {"", "generate", "health", "metrics", "docs", "tokenize", "score", "rerank", "embed", "classify"}


def test_openai_without_v1(client: httpx.Client) -> None:
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert client.get(f"/models/{MODEL}").status_code == 200
    assert client.post("/chat/completions", json=CHAT).json()["object"] == "chat.completion"
    assert client.post("/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    assert client.post("/embeddings", json={"input": "x"}).status_code == 200
    assert client.post("/responses", json={"input": "x"}).status_code == 200
    error_of(client.post("/chat/completions", json={}), 400)
    refused = client.post("/messages", json={})
    assert refused.json()["type"] == "error"
    assert refused.headers["request-id"] == refused.headers["x-request-id"]
    error_of(client.get("/chats"), 404)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
        ("/v1/score", {"text_1": "x", "text_2": "y"}),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}),
    ],
)
def test_the_model_may_be_left_out(client: httpx.Client, path: str, body: dict[str, object]) -> None:
    for named in (body, body | {"model": ""}):
        response = client.post(path, json=named)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == MODEL
    error_of(client.post(path, json=body | {"model": "nobody"}), 404, "model_not_found")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "a.localhost:1", "127.0.0.1", "127.1.2.3:9", "[::1]:7", "friend.example:1"]
)
def test_hosts_of_this_machine(local: Running, host: str) -> None:
    assert httpx.get(f"{local.url}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:23333", "localhost.evil.example", "10.0.0.1", "[::2]"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/sessions"), ("POST", "/generate"), ("GET", "/nothing")])
def test_a_foreign_host_is_refused(local: Running, host: str, method: str, path: str) -> None:
    response = httpx.request(method, local.url + path, headers={"Host": host})
    assert host in error_of(response, 403, "host_not_allowed")["message"]
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("origin", [EVIL, "null", "https://localhost.evil.example", "http://[", "x"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/sessions"), ("POST", "/v1/sessions/1/cancel")])
def test_a_foreign_origin_is_refused(local: Running, origin: str, method: str, path: str) -> None:
    response = httpx.request(method, local.url + path, headers={"Origin": origin})
    assert origin in error_of(response, 403, "origin_not_allowed")["message"]


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1", "https://page.example", "https://friend.example"]
)
def test_origins_of_this_machine_and_those_that_are_allowed(local: Running, origin: str) -> None:
    body = {"prompt": "x", "request_output_len": 2}
    response = httpx.post(f"{local.url}/generate", json=body, headers={"Origin": origin})
    assert response.status_code == 200


def test_a_page_of_another_site_changes_nothing(real: Running) -> None:
    """Where any name is right, for the server is not on this machine alone."""
    session = f"{real.url}/v1/sessions/4711"
    turn = {"prompt": "x", "instance_id": 4711, "request_output_len": 2, "stream": True}
    assert frames_of(httpx.post(f"{real.url}/generate", json=turn).content)[-1]["finish_reason"] == "length"
    for method, path in (("POST", "/cancel"), ("POST", "/rewind"), ("DELETE", "")):
        error_of(httpx.request(method, session + path, headers={"Origin": EVIL}), 403, "origin_not_allowed")
    assert httpx.get(session).json()["turns"] == 1
    assert httpx.delete(session, headers={"Origin": real.url}).status_code == 200


def test_a_page_of_another_site_has_no_key(guarded: Running) -> None:
    error_of(httpx.post(f"{guarded.url}/v1/sessions/1/cancel", headers={"Origin": EVIL}), 401)
    own = {"Origin": EVIL, "Authorization": "Bearer sk-1", "Host": "name.example"}
    assert httpx.post(f"{guarded.url}/v1/chat/completions", json=CHAT, headers=own).status_code == 200


def test_names_of_this_machine() -> None:
    assert all(map(is_loopback, ("localhost", "x.localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("", "localhost.example", "128.0.0.1", "0.0.0.0", "::")))


def test_replies_carry_the_servers_fingerprint(real: Running) -> None:
    prints = set()
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 2, "best_of": 2}),
    ):
        reply = httpx.post(real.url + path, json=body).json()
        prints.add(reply["system_fingerprint"])
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "x", "max_tokens": 2})):
        events = events_of(httpx.post(real.url + path, json=body | {"stream": True}).content)
        prints |= {event["system_fingerprint"] for event in events}
    (only,) = prints
    assert only.startswith("fp_")
