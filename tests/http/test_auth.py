"""API keys and CORS."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.keys import Keyring
from scripted_core import ScriptedCore

from wire import error_of

CLIENT = httpx.Client()
KEYS = {"sk-first": 1, "sk-second": 2}
ORIGIN = "https://page.example"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with serve_core(ScriptedCore(), keys=Keyring.of(*KEYS), cors_origins=[ORIGIN]) as running:
        yield running


def ask(running: Running, method: str, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    bodies = {
        "/generate": {"prompt": "x", "request_output_len": 2},
        "/v1/chat/completions": {"model": MODEL, "messages": "x", "max_tokens": 2},
        "/v1/embeddings": {"model": MODEL, "input": "x"},
    }
    return CLIENT.request(method, running.url + path, json=bodies.get(path), headers=headers)


ROUTES = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"),
    ("POST", "/generate"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/sessions"),
]
PAGES = ["/", "/web/main.js", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json", "/docs/openapi.json"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(guarded: Running, method: str, path: str) -> None:
    for given in (
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer sk-firs",
        "Bearer sk-firstt",
        "Basic sk-first",
        "sk-first",
        "Bearer sk-first sk-second",
        "Bearer \u00ff",
    ):
        response = ask(guarded, method, path, None if given is None else {"Authorization": given.encode("latin-1")})
        error = error_of(response, 401, "invalid_api_key")
        assert error["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
        assert "sk-" not in response.text
    for key in KEYS:
        assert ask(guarded, method, path, {"Authorization": f"Bearer {key}"}).status_code == 200
        assert ask(guarded, method, path, {"Authorization": f"bearer  {key}"}).status_code == 200


@pytest.mark.parametrize("path", PAGES)
def test_pages_hold_no_data_and_need_no_key(guarded: Running, path: str) -> None:
    assert ask(guarded, "GET", path).status_code == 200
    # The page of the documentation then asks for one, as that at / does once it is refused.
    assert ask(guarded, "GET", "/openapi.json").json()["security"] == [{"key": []}]


def test_health_needs_none(guarded: Running) -> None:
    assert ask(guarded, "GET", "/health").status_code == 200


def test_the_key_comes_before_the_body(guarded: Running) -> None:
    response = httpx.post(f"{guarded.url}/generate", content=b"not json")
    error_of(response, 401)


def test_a_key_is_a_tenant(guarded: Running) -> None:
    for key, tenant in KEYS.items():
        headers = {"Authorization": f"Bearer {key}"}
        for path in ("/generate", "/v1/chat/completions", "/v1/embeddings"):
            assert ask(guarded, "POST", path, headers).status_code == 200
            assert guarded.core.submitted[-1]["tenant"] == tenant
    turn = {"prompt": "x", "instance_id": 5, "request_output_len": 2}
    first, second = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    assert httpx.post(f"{guarded.url}/generate", json=turn, headers=first).status_code == 200
    other = httpx.post(f"{guarded.url}/generate", json=turn | {"sequence_start": False}, headers=second)
    error_of(other, 404, "session_not_found")


def test_preflight_and_errors_can_be_read_by_an_allowed_page(guarded: Running) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = httpx.options(f"{guarded.url}/generate", headers={"Origin": ORIGIN, **asked})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    for path in ("/v1/models", "/nothing", "/health"):
        response = httpx.get(guarded.url + path, headers={"Origin": ORIGIN})
        assert response.headers["access-control-allow-origin"] == ORIGIN
        stranger = httpx.get(guarded.url + path, headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers


def test_no_page_is_allowed_unless_told_so(client: httpx.Client) -> None:
    response = client.get("/v1/models", headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in response.headers


def test_version_and_ping_need_none_but_props_does(guarded: Running) -> None:
    assert ask(guarded, "GET", "/version").json()["version"]
    assert ask(guarded, "GET", "/ping").status_code == 200
    error_of(ask(guarded, "GET", "/props"), 401)
