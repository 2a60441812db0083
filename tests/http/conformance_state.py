"""What becomes of the parameters of the routes that keep something, and of a message on the WebSocket.

Beside the words of `test_conformance`: a parameter that can have one value, and is refused with any other, is checked.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

import httpx
from lmserve.api.convert.session_state import checksum
from lmserve.engine.sessions import SessionState, StateTurn
from websockets.sync.client import connect

CHAT = "/v1/chat/completions"
CONVERSATIONS, FILES, BATCHES = "/v1/conversations", "/v1/files", "/v1/batches"
ENDS = ("response.completed", "response.incomplete", "response.failed", "error")

Body = dict[str, Any]
Outcome = tuple[int, Any]


def user(text: str) -> Body:
    return {"role": "user", "content": text}


def upload(client: httpx.Client, fields: Body) -> httpx.Response:
    data = {"purpose": fields["purpose"]} if "purpose" in fields else {}
    return client.post(FILES, files={"file": ("in.jsonl", fields["file"].encode())}, data=data)


def lines(count: int) -> str:
    body = {"messages": "Hello", "max_tokens": 2}
    each = [{"custom_id": str(at), "method": "POST", "url": CHAT, "body": body} for at in range(count)]
    return "\n".join(map(json.dumps, each))


def kept(client: httpx.Client, reply: httpx.Response, conversation: str) -> Outcome:
    """What a conversation is after a request."""
    items = client.get(f"{CONVERSATIONS}/{conversation}/items").json()["data"]
    metadata = client.get(f"{CONVERSATIONS}/{conversation}").json()["metadata"]
    return reply.status_code, (metadata, [item["content"] for item in items])


def create_conversation(client: httpx.Client, body: Body) -> Outcome:
    reply = client.post(CONVERSATIONS, json=body)
    return kept(client, reply, reply.json()["id"]) if reply.is_success else (reply.status_code, None)


def update_conversation(client: httpx.Client, body: Body) -> Outcome:
    conversation = client.post(CONVERSATIONS, json={}).json()["id"]
    return kept(client, client.post(f"{CONVERSATIONS}/{conversation}", json=body), conversation)


def add_items(client: httpx.Client, body: Body) -> Outcome:
    conversation = client.post(CONVERSATIONS, json={}).json()["id"]
    return kept(client, client.post(f"{CONVERSATIONS}/{conversation}/items", json=body), conversation)


def upload_file(client: httpx.Client, body: Body) -> Outcome:
    reply = upload(client, body)
    return reply.status_code, reply.json().get("bytes")


def create_batch(client: httpx.Client, body: Body) -> Outcome:
    """`input_file_id`: how many lines the file has."""
    file_id = upload(client, {"file": lines(body["input_file_id"]), "purpose": "batch"}).json()["id"]
    reply = client.post(BATCHES, json=body | {"input_file_id": file_id})
    found = reply.json()
    return reply.status_code, [found.get(name) for name in ("endpoint", "status", "metadata", "request_counts")]


def import_session(client: httpx.Client, body: Body) -> Outcome:
    """`body`: what is other than in an export, whose checksum is made to fit."""
    client.delete("/v1/sessions/7")
    client.delete("/v1/sessions/8")
    turn = {"prompt": "Hi", "max_tokens": 2, "seed": 5, "create": True}
    client.post("/v1/sessions/7/turns", json=turn).raise_for_status()
    data = client.get("/v1/sessions/7/export").json() | {"id": 8} | body
    if "checksum" not in body:
        turns = [StateTurn(each["input_tokens"], each["output_tokens"], each["open"], None) for each in data["turns"]]
        state = SessionState(b64decode(data["tokens"]), turns, int(data["seed"]), data["system_tokens"])
        data["checksum"] = checksum(state, data["fingerprint"])
    reply = client.post("/v1/sessions/import", json=data)
    found = client.get(f"/v1/sessions/{data['id']}/export").json() | {"created": 0, "checksum": ""}
    return reply.status_code, found


def other_turns(client: httpx.Client) -> Body:
    """The one turn of such a session, with its tokens shared out otherwise."""
    client.delete("/v1/sessions/7")
    client.post("/v1/sessions/7/turns", json={"prompt": "Hi", "max_tokens": 2, "seed": 5, "create": True})
    (turn,) = client.get("/v1/sessions/7/export").json()["turns"]
    counts = {"input_tokens": turn["input_tokens"] + 1, "output_tokens": turn["output_tokens"] - 1}
    return {"turns": [turn | counts | {"logprobs": None}]}


def other_tokens(client: httpx.Client) -> Body:
    tokens = b64decode(client.get("/v1/sessions/7/export").json()["tokens"])
    return {"tokens": b64encode(tokens[4:] + tokens[:4]).decode()}


# Each route with what sends a request, one that works, and another value for each parameter. Without a value: that
# which a function makes.
STATE_ROUTES: dict[str, tuple[Callable[[httpx.Client, Body], Outcome], Body, dict[str, Any]]] = {
    CONVERSATIONS: (create_conversation, {}, {"items": [user("One")], "metadata": {"a": "b"}}),
    f"{CONVERSATIONS}/{{conversation_id}}": (update_conversation, {"metadata": {}}, {"metadata": {"a": "b"}}),
    f"{CONVERSATIONS}/{{conversation_id}}/items": (add_items, {"items": [user("One")]}, {"items": [user("Two")]}),
    FILES: (upload_file, {"file": lines(1), "purpose": "batch"}, {"file": lines(2), "purpose": "vision"}),
    BATCHES: (
        create_batch,
        {"input_file_id": 1, "endpoint": CHAT, "completion_window": "24h"},
        {
            "input_file_id": 2,
            "endpoint": "/v1/completions",
            "completion_window": "1h",
            "metadata": {"a": "b"},
            "output_expires_after": {"anchor": "created_at", "seconds": 3600},
        },
    ),
    "/v1/sessions/import": (
        import_session,
        {},
        {
            "id": 9,
            "object": "session",
            "version": 2,
            "model": "another",
            "fingerprint": "0" * 64,
            "created": 1,
            "seed": "6",
            "system_tokens": 1,
            "turns": other_turns,
            "tokens": other_tokens,
            "checksum": "0" * 64,
        },
    ),
}
# Those that have one value.
CHECKED = ("purpose", "completion_window", "object", "version", "fingerprint", "checksum")


def properties(document: Body, route: str) -> Body:
    content = document["paths"][route]["post"]["requestBody"]["content"]
    (described,) = content.values()
    schema = described["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    found: Body = schema["properties"]
    return found


def state_lines(client: httpx.Client, document: Body) -> list[str]:
    """The part of the page about these routes."""
    page: list[str] = []
    for route, (send, working, others) in STATE_ROUTES.items():
        page += [f"## `POST {route}`", "", "| Parameter | | |", "|---|---|---|"]
        described = properties(document, route)
        assert described.keys() == others.keys(), route
        status, without = send(client, working)
        assert status == 200, (route, without)
        for name, schema in described.items():
            value = others[name]
            other = value(client) if callable(value) else {name: value}
            status, outcome = send(client, working | other)
            assert status in (200, 400), (route, name, outcome)
            found = "honoured" if outcome != without else "no effect"
            if status == 400:
                found = "checked" if name in CHECKED else "refused"
            page.append(f"| `{name}` | {found} | {schema.get('description', '')} |")
        page.append("")
    return page


def over_socket(url: str, message: Body) -> int:
    """The status of a request that is sent as a message, once it is answered."""
    with connect(url.replace("http://", "ws://") + "/v1/responses") as socket:
        socket.send(json.dumps(message))
        while True:
            event = json.loads(socket.recv(timeout=30))
            if event["type"] in ENDS:
                return int(event.get("status", 200))
