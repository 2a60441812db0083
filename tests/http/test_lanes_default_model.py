"""Conversations of agents over the default model: lanes leave the greedy text as it is, and spare what was computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import serving
from test_lanes import AGENTS, Agent, before

MODEL = "SmolLM2-135M-Instruct"
SETTINGS = ["--max-model-len", "4096", "--kv-memory", "256MiB"]
SAID = ["Name three rivers in Europe.", "Which of them is the longest?", "Thank you. Write a line about it."]
LENGTHS = [40, 24, 60]  # of the answers, at most


@pytest.fixture(scope="module")
def clients(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[httpx.Client]]:
    """Of a server with lanes, and of one without."""
    assert smollm2_gguf.is_file()
    with ExitStack() as stack:
        found = []
        for lanes in ("on", "off"):
            folder = tmp_path_factory.mktemp(f"lanes-{lanes}")
            server = stack.enter_context(serving(folder, *SETTINGS, "--agent-sessions", lanes))
            found.append(stack.enter_context(httpx.Client(base_url=server.url, timeout=120)))
        yield found


def talk(client: httpx.Client, agent: Agent) -> list[dict[str, Any]]:
    replies = []
    for text, length in zip(SAID, LENGTHS, strict=True):
        # Of each other words, so that none finds what another one said in the cache.
        agent.say(f"{text} I ask by {type(agent).__name__}.")
        limit = "max_output_tokens" if agent.route == "/v1/responses" else "max_tokens"
        body = agent.body(stream=True) | {"model": MODEL, limit: length, "temperature": 0}
        reply = client.post(agent.route, json=body, headers=agent.headers)
        assert reply.status_code == 200, reply.text
        replies.append(agent.hear(reply, stream=True))
    return replies


@pytest.mark.parametrize("kind", AGENTS)
def test_an_agents_greedy_text_is_the_same_with_and_without(kind: type[Agent], clients: list[httpx.Client]) -> None:
    with_lanes, without = (talk(client, kind()) for client in clients)
    told = ("text", "calls", "said", "prompt")
    for one, other in zip(with_lanes, without, strict=True):
        # Ids of calls are drawn.
        one["calls"], other["calls"] = len(one["calls"]), len(other["calls"])
        assert {name: one[name] for name in told} == {name: other[name] for name in told}
    assert all(reply["text"].strip() or reply["calls"] for reply in with_lanes)
    for earlier, later in pairwise(with_lanes):
        assert later["cached"] == before(earlier)
