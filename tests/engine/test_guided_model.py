"""Structured output of a random model over the default vocabulary: model loop, sampler and masks together."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import jsonschema
import pytest
import thorough
import transformers
from lmserve import _core
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import (
    AutoTools,
    Choice,
    JsonSchema,
    Lark,
    Messages,
    SamplingParams,
    StopParams,
    Submission,
    Text,
)
from lmserve.errors import LmserveError
from lmserve.model import RunnerOptions, load_runner, open_checkpoint

sys.path.append(str(Path(__file__).parents[1]))
from random_schemas import SchemaMaker

EOS = 2


@pytest.fixture(scope="module", params=["cpu", "torch"])
def core(request, smollm2_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=49152, max_position_embeddings=512, initializer_range=0.3, **shape)
    transformers.set_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    runner = load_runner(open_checkpoint(folder), RunnerOptions(ops=request.param, max_batch=64, kv_memory=16 << 20))
    engine = _core.Engine(runner, open_checkpoint(smollm2_gguf).tokenizer(), None, eos_token_ids=[EOS])
    yield engine
    engine.shutdown(5)


def submission(guide, seed: int, max_tokens: int = 300) -> Submission:
    sampling = SamplingParams(seed=seed, temperature=1.0 if seed % 4 else 0.0, top_p=0.95 if seed % 3 else 1.0)
    stopping = StopParams(max_tokens=max_tokens)
    return Submission(route="generate", input=Text("Go"), guide=guide, sampling=sampling, stopping=stopping)


def answers(core, requests):
    async def main():
        face = AsyncEngine(core, max_model_len=core.context_length)
        bodies = await asyncio.gather(*[face.submit(r).body() for r in requests], return_exceptions=True)
        face.close()
        return [json.loads(body) if isinstance(body, bytes) else body for body in bodies]

    return asyncio.run(main())


def test_random_schemas(core):
    maker = SchemaMaker(11)
    schemas = [maker.make() for _ in range(thorough.of(120, 500))]
    requests = [submission(JsonSchema(schema, strict=True), seed) for seed, schema in enumerate(schemas)]
    cut = 0
    for schema, answer in zip(schemas, answers(core, requests), strict=True):
        assert answer["finish_reason"] in ("stop", "length")
        if answer["finish_reason"] == "length":
            cut += 1
            continue
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer["text"]))
    assert cut <= len(schemas) / 20


def test_a_grammar_changes_no_neighbours_tokens(core):
    plain = [submission(None, seed, 40) for seed in range(8)]
    alone = [answer["text"] for answer in answers(core, plain)]
    guided = [submission(Choice(["yes", "no"]), seed) for seed in range(20)]
    bad = [submission(Lark("start: NOWHERE"), seed) for seed in range(20)]
    crowd = answers(core, [*plain, *guided, *bad])
    assert [answer["text"] for answer in crowd[:8]] == alone
    assert {answer["text"] for answer in crowd[8:28]} <= {"yes", "no"}
    assert all(isinstance(error, LmserveError) and error.status == 400 for error in crowd[28:])


def test_calls_among_words_are_of_a_strict_function(smollm2_gguf, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=49152, max_position_embeddings=512, **shape)
    transformers.set_seed(7)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer = open_checkpoint(smollm2_gguf).tokenizer()
    template = _core.ChatTemplate("{{ messages[0].content }}", b"{}", tool_parser="hermes")
    runner = load_runner(open_checkpoint(tmp_path), RunnerOptions(max_batch=64, kv_memory=16 << 20))
    engine = _core.Engine(runner, tokenizer, template, eos_token_ids=[EOS])
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 3}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters, "strict": True}}
    # A model that says nothing but pieces of the mark says it now and then.
    mark = [(token, 30.0) for token in tokenizer.encode("<tool_call>")]
    requests = [
        Submission(
            route="chat",
            input=Messages([{"role": "user", "content": "Go"}], tools=[tool]),
            tool_choice=AutoTools(),
            sampling=SamplingParams(seed=seed, temperature=1.0, logit_bias=mark),
            stopping=StopParams(max_tokens=360, ignore_eos=True),
        )
        for seed in range(64)
    ]
    found = answers(engine, requests)
    choices = [answer["choices"][0] for answer in found]
    engine.shutdown(5)
    assert not any("<tool_call>" in (choice["message"]["content"] or "") for choice in choices)
    calls = [call["function"] for choice in choices for call in choice["message"].get("tool_calls", [])]
    # The longest answer allowed may end within a call.
    whole = [call for call in calls if call["arguments"].endswith("}")]
    assert whole
    for call in whole:
        assert call["name"] == "get_weather"
        jsonschema.validate(json.loads(call["arguments"]), parameters)
