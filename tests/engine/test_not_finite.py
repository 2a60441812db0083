"""Numbers that are none: in a model's weights, on every kind of operations, and in its hyper-parameters."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_models
from lmserve.errors import LmserveError
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan; it must lie in [0, 1]"),
        ({"rms_norm_eps": float("inf")}, "norm_eps is inf; it must lie in [0, 1]"),
        ({"rms_norm_eps": -1e-6}, "norm_eps is -1e-06; it must lie in [0, 1]"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("inf")}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": float("nan")}}, "beta_fast"),
        ({"num_hidden_layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"num_attention_heads": -6}, "must be at least 1"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; it must be at least 1 and at most"),
        ({"hidden_size": float("nan")}, "cannot convert float NaN to integer"),
    ],
)
def test_hyper_parameters_that_no_model_has_are_refused(folder, tmp_path, changes, words):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(LmserveError) as refused:
        open_checkpoint(tmp_path)
    assert words in str(refused.value), str(refused.value)
