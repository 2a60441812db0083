"""The core's own decoder: its formats, its plan, and that a request's logits depend on nothing beside it."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
from lmserve.errors import LmserveError
from lmserve.model import OptionError, RunnerOptions, load_runner, open_checkpoint, plan_memory
from model_driver import Driver, assert_alone_as_in_a_batch, greedy

OPTIONS = RunnerOptions(device="cpu", ops="cpu", max_batch=16, max_batch_tokens=256, kv_memory=4 << 20, threads=2)
PROMPT = np.random.default_rng(5).integers(0, 199, 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.make(next(iter(tiny_models.CONFIGS)), folder)
    return open_checkpoint(folder)


def first_logits(runner) -> np.ndarray:
    greedy(runner)
    driver = Driver(runner)
    sequence = driver.start(PROMPT)
    driver.generate([sequence], 1)
    return sequence.logits[0]


@pytest.mark.parametrize(
    ("quantize", "kv_dtype"), list(itertools.product(["auto", "none", "q8", "q4"], ["fp32", "fp16", "int8"]))
)
def test_every_format_takes_what_was_planned_and_is_near_the_exact_one(checkpoint, quantize, kv_dtype):
    options = dataclasses.replace(OPTIONS, quantize=quantize, kv_dtype=kv_dtype)
    plan = plan_memory(checkpoint, options)
    runner = load_runner(checkpoint, options)
    assert runner.info.weight_bytes == plan.weight_bytes
    assert runner.info.kv_bytes_per_token == plan.kv_bytes_per_token
    exact = first_logits(load_runner(checkpoint, dataclasses.replace(OPTIONS, quantize="none", kv_dtype="fp32")))
    found = first_logits(runner)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    weights = {"auto": 1e-6, "none": 1e-6, "q8": 0.08, "q4": 0.5}[quantize]
    cache = {"fp32": 0, "fp16": 0.002, "int8": 0.03}[kv_dtype]
    assert error < weights + cache


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx2-vnni", "avx512", "neon-dotprod"])
def test_every_instruction_set_of_this_processor_gives_the_same_logits_within_rounding(checkpoint, monkeypatch, isa):
    options = dataclasses.replace(OPTIONS, quantize="q8")
    expected = first_logits(load_runner(checkpoint, options))
    monkeypatch.setenv("LMSERVE_CPU_ISA", isa)
    try:
        runner = load_runner(checkpoint, options)
    except LmserveError as error:
        if f"but {isa} was given" not in str(error):
            raise
        pytest.skip(str(error))
    np.testing.assert_allclose(first_logits(runner), expected, atol=2e-5)


def test_a_request_has_the_same_logits_alone_and_in_a_batch_to_the_bit(checkpoint):
    for quantize, kv_dtype in (("auto", "fp16"), ("q8", "fp16"), ("q4", "int8")):
        runner = load_runner(checkpoint, dataclasses.replace(OPTIONS, quantize=quantize, kv_dtype=kv_dtype))
        greedy(runner)
        generator = np.random.default_rng(3)
        prompts = [generator.integers(0, 199, length) for length in (1, 5, 17, 30, 2, 64)]
        together = Driver(runner)
        sequences = [together.start(prompt) for prompt in prompts]
        together.generate(sequences, 12)
        for prompt, sequence in zip(prompts, sequences, strict=True):
            driver = Driver(runner, seed=9)
            alone = driver.start(prompt)
            driver.generate([alone], 12)
            assert np.array_equal(np.array(alone.logits), np.array(sequence.logits)), quantize


@pytest.mark.parametrize(
    "family",
    [
        *("gemma2", "gemma4", "cohere2", "ministral3", "apertus", "lfm2", "qwen3_5", "qwen3_5_moe", "qwen3_next"),
        *("granitemoehybrid", "granitemoehybrid_dense", "nemotron_h", "falcon_h1"),
        *("lfm2_moe", "nemotron_h_latent"),
    ],
)
def test_whatever_a_layer_computes_it_does_so_alone_as_in_a_batch_and_in_pieces_to_the_bit(family, tmp_path):
    tiny_models.make(family, tmp_path)
    runner = load_runner(open_checkpoint(tmp_path), dataclasses.replace(OPTIONS, quantize="q8", kv_dtype="fp16"))
    assert_alone_as_in_a_batch(runner)


def test_embeddings_of_long_texts_are_computed_in_pieces(checkpoint):
    tokens = np.random.default_rng(8).integers(0, 199, 300).astype(np.int32)
    bounds = np.array([0, 5, 205, 300], np.int32)
    pieces = dataclasses.replace(OPTIONS, quantize="none", max_batch=1, max_batch_tokens=17)
    found = load_runner(checkpoint, pieces).embed(tokens, bounds)
    whole = load_runner(checkpoint, dataclasses.replace(OPTIONS, ops="torch")).embed(tokens, bounds)
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_an_embedding_is_the_same_to_the_bit_alone_and_among_others(checkpoint):
    runner = load_runner(checkpoint, dataclasses.replace(OPTIONS, quantize="q8", max_batch_tokens=64))
    tokens = np.random.default_rng(9).integers(0, 199, 300).astype(np.int32)
    bounds = np.array([0, 1, 33, 64, 70, 200, 203, 267, 300], np.int32)
    together = runner.embed(tokens, bounds)
    for found, first, end in zip(together, bounds[:-1], bounds[1:], strict=True):
        alone = runner.embed(tokens[first:end], np.array([0, end - first], np.int32))
        assert np.array_equal(alone[0], found)


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"quantize": "q3"}, "quantize", "quantize is 'q3'; it must be one of auto, none, q8, q4"),
        ({"kv_dtype": "fp8"}, "kv_dtype", "kv_dtype is 'fp8'; it must be one of auto, fp32, fp16, int8"),
        ({"ops": "torch", "quantize": "q8"}, "quantize", "with torch's operations it can only be auto or none"),
        ({"ops": "torch", "kv_dtype": "int8"}, "kv_dtype", "with torch's operations it can only be auto or fp32"),
        ({"dtype": "bf16"}, "ops", "computes on the CPU in fp32"),
    ],
)
def test_options_that_are_refused(checkpoint, changes, param, message):
    with pytest.raises(OptionError, match=message) as error:
        plan_memory(checkpoint, dataclasses.replace(OPTIONS, **changes))
    assert error.value.error["param"] == param


def test_a_block_that_is_no_whole_page_is_refused(checkpoint):
    with pytest.raises(LmserveError, match="multiple of 16 tokens, but 24 was given"):
        load_runner(checkpoint, dataclasses.replace(OPTIONS, block_size=24))


def test_torch_is_not_imported(checkpoint):
    program = f"""
import sys
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
runner = load_runner(open_checkpoint({str(checkpoint.path)!r}), RunnerOptions(device="cpu", kv_memory=4 << 20))
assert type(runner).__name__ == "CpuRunner", runner
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
