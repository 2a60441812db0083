"""Each family equals transformers: logits to 1e-3 in fp32 and the same greedy tokens, however its steps are cut.

With FORM=gguf, as `make test-families` has it, models are loaded from GGUF files instead of safetensors.
"""

import os

import numpy as np
import pytest
import tiny_gguf
import tiny_models
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from model_driver import Driver, greedy

STEPS = 64
OPTIONS = {
    "torch": RunnerOptions(device="cpu", ops="torch", max_batch=16, max_batch_tokens=128, threads=1),
    "cpu": RunnerOptions(device="cpu", ops="cpu", quantize="none", max_batch=16, max_batch_tokens=128, threads=2),
}


@pytest.fixture(scope="module", params=list(tiny_models.CONFIGS))
def reference_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    reference = tiny_models.make(request.param, path)
    if os.environ.get("FORM") == "gguf":
        path /= "model.gguf"
        tiny_gguf.write(path, reference, tiny_gguf.ARCHITECTURES.get(request.param, request.param))
    return reference, path


@pytest.fixture(scope="module", params=list(OPTIONS))
def models(request, reference_path):
    reference, path = reference_path
    runner = load_runner(open_checkpoint(path), OPTIONS[request.param])
    greedy(runner)
    return reference, runner


def prompts(count: int, longest: int = 90, seed: int = 1) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = [1, 2, 16, 17, *generator.integers(3, longest, max(0, count - 4))][-count:]
    return [[int(t) for t in generator.integers(0, 199, length)] for length in lengths]


def assert_equal(reference, sequence, prompt_length: int) -> None:
    logits = tiny_models.reference_logits(reference, sequence.tokens)[prompt_length - 1 : -1]
    assert len(sequence.tokens) == prompt_length + STEPS
    assert len(sequence.logits) == STEPS
    assert np.abs(np.array(sequence.logits) - logits).max() < 1e-3
    # By induction over the steps these are the tokens that transformers generates.
    assert sequence.tokens[prompt_length:] == logits.argmax(-1).tolist()


def test_alone(models):
    reference, runner = models
    for prompt in prompts(2):
        driver = Driver(runner, eager=True)
        sequence = driver.start(prompt)
        driver.generate([sequence], STEPS)
        assert_equal(reference, sequence, len(prompt))


def test_batch_of_16_mixed_lengths(models):
    reference, runner = models
    driver = Driver(runner, eager=True)
    given = prompts(16)
    sequences = [driver.start(prompt) for prompt in given]
    driver.generate(sequences, STEPS)
    for prompt, sequence in zip(given, sequences, strict=True):
        assert_equal(reference, sequence, len(prompt))


def test_shared_prefix_blocks(models):
    reference, runner = models
    driver = Driver(runner)
    tails = prompts(3, seed=5)
    prefix = np.random.default_rng(5).integers(0, 199, 50).tolist()
    first = driver.start(prefix + tails[0])
    driver.generate([first], STEPS, stop=48)
    assert_equal(reference, first, len(prefix + tails[0]))
    others = [driver.start(prefix + tail, share=first) for tail in tails[1:]]
    assert all(other.computed == 48 for other in others)
    before = [list(other.blocks) for other in others]
    driver.generate(others, STEPS)
    for tail, other, blocks in zip(tails[1:], others, before, strict=True):
        assert other.blocks[:3] == blocks == first.blocks[:3]
        assert_equal(reference, other, len(prefix + tail))


def test_chunks_of_7(models):
    reference, runner = models
    driver = Driver(runner, eager=True)
    given = prompts(6, seed=3)
    sequences = [driver.start(prompt) for prompt in given]
    driver.generate(sequences, STEPS, chunk=7)
    for prompt, sequence in zip(given, sequences, strict=True):
        assert_equal(reference, sequence, len(prompt))


def test_preempted_and_resumed(models):
    reference, runner = models
    driver = Driver(runner)
    given = prompts(5, seed=4)
    sequences = [driver.start(prompt) for prompt in given]
    driver.generate(sequences, 20)
    driver.preempt(sequences[1])
    driver.preempt(sequences[4])
    driver.generate([sequences[0], sequences[4]], 14)
    driver.generate(sequences[1:4], 44)
    driver.generate([sequences[0], sequences[4]], 30)
    for prompt, sequence in zip(given, sequences, strict=True):
        assert_equal(reference, sequence, len(prompt))


def test_continued_forked_and_rewound(models):
    """What a session does: a turn more; another way from a turn on; and a turn taken back, its slots written again."""
    reference, runner = models
    driver = Driver(runner)
    prompt, turn, other = prompts(3, seed=9)
    sequence = driver.start(prompt)
    driver.generate([sequence], 20, logits=False)
    first = list(sequence.tokens)
    fork = driver.start(first + other, share=sequence)
    sequence.tokens += turn
    driver.generate([sequence, fork], STEPS)
    assert_equal(reference, sequence, len(first) + len(turn))
    assert_equal(reference, fork, len(first) + len(other))
    sequence.tokens[len(first) :] = other
    driver.rewind(sequence, len(first) - 1)
    sequence.logits = []
    driver.generate([sequence], STEPS)
    assert sequence.tokens == fork.tokens
    assert_equal(reference, sequence, len(first) + len(other))


def test_embeddings_are_pooled_causal_states(models):
    reference, runner = models
    given = prompts(5, seed=6)
    bounds = np.cumsum([0, *(len(prompt) for prompt in given)]).astype(np.int32)
    found = runner.embed(np.concatenate(given).astype(np.int32), bounds)
    for prompt, embedding in zip(given, found, strict=True):
        states = tiny_models.reference_states(reference, prompt).mean(0)
        np.testing.assert_allclose(embedding, states / np.linalg.norm(states), atol=1e-5)


def test_embedding_touches_no_block(models):
    _, runner = models
    driver = Driver(runner)
    sequence = driver.start(prompts(1)[0])
    driver.generate([sequence], 8)
    again = driver.start(sequence.tokens[:-8])
    driver.generate([again], 4)
    given = prompts(3, seed=8)
    bounds = np.cumsum([0, *(len(prompt) for prompt in given)]).astype(np.int32)
    runner.embed(np.concatenate(given).astype(np.int32), bounds)
    driver.generate([again], 4)
    assert again.tokens == sequence.tokens
