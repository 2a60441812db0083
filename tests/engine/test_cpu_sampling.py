"""The core's sampler against torch's: the same logits, many rows with parameters of every kind, the same tokens."""

import numpy as np
import pytest
import tiny_models
import torch
from lmserve.errors import LmserveError
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from lmserve.model.interface import MAX_LOGPROBS, LogitEdits
from lmserve.model.sampler import SamplingRows, sample, token_logprobs
from model_driver import Driver, greedy

ROWS = 32


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.make(next(iter(tiny_models.CONFIGS)), folder)
    options = RunnerOptions(device="cpu", ops="cpu", quantize="none", max_batch=ROWS, max_batch_tokens=512, threads=2)
    return load_runner(open_checkpoint(folder), options)


@pytest.fixture(scope="module")
def shape(runner):
    """A step of one prompt for each row, already in the buffers."""
    generator = np.random.default_rng(0)
    driver = Driver(runner)
    prompts = [driver.start(generator.integers(0, 199, 5)) for _ in range(ROWS)]
    greedy(runner)
    return driver.fill([(prompt, 5) for prompt in prompts])


def raw_logits(runner, shape) -> np.ndarray:
    greedy(runner)
    runner.launch(*shape, None)
    return runner.logits(ROWS).copy()


def random_parameters(runner, generator) -> None:
    buffers = runner.buffers
    greedy(runner)
    buffers.temperature[:ROWS] = generator.choice([0.0, 0.05, 0.7, 1.0, 3.0], ROWS)
    buffers.top_k[:ROWS] = generator.choice([0, 1, 2, 5, 40, 198, 199, 5000], ROWS)
    buffers.top_p[:ROWS] = generator.choice([1.0, 0.999, 0.9, 0.5, 0.1, 0.0], ROWS)
    buffers.min_p[:ROWS] = generator.choice([0.0, 0.0, 0.05, 0.5, 1.0], ROWS)
    buffers.repetition_penalty[:ROWS] = generator.choice([1.0, 1.3, 0.8], ROWS)
    buffers.presence_penalty[:ROWS] = generator.choice([0.0, 0.5, -1.0], ROWS)
    buffers.frequency_penalty[:ROWS] = generator.choice([0.0, 0.2], ROWS)
    buffers.uniform[:ROWS] = generator.random(ROWS, dtype=np.float32) * np.float32(0.999)
    buffers.logprobs[:ROWS] = generator.choice([-1, 0, 3, 20], ROWS)


def random_extras(generator) -> LogitEdits:
    def ragged(most):
        lists = [generator.permutation(199)[: generator.integers(0, most)] for _ in range(ROWS)]
        start = np.cumsum([0, *map(len, lists)]).astype(np.int32)
        return start, np.concatenate(lists).astype(np.int32)

    bias_start, bias_token = ragged(6)
    seen_start, seen_token = ragged(30)
    values = generator.choice([-np.inf, -2.0, 1.5, 1e30], len(bias_token), p=[0.3, 0.3, 0.35, 0.05])
    counts = generator.integers(0, 4, len(seen_token)).astype(np.int32)
    return LogitEdits(bias_start, bias_token, values.astype(np.float32), seen_start, seen_token, counts)


@pytest.mark.parametrize("seed", range(40))
def test_tokens_and_logprobs_are_those_of_torch(runner, shape, seed):
    generator = np.random.default_rng(seed)
    logits = raw_logits(runner, shape)
    random_parameters(runner, generator)
    edits = random_extras(generator) if seed % 2 else None
    runner.launch(*shape, edits)
    buffers = runner.buffers
    given = torch.from_numpy(logits)
    expected = sample(given.clone(), SamplingRows.of(buffers, ROWS), edits)
    assert buffers.sampled[:ROWS].tolist() == expected.tolist()
    own, top_ids, top_logprobs = token_logprobs(given, expected)
    asked = buffers.logprobs[:ROWS] >= 0
    np.testing.assert_allclose(buffers.sampled_logprob[:ROWS][asked], own.numpy()[asked], atol=1e-5)
    listed = buffers.logprobs[:ROWS] > 0
    assert buffers.top_ids[:ROWS][listed].tolist() == top_ids.numpy()[listed].tolist()
    np.testing.assert_allclose(buffers.top_logprobs[:ROWS][listed], top_logprobs.numpy()[listed], atol=1e-5)
    assert buffers.top_ids.shape[1] == MAX_LOGPROBS


def test_a_row_without_any_allowed_token_still_gives_one(runner, shape):
    raw_logits(runner, shape)
    runner.buffers.temperature[:ROWS] = 1
    forbidden = np.tile(np.arange(199, dtype=np.int32), ROWS)
    edits = LogitEdits(
        (np.arange(ROWS + 1) * 199).astype(np.int32),
        forbidden,
        np.full(len(forbidden), -np.inf, np.float32),
        np.zeros(ROWS + 1, np.int32),
        np.zeros(0, np.int32),
        np.zeros(0, np.int32),
    )
    runner.launch(*shape, edits)
    assert all(0 <= token < runner.info.vocab_size for token in runner.buffers.sampled[:ROWS])


def test_a_step_that_does_not_fit_is_refused_and_the_next_one_runs(runner, shape):
    logits = raw_logits(runner, shape)
    for name, value in {"token_ids": 5000, "positions": 10**6, "slots": -1, "sample_rows": 500}.items():
        array = getattr(runner.buffers, name)
        kept = array[0].copy()
        array[0] = value
        with pytest.raises(LmserveError, match="lies outside"):
            runner.launch(*shape, None)
        array[0] = kept
    assert np.array_equal(raw_logits(runner, shape), logits)
