"""`lmserve serve --model NAME=MODEL` more than once, in a process, with real models."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from server_process import ServerProcess, serving


def resident(server: ServerProcess) -> int:
    """Bytes of the process in memory that are its own, and no file's."""
    status = Path(f"/proc/{server.process.pid}/status").read_text("utf-8")
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def wait_for(server: ServerProcess, text: str, times: int = 1) -> None:
    deadline = time.monotonic() + 60
    while server.output().count(text) < times:
        assert time.monotonic() < deadline, server.output()
        time.sleep(0.05)


def test_models_come_and_go_and_their_sessions_stay(smollm2_gguf: Path, tmp_path: Path) -> None:
    arguments = ["--model", f"one={smollm2_gguf}", "--model", f"two={smollm2_gguf}", "--idle-unload", "1"]
    with serving(tmp_path, *arguments) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert server.output().count("Model     ") == 2
        before = resident(server)
        turn = {"instance_id": 5, "prompt": "What is the capital of Japan?", "temperature": 0, "model": "two"}
        first = client.post("/generate", json=turn).json()
        assert "Tokyo" in first["text"]
        took = resident(server) - before
        assert took > 8 << 20
        wait_for(server, "the model two was unloaded")
        # What is left of it is less than half of what it took.
        assert resident(server) - before < took / 2
        again = turn | {"prompt": "How many people live there?", "sequence_start": False}
        second = client.post("/generate", json=again).json()
        assert second["usage"]["history_tokens"] > 20
        ask = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=ask).status_code == 200
        wait_for(server, "the model one was unloaded")
        assert "the model one was loaded in" in server.output()
    assert not list(tmp_path.glob("lmserve-sessions-*"))


def test_loading_again_and_again_takes_no_more_memory(smollm2_gguf: Path, tmp_path: Path) -> None:
    arguments = [str(smollm2_gguf), "--idle-unload", "1", "--kv-memory", "64MiB"]
    with serving(tmp_path, *arguments) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        taken = []
        for times in range(1, 6):
            assert client.post("/generate", json={"prompt": "Hi", "request_output_len": 2}).status_code == 200
            wait_for(server, "was unloaded", times)
            taken.append(resident(server))
        # A heap that each loading left behind would be a fifth of the weights.
        assert taken[-1] - taken[0] < smollm2_gguf.stat().st_size / 3, taken


def test_a_chat_model_beside_one_that_embeds_and_one_that_ranks(
    smollm2_gguf: Path, minilm_folder: Path, tmp_path: Path
) -> None:
    ranker = tmp_path / "ranker"
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=30522, num_labels=1, initializer_range=0.3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(ranker)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm_folder / name, ranker)
    models = {"chat": smollm2_gguf, "embed": minilm_folder, "rank": ranker}
    arguments = [part for name, path in models.items() for part in ("--model", f"{name}={path}")]
    texts = [f"text {index} about cats" * (1 + index % 5) for index in range(48)]
    requests: list[tuple[str, dict[str, Any]]] = [
        (
            "/v1/chat/completions",
            {"model": "chat", "temperature": 0, "max_tokens": 40, "messages": [{"role": "user", "content": "Hello"}]},
        ),
        ("/v1/embeddings", {"model": "embed", "input": texts}),
        ("/v1/rerank", {"model": "rank", "query": "cats", "documents": texts}),
    ]
    kept = {"/v1/chat/completions": "choices", "/v1/embeddings": "data", "/v1/rerank": "results"}
    with serving(tmp_path, *arguments) as server, httpx.Client(base_url=server.url, timeout=120) as client:

        def ask(request: tuple[str, dict[str, Any]]) -> Any:
            route, body = request
            response = client.post(route, json=body)
            assert response.status_code == 200, response.text
            return response.json()[kept[route]]

        alone = [ask(request) for request in requests]
        assert [len(alone[1]), len(alone[2])] == [48, 48]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, requests * 2)) == alone * 2
        response = client.post("/v1/embeddings", json={"model": "rank", "input": "x"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_models_without_names_are_refused() -> None:
    command = [sys.executable, "-m", "lmserve", "serve", "--model", "a=x", "--model", "y"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lmserve: error: --model: each of several models needs a name: --model NAME=y\n"
