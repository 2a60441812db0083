"""Log-probabilities of prompts, over the real core and torch: those of the whole sequence computed at once."""

from __future__ import annotations

import asyncio
import json

import pytest
import tiny_models
import torch
from lmserve import _core
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import SamplingParams, StopParams, Submission, Tokens
from lmserve.model import RunnerOptions, load_runner, open_checkpoint

VOCAB = tiny_models.SHAPE["vocab_size"]
LENGTHS = [1, 2, 7, 60, 61]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder, and its transformers model."""
    folder = tmp_path_factory.mktemp("llama")
    return folder, tiny_models.make("llama", folder)


def replies(folder, tokenizer, requests, ops):
    options = RunnerOptions(ops=ops, max_batch=4, max_batch_tokens=64, kv_memory=1 << 20, dtype="fp32")
    core = _core.Engine(load_runner(open_checkpoint(folder), options), tokenizer, None, eos_token_ids=[])

    async def main():
        face = AsyncEngine(core, max_model_len=core.context_length)
        bodies = await asyncio.gather(*(face.submit(request).body() for request in requests))
        face.close()
        return [json.loads(body) for body in bodies]

    try:
        return asyncio.run(main())
    finally:
        core.shutdown(5)


# The core's own kernels keep a cache of half the width.
@pytest.mark.parametrize(("ops", "accuracy"), [("torch", 1e-4), ("cpu", 0.02)])
def test_they_are_those_of_the_whole_sequence(model, smollm2_gguf, ops, accuracy):
    folder, reference = model
    torch.manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in LENGTHS]
    requests = [
        Submission(
            route="completions",
            input=Tokens(prompt),
            echo=True,
            prompt_logprobs=3,
            sampling=SamplingParams(temperature=0, logprobs=2, repetition_penalty=1.5),
            stopping=StopParams(max_tokens=max_tokens),
        )
        for prompt in prompts
        for max_tokens in (0, 3)
    ]
    for request, reply in zip(
        requests, replies(folder, open_checkpoint(smollm2_gguf).tokenizer(), requests, ops), strict=True
    ):
        prompt = request.input.ids
        with torch.inference_mode():
            logprobs = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
        own = [logprobs[at, token].item() for at, token in enumerate(prompt[1:])]
        (choice,) = reply["choices"]
        first, *echoed = choice["logprobs"]["token_logprobs"][: len(prompt)]
        assert first is None
        assert echoed == pytest.approx(own, abs=accuracy)
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompt) + request.stopping.max_tokens
        assert choice["prompt_logprobs"][0] is None
        for at, position in enumerate(choice["prompt_logprobs"][1:]):
            assert position[str(prompt[at + 1])]["logprob"] == pytest.approx(own[at], abs=accuracy)
            values, ids = logprobs[at].topk(3)
            ranked = {value["rank"]: (int(token), value["logprob"]) for token, value in position.items()}
            if ops == "torch":
                assert [ranked[rank][0] for rank in (1, 2, 3)] == ids.tolist()
            assert [ranked[rank][1] for rank in (1, 2, 3)] == pytest.approx(values.tolist(), abs=accuracy)
