"""What a runner writes into its output buffers, seeded sampling whatever else is in the batch, and half precision."""

import dataclasses

import numpy as np
import pytest
import tiny_models
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from model_driver import Driver, greedy

OPTIONS = RunnerOptions(device="cpu", ops="torch", max_batch=16, max_batch_tokens=128, threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    reference = tiny_models.make("llama", folder)
    return reference, load_runner(open_checkpoint(folder), OPTIONS)


def test_logprobs_are_written_for_the_rows_that_ask(models):
    reference, runner = models
    greedy(runner)
    driver = Driver(runner)
    generator = np.random.default_rng(2)
    sequences = [driver.start(generator.integers(0, 199, n)) for n in (5, 9, 30, 1)]
    buffers = runner.buffers
    buffers.logprobs[:4] = [-1, 0, 5, 20]
    buffers.sampled_logprob[:] = 7
    buffers.top_ids[:] = -7
    driver.step([(sequence, sequence.pending) for sequence in sequences])
    assert buffers.sampled_logprob[0] == 7
    assert (buffers.top_ids[0] == -7).all()
    for row in (1, 2, 3):
        *prompt, token = sequences[row].tokens
        logits = tiny_models.reference_logits(reference, prompt)[-1]
        logprobs = logits - np.log(np.exp(logits).sum())
        assert buffers.sampled[row] == token == logits.argmax()
        np.testing.assert_allclose(buffers.sampled_logprob[row], logprobs[token], atol=1e-3)
        if row > 1:
            order = np.argsort(-logprobs)[:20]
            assert buffers.top_ids[row].tolist() == order.tolist()
            np.testing.assert_allclose(buffers.top_logprobs[row], logprobs[order], atol=1e-3)


def test_a_step_without_sampled_rows_only_fills_the_cache(models):
    reference, runner = models
    greedy(runner)
    driver = Driver(runner)
    prompt = np.random.default_rng(4).integers(0, 199, 40).tolist()
    sequence = driver.start(prompt)
    driver.step([(sequence, 39)])
    assert sequence.tokens == prompt
    driver.generate([sequence], 1)
    assert sequence.tokens[-1] == tiny_models.reference_logits(reference, prompt)[-1].argmax()


def test_seeded_sampling_is_the_same_in_any_batch(models):
    _, runner = models
    buffers = runner.buffers
    generator = np.random.default_rng(11)
    prompts = [generator.integers(0, 199, n).tolist() for n in (3, 21, 8, 40, 1, 16)]
    kinds = [(0.8, 40, 0.8, 0.0), (1.0, 0, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (0.7, 5, 1.0, 0.1)]

    def run(members: list[int]) -> dict[int, list[int]]:
        driver = Driver(runner, seed=sum(members))
        sequences = {i: driver.start(prompts[i]) for i in members}
        for position in range(24):
            for row, i in enumerate(members):
                at = (buffers.temperature, buffers.top_k, buffers.top_p, buffers.min_p)
                for buffer, value in zip(at, kinds[i % 4], strict=True):
                    buffer[row] = value
                buffers.uniform[row] = np.random.default_rng((i, position)).random(dtype=np.float32)
            driver.step([(sequence, sequence.pending) for sequence in sequences.values()])
        return {i: sequence.tokens for i, sequence in sequences.items()}

    greedy(runner)
    together = run([0, 1, 2, 3, 4, 5])
    for members in ([5, 3, 1], [4], [2, 0]):
        assert {i: together[i] for i in members} == run(members)
    assert len({tuple(tokens[-24:]) for tokens in together.values()}) == 6


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_near_fp32(tmp_path, dtype):
    reference = tiny_models.make("llama", tmp_path)
    runner = load_runner(open_checkpoint(tmp_path), dataclasses.replace(OPTIONS, dtype=dtype))
    assert runner.info.dtype == dtype
    assert runner.info.weight_bytes == 2 * sum(p.numel() for p in reference.parameters())
    greedy(runner)
    driver = Driver(runner)
    prompts = [np.random.default_rng(n).integers(0, 199, n) for n in (3, 50)]
    sequences = [driver.start(prompt) for prompt in prompts]
    driver.generate(sequences, 8, chunk=20)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        logits = tiny_models.reference_logits(reference, sequence.tokens)[len(prompt) - 1 : -1]
        assert np.abs(np.array(sequence.logits) - logits).mean() < 0.03 * logits.std()
