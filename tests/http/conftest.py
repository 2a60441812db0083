"""Servers over a scripted core and over the real one."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from lmserve import _core
from lmserve.engine.text import TextLayer
from scripted_core import MAX_MODEL_LEN, ScriptedCore
from server_thread import (
    ALIAS,
    BODY_TIMEOUT,
    MAX_BODY,
    MODEL,
    NAMES,
    SLASHED,
    Running,
    ServerThread,
    serve_core,
)
from tiny_engine import TEMPLATE, byte_tokenizer, formula_engine

__all__ = [
    "ALIAS",
    "BODY_TIMEOUT",
    "MAX_BODY",
    "MAX_MODEL_LEN",
    "MODEL",
    "NAMES",
    "SLASHED",
    "Running",
    "ServerThread",
    "serve_core",
]


@pytest.fixture(scope="session")
def scripted() -> Iterator[Running]:
    """A server whose requests script what happens."""
    with serve_core(ScriptedCore()) as running:
        yield running


@pytest.fixture(scope="session")
def real() -> Iterator[Running]:
    """A server over the real core, with a formula for a model; a step takes at least a millisecond."""
    text = TextLayer(byte_tokenizer(), _core.ChatTemplate(TEMPLATE, b"{}"))
    with serve_core(formula_engine(pause=0.001), text) as running:
        yield running


@pytest.fixture(scope="session", params=["scripted", "real"])
def served(request: pytest.FixtureRequest) -> Running:
    """Each server that must hold the contract."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def url(served: Running) -> str:
    return served.url


@pytest.fixture
def client(served: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture
def scripted_client(scripted: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=scripted.url, timeout=60) as client:
        yield client
