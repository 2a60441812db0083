"""The log-probabilities that a session remembers are those of any other computation of the same tokens, bit for bit."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import transformers
from lmserve import _core
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import Messages, SamplingParams, SessionRef, StopParams, Submission, Tokens
from lmserve.model import RunnerOptions, load_runner, open_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "http"))
from tiny_engine import EOS, byte_tokenizer, chat_template

TURNS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    shape = tiny_models.SHAPE | {"vocab_size": 258, "max_position_embeddings": 2048, "initializer_range": 0.3}
    transformers.set_seed(11)
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape)).save_pretrained(path)
    return path


def engine(folder, **options) -> _core.Engine:
    options = {"ops": "cpu", "max_batch": 8, "max_batch_tokens": 64, "kv_memory": 16 << 20} | options
    runner = load_runner(open_checkpoint(folder), RunnerOptions(**options))
    return _core.Engine(runner, byte_tokenizer(), chat_template(), eos_token_ids=[EOS])


def asked(session: int, turn: int) -> Submission:
    """A sampled turn. Sessions have one seed, so that each says the same whatever runs beside it."""
    return Submission(
        route="chat",
        input=Messages([{"role": "user", "content": f"What is {turn}?"}]),
        session=SessionRef(id=session, create=True),
        sampling=SamplingParams(temperature=0.9, top_p=0.95, seed=5, logprobs=0),
        stopping=StopParams(max_tokens=30),
    )


def rescored(ids: list[int]) -> Submission:
    """A prompt of the same tokens, which is computed anew: another key finds no cache."""
    return Submission(
        route="completions",
        input=Tokens(ids),
        prompt_logprobs=0,
        tenant=9,
        stopping=StopParams(max_tokens=1),
    )


def ledger(core: _core.Engine, session: int) -> tuple[list[int], dict[int, bytes]]:
    """All token ids, and the log-probabilities of the sampled ones by their places."""
    tokens, turns, *_ = core.export_session(0, session)
    scores, at = {}, 0
    for input_tokens, output_tokens, _, logprobs in turns:
        assert len(logprobs) == 4 * output_tokens > 0
        at += input_tokens
        for each in np.frombuffer(logprobs, "<f4"):
            scores[at] = each.tobytes()
            at += 1
    return np.frombuffer(tokens, "<u4").tolist(), scores


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 512}, {"max_batch_tokens": 24}])
@pytest.mark.parametrize(("quantize", "kv_dtype"), [("none", "fp32"), ("q8", "fp16"), ("q4", "int8")])
def test_a_ledger_is_what_a_rescoring_gives(folder, options, quantize, kv_dtype):
    async def talk(core, sessions):
        face = AsyncEngine(core, max_model_len=core.context_length)
        for turn in range(TURNS):
            await asyncio.gather(*(face.submit(asked(session, turn)).body() for session in sessions))
        face.close()

    async def score(core, ids):
        face = AsyncEngine(core, max_model_len=core.context_length)
        reply = json.loads(await face.submit(rescored(ids)).body())
        face.close()
        return reply["choices"][0]["prompt_logprobs"]

    common = {"quantize": quantize, "kv_dtype": kv_dtype}
    alone, crowded = engine(folder, **common), engine(folder, **common | options)
    try:
        asyncio.run(talk(alone, [1]))
        asyncio.run(talk(crowded, range(1, 8)))
        ids, scores = ledger(alone, 1)
        assert len(scores) > 2 * TURNS
        for session in range(1, 8):
            assert ledger(crowded, session) == (ids, scores)
        for core in (alone, crowded):
            prompt = asyncio.run(score(core, ids))
            for at, bits in scores.items():
                assert np.float32(prompt[at][str(ids[at])]["logprob"]).tobytes() == bits, at
    finally:
        alone.shutdown(5)
        crowded.shutdown(5)
