"""A tiny model with SmolLM2's tokenizer, and requests that use a runner in every way."""

from __future__ import annotations

import asyncio
import json

import transformers
from lmserve import _core
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import Choice, SamplingParams, StopParams, Submission, Text
from lmserve.model import RunnerOptions

OPTIONS = RunnerOptions(device="cpu", max_batch=4, max_batch_tokens=32, kv_memory=1 << 20, max_model_len=256)


def make_model(folder, seed: int) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=49152, max_position_embeddings=512, initializer_range=0.3, **shape)
    transformers.set_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def asked() -> list[Submission]:
    """Prompts that take several steps, sampled in every way: greedily, at random, with penalties, biases, grammars."""
    ways = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.9, seed=1, logprobs=3),
        SamplingParams(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5, seed=2),
        SamplingParams(temperature=1.0, logit_bias=[(11, 5.0)], seed=3),
    ]
    stopping = StopParams(max_tokens=20, ignore_eos=True)
    plain = [
        Submission(route="generate", input=Text(text), sampling=way, stopping=stopping)
        for way in ways
        for text in ("Go", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3)
    ]
    guided = [
        Submission(route="generate", input=Text("Say"), guide=Choice(["yes", "no"]), sampling=ways[1]) for _ in range(3)
    ]
    return plain + guided


def answers(runner, tokenizer) -> list[str]:
    core = _core.Engine(runner, tokenizer, None, eos_token_ids=[2])

    async def ask():
        face = AsyncEngine(core, max_model_len=core.context_length)
        bodies = await asyncio.gather(*[face.submit(each).body() for each in asked()])
        face.close()
        return [json.loads(body)["text"] for body in bodies]

    try:
        return asyncio.run(ask())
    finally:
        core.shutdown(5)
