"""What becomes of every parameter of the routes that compute: docs/conformance.md, found by sending each one.

`make conformance` writes the page. A parameter is honoured if it changes what the core is asked or what the client
gets, refused if it is answered with a 400, and else it has no effect, which its description must say.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from conformance_state import over_socket, state_lines
from conftest import MODEL, NAMES, ServerThread
from lmserve import _core
from lmserve.app import create_app
from lmserve.engine.adapters import Adapters
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.text import TextLayer
from lmserve.model.adapter_files import Adapter
from lmserve.model.embedding import Embedding
from tiny_engine import MAX_MODEL_LEN, TEMPLATE, byte_tokenizer, formula_engine

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CUSTOM_TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
CHAT = {"model": MODEL, "messages": HELLO, "max_tokens": 2}
COMPLETION = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}

# Each route with a request that works.
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": {"model": MODEL, "input": "Hello", "max_output_tokens": 2},
    "/v1/responses/input_tokens": {"model": MODEL, "input": "Hello"},
    "/v1/responses/compact": {"model": MODEL, "input": "Hello"},
    "/v1/embeddings": {"model": MODEL, "input": "Hello"},
    "/v2/embed": {"model": MODEL, "texts": ["Hello"]},
    "/embed": {"inputs": "Hello"},
    "/v1/messages": {"model": MODEL, "messages": HELLO, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": HELLO},
    "/v1/score": {"model": MODEL, "text_1": "A", "text_2": ["B", "C"]},
    "/v1/rerank": {"model": MODEL, "query": "A", "documents": ["B", "C"]},
    "/rerank": {"query": "A", "texts": ["B", "C"]},
    "/generate": {"prompt": "Hello", "request_output_len": 2},
    "/v1/chat/interactive": {"prompt": "Hello", "request_output_len": 2},
    "/v1/sessions/{session_id}/fork": {"session_id": 8},
    "/v1/sessions/{session_id}/rewind": {"turns": 2},
    "/v1/sessions/{session_id}/append": {"prompt": "Hello"},
    "/v1/sessions/{session_id}/turns": {"prompt": "Hello", "max_tokens": 2},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [72, 105]},
    "/v1/encode": {"input": "Hello"},
}


@dataclass(frozen=True)
class Probe:
    """A value of a parameter, and what must go with it."""

    value: Any
    beside: dict[str, Any]


def probe(value: Any, **beside: Any) -> Probe:
    return Probe(value, beside)


# What may be sent for a parameter that is said to have no effect.
ANYTHING = probe("x")

# By parameter, or by route and parameter.
PROBES: dict[str, Probe] = {
    "model": probe("nobody"),
    "/generate model": probe("adapter"),
    "/v1/sessions/{session_id}/turns model": probe("adapter"),
    "messages": probe([{"role": "user", "content": "Bye"}]),
    "prompt": probe("Bye"),
    "input": probe("Bye"),
    "stream": probe(True),
    "stream_options": probe({"include_usage": True}, stream=True),
    "max_tokens": probe(3),
    "max_completion_tokens": probe(1),
    "max_output_tokens": probe(3),
    "temperature": probe(0.5),
    "top_p": probe(0.5),
    "top_k": probe(5),
    "min_p": probe(0.5),
    "n": probe(2),
    "best_of": probe(2),
    "stop": probe(["x"]),
    "/generate stop": probe(True, instance_id=7),
    "stop_sequences": probe(["x"]),
    "stop_words": probe(["x"]),
    "seed": probe(5),
    "presence_penalty": probe(0.5),
    "frequency_penalty": probe(0.5),
    "repetition_penalty": probe(1.5),
    "logit_bias": probe({"65": 1}),
    "logprobs": probe(True),
    "/v1/completions logprobs": probe(1),
    "top_logprobs": probe(2, logprobs=True),
    "/v1/responses top_logprobs": probe(2, include=["message.output_text.logprobs"]),
    "include": probe(["message.output_text.logprobs"]),
    "prompt_logprobs": probe(1),
    "echo": probe(True),
    "session_id": probe(7),
    "/v1/sessions/{session_id}/fork session_id": probe(9),
    "turns": probe(1),
    "create": probe(True),
    "/v1/sessions/{session_id}/append on_disconnect": probe("keep"),
    "/v1/sessions/{session_id}/append on_overflow": probe("drop_oldest_turns"),
    "/v1/sessions/{session_id}/turns messages": probe([{"role": "user", "content": "Bye"}], prompt=None),
    "/v1/sessions/{session_id}/turns on_disconnect": probe("keep"),
    "end": probe(True),
    "instance_id": probe(7),
    "renew_session": probe(True, session_id=7),
    "interactive_mode": probe(True, session_id=7),
    "sequence_start": probe(False, instance_id=7),
    "sequence_end": probe(True, instance_id=7),
    "cancel": probe(True, session_id=7),
    "request_output_len": probe(3),
    "ignore_eos": probe(True),
    "min_tokens": probe(1),
    "min_new_tokens": probe(1),
    "stop_token_ids": probe([65]),
    "include_stop_str_in_output": probe(True),
    "skip_special_tokens": probe(False),
    "spaces_between_special_tokens": probe(False),
    "priority": probe(1),
    "add_generation_prompt": probe(False),
    "/tokenize add_generation_prompt": probe(False, messages=HELLO, prompt=None),
    "continue_final_message": probe(True, messages=[*HELLO, {"role": "assistant", "content": "So"}]),
    "/tokenize continue_final_message": probe(
        True, messages=[*HELLO, {"role": "assistant", "content": "So"}], prompt=None
    ),
    "/tokenize messages": probe(HELLO, prompt=None),
    "chat_template_kwargs": probe({"enable_thinking": True}),
    "/tokenize chat_template_kwargs": probe({"enable_thinking": True}, messages=HELLO, prompt=None),
    "on_disconnect": probe("keep", session_id=7),
    "/generate on_disconnect": probe("keep", instance_id=7),
    "on_overflow": probe("truncate_output"),
    "/v1/chat/completions on_overflow": probe("truncate_output", session_id=7),
    "retention": probe({"hold": "1m"}, session_id=7),
    "/generate retention": probe({"hold": "1m"}, instance_id=7),
    "/v1/sessions/{session_id}/turns retention": probe({"hold": "1m"}),
    "return_token_ids": probe(True),
    "return_tokens_as_token_ids": probe(True, logprobs=True),
    "/v1/completions return_tokens_as_token_ids": probe(True, logprobs=1),
    "/v1/chat/completions prompt_cache_key": probe("a"),
    "/v1/responses prompt_cache_key": probe("a"),
    "/v1/responses/input_tokens reasoning": probe({"effort": "none"}),
    "/v1/responses/input_tokens tools": probe([{"type": "function", "name": "f"}]),
    "/v1/responses/input_tokens tool_choice": probe("required", tools=[{"type": "function", "name": "f"}]),
    "previous_response_id": probe("resp_0123456789abcdef"),
    "instructions": probe("Be brief."),
    "store": probe(False),
    "/v1/chat/completions store": probe(True),
    "background": probe(True),
    "truncation": probe("auto"),
    "metadata": probe({"a": "b"}),
    "user": probe("ada"),
    "system": probe("Be brief."),
    "encoding_format": probe("base64"),
    "dimensions": probe(2),
    "prompt_name": probe("query"),
    "input_type": probe("document"),
    "truncate_prompt_tokens": probe(3),
    "truncate": probe("START"),
    "/embed truncate": probe(True),
    "/rerank truncate": probe(True),
    "truncation_direction": probe("Left", truncate=True),
    "normalize": probe(True),
    "texts": probe(["Bye"]),
    "inputs": probe("Bye"),
    "embedding_types": probe(["int8"]),
    "output_dimension": probe(2),
    "/v2/embed max_tokens": probe(3),
    "raw_scores": probe(True),
    "return_text": probe(True),
    "/rerank documents": probe(["Y"], texts=None),
    "/rerank top_n": probe(1, texts=None, documents=["B", "C"]),
    "/rerank return_documents": probe(False, texts=None, documents=["B", "C"]),
    "/rerank max_tokens_per_doc": probe(5, texts=None, documents=["B", "C"]),
    "text_1": probe("Z"),
    "text_2": probe(["Y"]),
    "query": probe("Z"),
    "documents": probe(["Y"]),
    "top_n": probe(1),
    "return_documents": probe(False),
    "max_tokens_per_doc": probe(5),
    "add_special_tokens": probe(False),
    "return_token_strs": probe(True),
    "tokens": probe([72]),
    "do_preprocess": probe(True),
    "add_bos": probe(False),
    "parallel_tool_calls": probe(False),
    "/v1/chat/completions parallel_tool_calls": probe(False, tools=[TOOL], tool_choice="required"),
    "tools": probe([TOOL]),
    "/v1/responses tools": probe([{"type": "function", "name": "f"}]),
    "/v1/messages tools": probe([CUSTOM_TOOL]),
    "/v1/messages/count_tokens tools": probe([CUSTOM_TOOL]),
    "tool_choice": probe("required", tools=[TOOL]),
    "/v1/responses tool_choice": probe("required", tools=[{"type": "function", "name": "f"}]),
    "/v1/messages tool_choice": probe({"type": "any"}, tools=[CUSTOM_TOOL]),
    "/v1/messages/count_tokens tool_choice": probe({"type": "none"}, tools=[CUSTOM_TOOL]),
    "functions": probe([TOOL["function"]]),
    "function_call": probe({"name": "f"}, functions=[TOOL["function"]]),
    "response_format": probe({"type": "json_object"}),
    "structured_outputs": probe({"regex": "[a-z]+"}),
    "guided_json": probe({"type": "object"}),
    "guided_regex": probe("[a-z]+"),
    "guided_choice": probe(["red", "blue"]),
    "guided_grammar": probe('start: "red"'),
    "guided_whitespace": probe("free", response_format={"type": "json_object"}),
    "reasoning_effort": probe("high"),
    "reasoning": probe({"effort": "high"}),
    "thinking_budget": probe(5),
    "enable_thinking": probe(False),
    "/v1/messages/count_tokens output_config": probe({"effort": "high"}),
    "text": probe({"format": {"type": "json_object"}}),
    "modalities": probe(["text", "audio"]),
    "audio": probe({"voice": "alloy", "format": "wav"}),
    "moderation": probe({"model": "omni"}),
    "suffix": probe("x"),
    "thinking": probe({"type": "disabled"}),
    "mcp_servers": probe([{"url": "x"}]),
    "output_config": probe({"format": {"type": "json_schema", "schema": {"type": "object"}}}),
    "output_format": probe({"type": "json_schema", "schema": {"type": "object"}}),
    "/v1/messages/count_tokens output_format": ANYTHING,
    "conversation": probe("conv_1"),
    "image": probe({}),
    "kwargs": probe({"a": 1}),
    "adapter_name": probe("x"),
    "image_url": probe("http://127.0.0.1/x.png"),
}


class RecordingCore:
    """The real core, and what it was asked."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.asked: list[dict[str, Any]] = []

    def submit(self, submission: bytes) -> Any:
        self.asked.append(json.loads(submission))
        return self._core.submit(submission)

    def embed(self, submission: bytes) -> Any:
        self.asked.append(json.loads(submission))
        return self._core.embed(submission)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


@dataclass
class Server:
    """A server, and the core behind it."""

    client: httpx.Client
    core: RecordingCore

    def begin_sessions(self) -> None:
        """Session 7 has two turns, and those that a fork may begin do not live."""
        for session in (8, 9):
            self.client.delete(f"/v1/sessions/{session}")
        for first in (True, False):
            turn = {"instance_id": 7, "sequence_start": first, "prompt": "Hi", "request_output_len": 1, "seed": 1}
            self.client.post("/generate", json=turn).raise_for_status()

    def outcome(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        """The status, and what the core was asked or, where it was not, the reply."""
        if "{session_id}" in route:
            self.begin_sessions()
        self.core.asked.clear()
        response = self.client.post(
            route.replace("{session_id}", "7"), json={name: value for name, value in body.items() if value is not None}
        )
        asked = [{**each, "reply_id": "", "created": 0} for each in self.core.asked]
        for each in asked:
            # A stored response is a session of a random id.
            if each.get("session", {}).get("id", 0) < 0:
                each["session"]["id"] = -1
        kind = response.headers["content-type"]
        generates = any("route" in each for each in asked)
        text = "" if generates else re.sub(r'"(id":"[^"]*"|(created|created_at|age|idle)":[\d.]+)', "", response.text)
        return response.status_code, (asked, kind, text)


class AnyAdapter:
    """Takes adapters, and computes as without them."""

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """Nothing."""

    def unload_adapter(self, number: int) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    template = _core.ChatTemplate(f"{TEMPLATE}{{{{ enable_thinking }}}}", b"{}")
    core = RecordingCore(formula_engine(template=template))
    text = TextLayer(byte_tokenizer(begins=True), template)
    embedding = Embedding(prompts={"query": "Q: ", "document": "D: "}, dimensions=(0,), length=8)
    adapters = Adapters(lambda path: Adapter(Path(path), bytes(32), {}), AnyAdapter(), core, most=1)  # type: ignore[arg-type]
    adapters.load("adapter", "/adapter")
    engine = AsyncEngine(core, max_model_len=MAX_MODEL_LEN, text=text, embedding=embedding, adapters=adapters)  # type: ignore[arg-type]
    with (
        ServerThread(create_app(engine, NAMES)) as thread,
        httpx.Client(base_url=thread.url, timeout=60) as client,
    ):
        yield Server(client, core)


def verdict(server: Server, route: str, name: str, tried: Probe) -> str:
    body = ROUTES[route] | tried.beside
    status, without = server.outcome(route, body)
    if status != 200:
        # The parameter stands for one that is left out.
        status, without = server.outcome(route, ROUTES[route])
    assert status == 200, (route, name, without)
    status, outcome = server.outcome(route, body | {name: tried.value})
    if status == 400:
        return "refused"
    if status == 200 and outcome == without:
        return "no effect"
    # What is not here was looked for, and a session keeps to what computed it.
    assert status in (200, 404, 409), (route, name, outcome)
    return "honoured"


def properties(document: dict[str, Any], route: str) -> dict[str, Any]:
    schema = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]


def socket_lines(server: Server) -> list[str]:
    """Of the WebSocket, where each parameter is what it is in a request; the page has the others."""
    route, url = "/v1/responses", str(server.client.base_url)
    working = {**ROUTES[route], "stream": True}

    def asked(send: Callable[[dict[str, Any]], int], body: dict[str, Any]) -> tuple[int, Any]:
        server.core.asked.clear()
        status = send({name: value for name, value in body.items() if value is not None})
        # A connection has sessions where a request has none.
        own = {"reply_id": "", "created": 0, "session": None}
        return status, [{**each, **own} for each in server.core.asked]

    def posted(body: dict[str, Any]) -> int:
        return server.client.post(route, json=body).status_code

    def told(body: dict[str, Any]) -> int:
        return over_socket(url, {"type": "response.create", **body})

    for name in properties(server.client.get("/openapi.json").json(), route):
        tried = PROBES.get(f"{route} {name}") or PROBES.get(name) or ANYTHING
        body = working | tried.beside | {name: tried.value}
        if name != "background":
            assert asked(told, body) == asked(posted, body), name
    plain = asked(told, working)
    assert asked(told, working | {"stream": False}) == plain
    assert asked(told, working | {"generate": False}) == (200, [])
    assert [asked(told, working | other) for other in ({"type": "x"}, {"background": True})] == [(400, [])] * 2
    return [SOCKET]


def test_the_page_is_what_the_server_does(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    lines, missing, wrong = [HEAD], [], []
    for route, working in ROUTES.items():
        lines += [f"## `POST {route}`", "", "| Parameter | | |", "|---|---|---|"]
        for name, schema in properties(document, route).items():
            says = schema.get("description", "")
            tried = PROBES.get(f"{route} {name}") or PROBES.get(name)
            if tried is None:
                if "no effect" not in says:
                    missing.append(f"{route} {name}: {says}")
                    continue
                tried = ANYTHING
            found = verdict(server, route, name, tried)
            says_nothing, says_refused = "no effect" in says, "Not supported" in says
            if (found == "no effect") != says_nothing or (found == "refused") != says_refused:
                wrong.append(f"{route} {name} is {found}, but: {says}")
            lines.append(f"| `{name}` | {found} | {says} |")
        unknown, _ = server.outcome(route, working | {"no_such_parameter": 1})
        lines += [f"| any other | {'refused' if unknown == 400 else 'ignored'} | |", ""]
    lines += [*state_lines(server.client, document), *socket_lines(server)]
    assert not missing, "each of these needs a probe:\n" + "\n".join(missing)
    assert not wrong, "\n".join(wrong)
    page = "\n".join(lines)
    if os.environ.get("WRITE_CONFORMANCE"):
        PAGE.write_text(page, "utf-8")
    assert PAGE.read_text("utf-8") == page, "what the server does with a parameter changed; see `make conformance`"


HEAD = """\
# What becomes of each parameter

`make conformance` writes this page: a test sends every parameter of these routes to a server and looks at what changes.

- **honoured**: the parameter changes what the model is asked, or what the client gets.
- **refused**: the parameter would change the output and is not supported. The server answers with a 400 that names it.
  Null, or a value that asks for nothing, is accepted.
- **no effect**: clients send the parameter, but the output does not depend on it, so the server accepts it. A hint that
  the server cannot follow is named in the reply's header `x-lmserve-ignored`, and once in the log.
- **ignored**: LMDeploy's routes ignore unknown keys, as LMDeploy's server did, except keys that look like sampling
  (`max_new_tokens`). All other routes refuse an unknown key and name the nearest one that is supported. Unknown keys
  inside messages, parts and tools are ignored.
- **checked**: the parameter can have one value, and the server refuses any other.
"""
SOCKET = """\
## Messages on the WebSocket of `/v1/responses`

Each parameter is what it is in a request, except:

| Parameter | | |
|---|---|---|
| `type` | checked | `response.create` |
| `generate` | honoured | false: nothing is computed, and the next message continues from this input. Null: true. |
| `stream` | no effect | The answer is always a stream of events. |
| `background` | refused | A response that nobody waits for is requested over HTTP. |
"""
