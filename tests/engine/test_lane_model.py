"""Lanes over a tiny random model: the greedy text of a conversation that goes on is that of one computed anew."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from lmserve import _core
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import Messages, SamplingParams, StopParams, Submission
from lmserve.model import RunnerOptions, load_runner, open_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "http"))
from tiny_engine import EOS, byte_tokenizer, chat_template

TURNS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with random weights over bytes. It says plain text alone, so that its text has its tokens."""
    path = tmp_path_factory.mktemp("llama")
    shape = tiny_models.SHAPE | {"vocab_size": 258, "max_position_embeddings": 4096, "initializer_range": 0.3}
    transformers.set_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape))
    with torch.no_grad():
        said = torch.zeros(258, dtype=torch.bool)
        said[[*range(33, 127), EOS]] = True
        model.lm_head.weight[~said] = 0
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("ops", ["torch", "cpu"])
def test_greedy_text_is_the_same_with_and_without(folder, ops):
    options = RunnerOptions(ops=ops, max_batch=4, max_batch_tokens=64, kv_memory=16 << 20, dtype="fp32")
    runner = load_runner(open_checkpoint(folder), options)
    core = _core.Engine(runner, byte_tokenizer(), chat_template(), eos_token_ids=[EOS])

    async def main() -> list[list[tuple[str, int, int]]]:
        face = AsyncEngine(core, max_model_len=core.context_length)
        said = []
        for tenant, lane in ((1, "a lane"), (2, None)):
            messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
            turns = []
            for turn in range(TURNS):
                messages.append({"role": "user", "content": f"What is {turn}?"})
                request = Submission(
                    route="chat",
                    input=Messages(list(messages)),
                    lane=lane,
                    tenant=tenant,
                    sampling=SamplingParams(temperature=0),
                    stopping=StopParams(max_tokens=20 + turn),
                )
                reply = json.loads(await face.submit(request).body())
                text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
                turns.append((text, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]))
                messages.append({"role": "assistant", "content": text})
            said.append(turns)
        face.close()
        return said

    try:
        with_lane, without = asyncio.run(main())
    finally:
        core.shutdown(5)
    assert with_lane == without
    assert len({text for text, _, _ in with_lane}) == TURNS
    assert all(cached > 0 for _, _, cached in with_lane[1:])
