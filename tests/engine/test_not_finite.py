"""A weight that is no number, on every kind of operations."""

import dataclasses

import numpy as np
import pytest
import tiny_models
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from lmserve.model.interface import NO_TOKEN
from model_driver import Driver, greedy
from safetensors.torch import load_file, save_file

OPTIONS = RunnerOptions(device="cpu", max_batch=8, max_batch_tokens=128, kv_memory=4 << 20, threads=1)
KINDS = {
    "torch": {"ops": "torch"},
    "none-fp32": {"ops": "cpu", "quantize": "none", "kv_dtype": "fp32"},
    "q8-fp16": {"ops": "cpu", "quantize": "q8", "kv_dtype": "fp16"},
    "q4-int8": {"ops": "cpu", "quantize": "q4", "kv_dtype": "int8"},
}
PROMPT = np.random.default_rng(5).integers(0, 199, 20)
HARMED = 7  # a token that is in no other prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.make("llama", folder)
    return folder


def harmed(folder, tmp_path, name, at):
    """A copy of the checkpoint with one number of one tensor gone."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name][at] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def first_token(checkpoint, kind, prompts):
    """The first sampled token of each prompt, all in one step, greedy and drawn."""
    runner = load_runner(checkpoint, dataclasses.replace(OPTIONS, **KINDS[kind]))
    sampled = []
    for temperature in (0.0, 1.0):
        greedy(runner)
        runner.buffers.temperature[:] = temperature
        runner.buffers.logprobs[:] = 5
        driver = Driver(runner)
        work = [(driver.start(prompt), len(prompt)) for prompt in prompts]
        sizes = driver.fill(work)
        runner.launch(*sizes, None)
        runner.collect()
        sampled.append(runner.buffers.sampled[: len(prompts)].tolist())
    return sampled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("model.layers.0.input_layernorm.weight", 3),
        ("model.layers.0.self_attn.q_proj.weight", (1, 2)),
        ("model.layers.1.self_attn.k_proj.weight", (5, 7)),
        ("model.layers.1.self_attn.v_proj.weight", (0, 0)),
        ("model.layers.2.self_attn.o_proj.weight", (9, 4)),
        ("model.layers.0.mlp.gate_proj.weight", (70, 1)),
        ("model.layers.2.mlp.down_proj.weight", (40, 70)),
        ("model.norm.weight", 47),
        ("lm_head.weight", (198, 0)),
    ],
)
def test_a_weight_that_is_no_number_gives_no_token(folder, tmp_path, kind, name, at):
    checkpoint = harmed(folder, tmp_path, name, at)
    assert first_token(checkpoint, kind, [PROMPT, PROMPT[:3]]) == [[NO_TOKEN, NO_TOKEN]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_that_is_no_number_harms_the_rows_that_read_it_alone(folder, tmp_path, kind):
    prompts = [np.where(PROMPT == HARMED, 8, PROMPT), np.append(PROMPT[:5], HARMED), PROMPT[:3] + 1]
    prompts = [np.where((prompt == HARMED) & (at != 1), 9, prompt) for at, prompt in enumerate(prompts)]
    checkpoint = harmed(folder, tmp_path, "model.embed_tokens.weight", (HARMED, 11))
    expected = first_token(open_checkpoint(folder), kind, prompts)
    found = first_token(checkpoint, kind, prompts)
    for before, after in zip(expected, found, strict=True):
        assert after == [before[0], NO_TOKEN, before[2]]
