"""Tiny models of transformers whose tokens are bytes, served by the real engine: for conversations that are counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import transformers
from conftest import serve_core
from lmserve.config import ServeConfig
from lmserve.engine.load import ModelPlan
from tiny_engine import TEMPLATE, byte_tokenizer_json

SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
}


def lfm2() -> Any:
    """A hybrid: one layer attends."""
    kinds = ["conv", "full_attention", "conv", "conv"]
    return transformers.Lfm2Config(**SHAPE, num_hidden_layers=4, layer_types=kinds, block_auto_adjust_ff_dim=False)


def save(config: Any, path: Path) -> Path:
    """Write the model with random weights, the same each time, and return its folder."""
    transformers.set_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    (path / "tokenizer.json").write_bytes(byte_tokenizer_json())
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


def serve(plan: ModelPlan) -> Iterator[httpx.Client]:
    """A client of a server of the model, while it runs."""
    engine = plan.load_engine()
    try:
        with serve_core(engine, plan.text) as running, httpx.Client(base_url=running.url, timeout=60) as client:
            yield client
    finally:
        engine.shutdown(0)


def planned(folder: Path, **settings: Any) -> ModelPlan:
    """The plan of the model: four sequences at a time and exact weights, unless the settings say otherwise."""
    return ModelPlan(folder, ServeConfig(**{"max_batch": 4, "quantize": "none"} | settings))


def turn(web: httpx.Client, session: int, text: str, **changes: Any) -> dict[str, Any]:
    """The reply to a turn of 20 greedy tokens."""
    body = {
        "prompt": text,
        "instance_id": session,
        "sequence_start": False,
        "sequence_end": False,
        "request_output_len": 20,
        "temperature": 0,
        "ignore_eos": True,
        "stream_response": False,
    }
    reply = web.post("/generate", json=body | changes)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())
