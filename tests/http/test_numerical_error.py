"""A model whose logits are not finite for some texts: what each route's client is told, and that neighbours go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import MODEL, Running, serve_core
from lmserve import _core
from lmserve.engine.text import TextLayer
from lmserve.model.interface import I32, NO_TOKEN
from numpy.typing import NDArray
from test_neighbours import neighbour
from tiny_engine import EOS, FormulaRunner, byte_tokenizer, chat_template

from wire import error_of

CURSED = ord("~")
TEXT = "a~"
SAID: Any = [{"role": "user", "content": TEXT}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "max_tokens": 30, "prompt": TEXT, "ignore_eos": True},
    "/v1/chat/completions": {"model": MODEL, "max_tokens": 30, "messages": SAID},
    "/v1/responses": {"model": MODEL, "max_output_tokens": 30, "input": TEXT},
    "/v1/messages": {"model": MODEL, "max_tokens": 30, "messages": SAID},
    "/v1/chat/interactive": {"prompt": TEXT, "request_output_len": 30},
    "/generate": {"prompt": TEXT, "request_output_len": 30},
}


class CursedRunner(FormulaRunner):
    """Has no finite logits, and no finite embedding, for a sequence in which a certain token stands."""

    def __init__(self) -> None:
        super().__init__(pause=0.001)
        self._memory = np.zeros(self.info.num_blocks * self.info.block_size, np.int32)

    def next_tokens(self, n_tokens: int, n_seqs: int, n_rows: int) -> I32:
        b, size = self.buffers, self.info.block_size
        self._memory[b.slots[:n_tokens]] = b.token_ids[:n_tokens]
        sampled = super().next_tokens(n_tokens, n_seqs, n_rows)
        # What it says itself is no curse.
        sampled[sampled == CURSED] = ord("x")
        sequences = np.searchsorted(b.query_start[1 : n_seqs + 1], b.sample_rows[:n_rows], side="right")
        for row, sequence in enumerate(sequences):
            slots = (b.block_tables[sequence, :, None] * size + np.arange(size)).ravel()[: b.context_lens[sequence]]
            if CURSED in self._memory[slots]:
                sampled[row] = NO_TOKEN
        return sampled

    def embed(self, token_ids: I32, cu_seqlens: I32) -> NDArray[np.float32]:
        rows = super().embed(token_ids, cu_seqlens)
        for at, first in enumerate(cu_seqlens[:-1]):
            if CURSED in token_ids[first : cu_seqlens[at + 1]]:
                rows[at, 3] = np.nan
        return rows


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    core = _core.Engine(CursedRunner(), byte_tokenizer(), chat_template(), eos_token_ids=[EOS])
    with serve_core(core, TextLayer(byte_tokenizer(), chat_template())) as running:
        yield running


def test_every_route_says_numerical_error_and_neighbours_go_on(server: Running) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            alone = await neighbour(client, asyncio.Event())
            started = asyncio.Event()
            beside = asyncio.create_task(neighbour(client, started))
            await started.wait()
            for path, body in REQUESTS.items():
                whole = await client.post(path, json=body)
                if path == "/v1/messages":
                    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "api_error"), whole.text
                else:
                    error_of(whole, 500, "numerical_error")
                streamed = await client.post(path, json=body | {"stream": True})
                assert "not finite" in streamed.text, (path, streamed.text)
            assert await beside == alone

    asyncio.run(run())
    stats = server.core.stats()
    assert (stats["failed_steps"], stats["owned_blocks"]) == (0, 0)


def test_an_embedding_names_the_text_and_has_no_nulls(server: Running) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"model": MODEL, "input": ["fine", "fine too", "not ~ fine", "fine again"]}
        error = error_of(client.post("/v1/embeddings", json=body), 500, "numerical_error")
        assert "input 2 " in error["message"]
        assert len(client.post("/v1/embeddings", json=body | {"input": body["input"][:2]}).json()["data"]) == 2
