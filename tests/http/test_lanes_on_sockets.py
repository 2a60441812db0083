"""Lanes of conversations that go on by previous_response_id: a client that comes back with all of it loses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import httpx
import pytest
from test_lanes import ANSWERS, THINKING, THOUGHTS, AnsweringRunner, Codex, before, server
from websockets.sync.client import ClientConnection, connect

ENDS = ("response.completed", "response.incomplete", "response.failed", "error")


class CodexOnSocket(Codex):
    """Codex over a WebSocket: the first request of a connection has all items, and each later one what is new."""

    def __init__(self, *, store: bool = False) -> None:
        super().__init__()
        self._store = store
        self._sent = 0
        self._last: str | None = None

    @contextmanager
    def connected(self, url: str) -> Iterator[ClientConnection]:
        self._sent, self._last = 0, None
        address = url.replace("http://", "ws://") + self.route
        with connect(address, max_size=None, additional_headers=self.headers) as socket:
            yield socket

    def new_items(self) -> dict[str, Any]:
        body = self.body(stream=True) | {"store": self._store, "input": self.items[self._sent :]}
        return body if self._last is None else body | {"previous_response_id": self._last}

    def heard(self, response: dict[str, Any]) -> dict[str, Any]:
        """Takes the answer into the conversation, and calls what it calls."""
        assert response["status"] == "completed", response
        sent = len(self.items) + len(response["output"])
        reply = self.hear(httpx.Response(200, json=response), stream=False)
        self._sent, self._last = sent, response["id"]
        return reply

    def ask(self, socket: ClientConnection) -> dict[str, Any]:
        socket.send(json.dumps({"type": "response.create"} | self.new_items()))
        while (event := json.loads(socket.recv(timeout=30)))["type"] not in ENDS:
            pass
        return self.heard(event["response"])

    def ask_by_http(self, client: httpx.Client) -> dict[str, Any]:
        reply = client.post(self.route, json=self.new_items() | {"stream": False}, headers=self.headers)
        assert reply.status_code == 200, reply.text
        return self.heard(reply.json())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # The template shows no thoughts of earlier answers, so that only a lane has them.
    with server(AnsweringRunner([THOUGHTS + answer for answer in (*ANSWERS, "And five more.")]), THINKING) as url:
        yield url


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("store", [True, False])
def test_a_new_connection_goes_on_with_all_that_was_said_on_the_last_one(url: str, named: bool, store: bool) -> None:
    agent = CodexOnSocket(store=store)
    # Each by a name, and with words, of its own.
    agent.headers["session-id"] = f"{named} {store}"
    agent.say(f"What is in a.txt? {named} {store}")
    with agent.connected(url) as socket:
        first = agent.ask(socket)
        second = agent.ask(socket)
    assert second["cached"] == before(first)
    agent.say("Thank you.")
    if not named:
        agent.headers["session-id"] = "another name"
    with agent.connected(url) as socket:
        third = agent.ask(socket)
        agent.say("Once more.")
        fourth = agent.ask(socket)
    # Without its lane, the thoughts of its answers are gone, and all behind them is computed again.
    assert (third["cached"] == before(second)) == named
    assert fourth["cached"] == before(third)
    assert [reply["text"].strip() for reply in (second, third, fourth)] == [*ANSWERS[1:], "And five more."]


def test_a_lane_goes_on_whichever_way_its_client_asks(url: str) -> None:
    agent = CodexOnSocket(store=True)
    agent.headers["session-id"] = "all ways"
    agent.say("What is in a.txt, by all ways?")
    with httpx.Client(base_url=url) as client:
        replies = [agent.ask_by_http(client), agent.ask_by_http(client)]
        agent.say("Thank you.")
        with agent.connected(url) as socket:
            replies.append(agent.ask(socket))
        agent.say("Once more.")
        # All of it again, by HTTP.
        agent._sent, agent._last = 0, None
        replies.append(agent.ask_by_http(client))
    for earlier, later in pairwise(replies):
        assert later["cached"] == before(earlier)


def test_a_branch_of_a_response_harms_no_other(url: str) -> None:
    """Two continuations of one response are two branches of its lane."""
    trunk = CodexOnSocket(store=True)
    trunk.headers["session-id"] = "branches"
    trunk.say("What is in a.txt, twice?")
    with httpx.Client(base_url=url) as client:
        trunk.ask_by_http(client)
        second = trunk.ask_by_http(client)
        branches = []
        for words in ("left", "right"):
            branch = CodexOnSocket(store=True)
            branch.headers, branch.items = trunk.headers, list(trunk.items)
            branch._sent, branch._last = trunk._sent, trunk._last
            branch.say(words)
            reply = branch.ask_by_http(client)
            assert reply["cached"] == before(second)
            branches.append((branch, reply))
        for branch, reply in branches:
            branch.say("Go on.")
            with branch.connected(url) as socket:
                assert branch.ask(socket)["cached"] == before(reply)
