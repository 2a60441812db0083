"""A model that fails in the middle of an answer: what each route's client is told, and what stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from conftest import MODEL, Running, serve_core
from lmserve import _core
from lmserve.model.interface import LogitEdits
from tiny_engine import EOS, TEMPLATE, FormulaRunner, byte_tokenizer

from wire import error_of, wait_until

WHY = "the model failed"
HELLO: Any = [{"role": "user", "content": "Hello"}]


class FailingRunner(FormulaRunner):
    """Fails in the step that `fails_at` counts down to, and in the two after it.

    A step of two sequences is tried again in halves.
    """

    fails_at = -9  # steps from now

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        super().launch(n_tokens, n_seqs, n_rows, edits)
        self.fails_at -= 1
        if -3 < self.fails_at <= 0:
            raise RuntimeError("out of luck")


@pytest.fixture(scope="module")
def runner() -> FailingRunner:
    return FailingRunner()


@pytest.fixture(scope="module")
def server(runner: FailingRunner) -> Iterator[Running]:
    template = _core.ChatTemplate(TEMPLATE, b'{"eos_token": "<|im_end|>"}')
    with serve_core(_core.Engine(runner, byte_tokenizer(), template, eos_token_ids=[EOS])) as running:
        yield running


@pytest.fixture
def client(server: Running, runner: FailingRunner) -> Iterator[httpx.Client]:
    """The model fails in the fifth step from now."""
    runner.fails_at = 5
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client

    def nothing_is_left() -> bool:
        stats = server.core.stats()
        return stats["open_requests"] == stats["owned_blocks"] == 0

    wait_until(nothing_is_left, "nothing of the requests is left")


REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": MODEL, "max_tokens": 30, "messages": HELLO},
    "/v1/responses": {"model": MODEL, "max_output_tokens": 30, "ignore_eos": True, "input": "Hello"},
    "/v1/chat/interactive": {"prompt": "Hello", "request_output_len": 30, "ignore_eos": True, "session_id": 5},
    "/v1/completions": {"model": MODEL, "max_tokens": 30, "prompt": ["Hello", "There"], "ignore_eos": True},
}


@pytest.mark.parametrize("route", REQUESTS)
def test_a_whole_reply_is_a_500(client: httpx.Client, route: str) -> None:
    response = client.post(route, json=REQUESTS[route])
    if route == "/v1/messages":
        assert response.status_code == 500
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == "api_error"
    else:
        assert WHY in error_of(response, 500, "internal_error")["message"]


def test_messages_streamed(client: httpx.Client) -> None:
    with anthropic.Anthropic(base_url=str(client.base_url), api_key="unused", max_retries=0) as sdk:
        seen = []
        with (
            pytest.raises(anthropic.APIStatusError, match=WHY),
            sdk.messages.stream(**REQUESTS["/v1/messages"]) as stream,
        ):
            seen.extend(stream.text_stream)
    assert seen


def test_responses_streamed(client: httpx.Client) -> None:
    response = client.post("/v1/responses", json=REQUESTS["/v1/responses"] | {"stream": True})
    *_, event, rest = response.text.split("\n\n")
    assert rest == ""
    name, data = event.split("\n")
    assert name == "event: response.failed"
    failed = json.loads(data.removeprefix("data: "))["response"]
    assert failed["status"] == "failed"
    assert WHY in failed["error"]["message"]
    assert failed["output"][0]["status"] == "incomplete"
    assert failed["output"][0]["content"][0]["text"]
    # There is no turn to go on from.
    error_of(client.get(f"/v1/responses/{failed['id']}"), 404, "response_not_found")
    body = REQUESTS["/v1/responses"] | {"previous_response_id": failed["id"]}
    error_of(client.post("/v1/responses", json=body), 404, "previous_response_not_found")


def test_a_branch_that_fails_leaves_its_parent(client: httpx.Client, server: Running, runner: FailingRunner) -> None:
    runner.fails_at = -9
    first = client.post("/v1/responses", json=REQUESTS["/v1/responses"]).json()
    sessions = server.core.stats()["sessions"]
    runner.fails_at = 5
    body = REQUESTS["/v1/responses"] | {"previous_response_id": first["id"]}
    error_of(client.post("/v1/responses", json=body), 500)
    runner.fails_at = -9
    assert server.core.stats()["sessions"] == sessions
    assert client.post("/v1/responses", json=body).json()["status"] == "incomplete"


def test_interactive_lines(client: httpx.Client) -> None:
    body = REQUESTS["/v1/chat/interactive"] | {"stream": True, "interactive_mode": True}
    *lines, rest = client.post("/v1/chat/interactive", json=body).text.split("\n")
    assert rest == ""
    last = json.loads(lines[-1])
    assert (last["finish_reason"], last["text"]) == ("error", "")
    assert WHY in last["error"]["message"]
    assert last["tokens"] == json.loads(lines[-2])["tokens"]
    error_of(client.get("/v1/sessions/5"), 404, "session_not_found")


def test_several_prompts_streamed(client: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as sdk:
        stream = sdk.completions.create(model=MODEL, prompt=["Hello", "There"], max_tokens=30, stream=True)
        seen = []
        with pytest.raises(openai.APIError, match=WHY):
            seen.extend(stream)
    assert seen
