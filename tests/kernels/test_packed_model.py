"""A model whose weights stay packed writes what the same weights as floats do."""

import dataclasses
import logging

import numpy as np
import pytest
import tiny_gguf
import tiny_models
import torch
from lmserve.model import RunnerOptions, load_runner, open_checkpoint, packed_check
from lmserve.model.options import plan_memory
from lmserve.model.torch_packed import PackedWeight
from model_driver import Driver, greedy

OPTIONS = RunnerOptions(device="cpu", ops="torch", max_batch=4, max_batch_tokens=64, threads=1)
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 32}


@pytest.fixture(scope="module", params=["Q4_K", "Q6_K"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = tiny_models.make("llama", folder / "hf", **SHAPE)
    tiny_gguf.write(folder / "model.gguf", reference, "llama", request.param)
    return reference, open_checkpoint(folder / "model.gguf")


def written(runner, steps=6):
    greedy(runner)
    driver = Driver(runner)
    sequences = [driver.start(np.random.default_rng(0).integers(0, 199, n)) for n in (1, 20, 70)]
    driver.generate(sequences, steps)
    return sequences


def test_greedy_tokens_equal_those_of_floats(model):
    reference, checkpoint = model
    runner = load_runner(checkpoint, OPTIONS)
    floats = load_runner(checkpoint, dataclasses.replace(OPTIONS, quantize="none"))
    assert isinstance(runner.model.head, PackedWeight)
    assert not isinstance(floats.model.head, PackedWeight)
    assert runner.info.weight_bytes == plan_memory(checkpoint, OPTIONS).weight_bytes
    assert runner.info.weight_bytes < floats.info.weight_bytes / 4
    sequences = written(runner)
    assert [sequence.tokens for sequence in sequences] == [sequence.tokens for sequence in written(floats)]
    for sequence in sequences:
        logits = tiny_models.reference_logits(reference, sequence.tokens)[-7:-1]
        assert np.abs(np.array(sequence.logits) - logits).max() < 1e-3


def test_floats_take_the_place_of_kernels_that_fail(model, monkeypatch, caplog):
    _, checkpoint = model
    monkeypatch.setattr(packed_check, "fault", lambda *_: "no C compiler")
    with caplog.at_level(logging.WARNING, "lmserve.model"):
        runner = load_runner(checkpoint, OPTIONS)
    assert not isinstance(runner.model.head, PackedWeight)
    assert caplog.messages == ["weights are converted to fp32, for the kernels of packed ones fail here: no C compiler"]


@pytest.mark.parametrize("change", [{"dtype": "bf16"}, {"quantize": "none"}, {"tensor_parallel": 2}])
def test_what_is_loaded_as_floats(model, change):
    _, checkpoint = model
    options = dataclasses.replace(OPTIONS, **change)
    assert not plan_memory(checkpoint, options).packed
    assert plan_memory(checkpoint, OPTIONS).packed


def test_the_interpreter_has_no_bf16():
    """Where this fails, the interpreter has learned it: the condition in `options` can go."""
    from lmserve.model.packed_formats import FORMATS
    from lmserve.model.torch_packed import PackedMatrix

    form = FORMATS["Q8_0"]
    matrix = PackedMatrix(form, packed_check.random_planes(form, 16, 256, torch.device("cpu")), 256)
    x, out = torch.randn(2, 256).bfloat16(), torch.empty(2, 16, dtype=torch.bfloat16)
    matrix.multiply(x, out)
    expected = x.float() @ matrix.rows(torch.arange(16), torch.float32).T
    assert (out.float() - expected).abs().max() > expected.abs().max()


WIDTHS = {"hidden_size": 192, "intermediate_size": 192, "head_dim": 32}
LATENT = dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32)


@pytest.mark.parametrize(
    ("family", "changes"), [("gemma2", {}), ("deepseek_v2", LATENT | {"moe_intermediate_size": 32})]
)
def test_the_plan_knows_which_weights_stay_packed(family, changes, tmp_path):
    """Not those of experts, of routers and of the heads of latent attention."""
    reference = tiny_models.make(family, tmp_path / "hf", **WIDTHS, **changes)
    tiny_gguf.write(tmp_path / "model.gguf", reference, tiny_gguf.ARCHITECTURES.get(family, family), "Q8_0")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    runner = load_runner(checkpoint, OPTIONS)
    floats = load_runner(checkpoint, dataclasses.replace(OPTIONS, quantize="none"))
    assert runner.info.weight_bytes == plan_memory(checkpoint, OPTIONS).weight_bytes < floats.info.weight_bytes
    tokens = [sequence.tokens for sequence in written(runner, 3)]
    assert tokens == [sequence.tokens for sequence in written(floats, 3)]
