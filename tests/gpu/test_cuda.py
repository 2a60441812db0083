"""The model loop on a real GPU: equal to transformers, graphs equal to eager steps, and a long soak."""

import os

import numpy as np
import pytest
import tiny_models
import torch
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from lmserve.model.torch_attention import SdpaAttention
from lmserve.model.torch_runner import GraphRunner
from model_driver import Driver, greedy

DEVICE = os.environ.get("DEVICE", "cuda")
STEPS = 64 if DEVICE == "cuda" else 8
LENGTHS = (1, 2, 17, 255, 256, 257, 40, 600)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    reference = tiny_models.make("llama", folder, max_position_embeddings=1024, hidden_size=96)
    return reference, open_checkpoint(folder)


def load(checkpoint, **changes):
    values = {"device": DEVICE, "ops": "torch", "max_batch": 12, "max_batch_tokens": 1024, "kv_memory": 1 << 26}
    runner = load_runner(checkpoint, RunnerOptions(**values | changes))
    greedy(runner)
    return runner


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 199, n).tolist() for n in LENGTHS]


@pytest.mark.dry
def test_fp32_equals_transformers(model):
    reference, checkpoint = model
    runner = load(checkpoint, dtype="fp32")
    assert isinstance(runner.ops.cache, SdpaAttention)
    driver = Driver(runner)
    sequences = [driver.start(prompt) for prompt in prompts()]
    driver.generate(sequences, STEPS)
    for prompt, sequence in zip(prompts(), sequences, strict=True):
        logits = tiny_models.reference_logits(reference, sequence.tokens)[len(prompt) - 1 : -1]
        assert np.abs(np.array(sequence.logits) - logits).max() < 1e-2
        assert sequence.tokens[len(prompt) :] == logits.argmax(-1).tolist()


@pytest.mark.dry
@pytest.mark.parametrize("chunk", [10**9, 7])
def test_bf16_is_near_the_fp32_reference(model, chunk):
    reference, checkpoint = model
    runner = load(checkpoint, dtype="bf16", graphs=False)
    driver = Driver(runner)
    sequences = [driver.start(prompt) for prompt in prompts()]
    driver.generate(sequences, STEPS, chunk=chunk)
    for prompt, sequence in zip(prompts(), sequences, strict=True):
        logits = tiny_models.reference_logits(reference, sequence.tokens)[len(prompt) - 1 : -1]
        error = np.abs(np.array(sequence.logits) - logits)
        assert error.mean() < 0.03 * logits.std()


def test_graphs_equal_eager_steps(model):
    _, checkpoint = model
    graphed = load(checkpoint)
    if not isinstance(graphed, GraphRunner):
        pytest.skip(f"torch {torch.__version__} has no varlen_attn with a block table, so there are no graphs")
    tokens = []
    for runner in (graphed, load(checkpoint, graphs=False)):
        driver = Driver(runner)
        sequences = [driver.start(prompt) for prompt in prompts()]
        for count in range(len(sequences), 0, -1):
            driver.generate(sequences[:count], 8, logits=False)
        tokens.append([sequence.tokens for sequence in sequences])
    differing = sum(ours != theirs for ours, theirs in zip(*tokens, strict=True))
    # Padding changes a kernel's tiling, which may turn a near-tie.
    assert differing <= 1


def test_launch_returns_before_the_device_is_done(model):
    _, checkpoint = model
    runner = load(checkpoint)
    driver = Driver(runner)
    shape = driver.fill([(driver.start(range(150)), 150)])
    runner.launch(*shape, None)
    runner.collect()
    first = int(runner.buffers.sampled[0])
    torch.cuda._sleep(200_000_000)
    runner.launch(*shape, None)
    assert not torch.cuda.current_stream().query()
    runner.collect()
    assert torch.cuda.current_stream().query()
    assert runner.buffers.sampled[0] == first


def test_launch_never_waits_for_the_device(model):
    """Sampling with every filter included; torch raises where a call would wait."""
    _, checkpoint = model
    runner = load(checkpoint)
    driver = Driver(runner)
    rows = runner.buffers
    rows.temperature[:] = 0.8
    rows.top_k[:6], rows.top_p[:], rows.min_p[3:] = 40, 0.9, 0.05
    rows.logprobs[:4] = 5
    sequences = [driver.start(range(length)) for length in (5, 60, 17, 100, 3, 41, 9)]
    shape = driver.fill([(sequence, len(sequence.tokens)) for sequence in sequences])
    for _ in range(2):  # the first call of a kernel may set it up
        runner.launch(*shape, None)
        runner.collect()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.launch(*shape, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    runner.collect()
    assert ((rows.sampled[:7] >= 0) & (rows.sampled[:7] < 199)).all()


def test_a_long_soak_of_graphs_and_eager_steps_keeps_the_greedy_tokens(model):
    """Ten thousand steps of changing batches; each sequence is compared with the same one alone, without graphs."""
    _, checkpoint = model
    runner, alone = load(checkpoint), load(checkpoint, graphs=False)
    generator = np.random.default_rng(2)
    steps = differing = compared = 0
    while steps < 10_000:
        driver = Driver(runner)
        prompts = [generator.integers(0, 199, n).tolist() for n in generator.integers(1, 400, 12)]
        sequences = [driver.start(prompt) for prompt in prompts]
        for count in range(12, 0, -1):
            new = int(generator.integers(1, 20))
            driver.generate(sequences[:count], new, chunk=256, logits=False)
            steps += new
        check = Driver(alone)
        again = check.start(prompts[-1])
        check.generate([again], len(sequences[-1].tokens) - len(prompts[-1]), logits=False)
        compared += 1
        differing += again.tokens != sequences[-1].tokens
    # A near-tie may turn with the batch; a page of another sequence would turn nearly all.
    assert differing <= compared // 10


def test_soak_keeps_memory_level(model):
    _, checkpoint = model
    runner = load(checkpoint)
    generator = np.random.default_rng(1)
    runner.buffers.temperature[:] = 0.8
    runner.buffers.top_k[:] = 40
    levels = []
    for _ in range(6):
        for _ in range(40):
            driver = Driver(runner, seed=int(generator.integers(1 << 30)))
            lengths = generator.integers(1, 300, generator.integers(1, 13))
            sequences = [driver.start(generator.integers(0, 199, n)) for n in lengths]
            runner.buffers.uniform[:] = generator.random(len(runner.buffers.uniform), dtype=np.float32)
            driver.generate(sequences, int(generator.integers(1, 12)), chunk=128, logits=False)
            assert all(0 <= token < 199 for sequence in sequences for token in sequence.tokens)
        levels.append(torch.cuda.memory_allocated())
    assert levels[-1] <= levels[1]
