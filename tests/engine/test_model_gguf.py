"""Models from GGUF files: every architecture and storage type equals transformers with the stored values."""

import dataclasses

import numpy as np
import pytest
import tiny_gguf
import tiny_models
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from lmserve.model.cpu_ops import _stored
from lmserve.model.errors import CheckpointError
from lmserve.model.gguf_source import scaled
from lmserve.model.tensors import StoredTensor
from model_driver import Driver, greedy

OPTIONS = RunnerOptions(device="cpu", ops="torch", max_batch=4, max_batch_tokens=64, threads=1)
CPU = RunnerOptions(device="cpu", ops="cpu", quantize="none", max_batch=4, max_batch_tokens=64, threads=2)
STEPS = 16


def assert_equals(reference, path, options=OPTIONS) -> None:
    runner = load_runner(open_checkpoint(path), options)
    greedy(runner)
    driver = Driver(runner)
    generator = np.random.default_rng(0)
    sequences = [driver.start(generator.integers(0, 199, n)) for n in (1, 20, 70)]
    driver.generate(sequences, STEPS)
    for sequence in sequences:
        logits = tiny_models.reference_logits(reference, sequence.tokens)[-STEPS - 1 : -1]
        assert logits.std() > 0.1
        assert np.abs(np.array(sequence.logits) - logits).max() < 1e-3
        assert sequence.tokens[-STEPS:] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("family", list(tiny_models.CONFIGS))
def test_architectures(family, tmp_path):
    reference = tiny_models.make(family, tmp_path / "hf")
    tiny_gguf.write(tmp_path / "model.gguf", reference, tiny_gguf.ARCHITECTURES.get(family, family))
    assert_equals(reference, tmp_path / "model.gguf")
    assert_equals(reference, tmp_path / "model.gguf", CPU)


TYPES = (
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q2_K",
    "Q3_K",
    "IQ4_NL",
    "IQ4_XS",
)
TYPES += ("MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}


@pytest.mark.parametrize(
    "dtype",
    ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S"],
)
def test_the_kernels_of_the_cpu_compute_with_what_is_stored(dtype, tmp_path):
    reference = tiny_models.make("llama", tmp_path / "hf", **SHAPE, head_dim=32)
    tiny_gguf.write(tmp_path / "model.gguf", reference, "llama", dtype)
    runner = load_runner(open_checkpoint(tmp_path / "model.gguf"), dataclasses.replace(OPTIONS, ops="cpu"))
    driver = Driver(runner)
    sequence = driver.start(np.random.default_rng(0).integers(0, 199, 20))
    driver.generate([sequence], STEPS)
    logits = tiny_models.reference_logits(reference, sequence.tokens)[-STEPS - 1 : -1]
    likeliest = logits[np.arange(STEPS), sequence.tokens[-STEPS:]]
    # Activations have 8 bits, so a token may be chosen that is likeliest but for that.
    assert (logits.max(-1) - likeliest).max() < 0.1 * logits.std()


@pytest.mark.parametrize("options", [OPTIONS, CPU], ids=["torch", "cpu"])
def test_scales_of_whole_tensors_beside_nvfp4(options, tmp_path):
    """As llama.cpp's converter writes them for files of ModelOpt: the scale multiplies what the blocks stand for."""
    reference = tiny_models.make("llama", tmp_path / "hf", **SHAPE, head_dim=32)
    factors = {"attn_q": 0.5, "attn_output": 1.25, "ffn_down": 2.0}
    extra = {f"blk.{layer}.{name}.scale": np.float32([f]) for layer in (0, 1) for name, f in factors.items()}
    extra |= {f"blk.{layer}.{name}.input_scale": np.float32([7]) for layer in (0, 1) for name in factors}
    tiny_gguf.write(tmp_path / "model.gguf", reference, "llama", "NVFP4", extra)
    for layer in reference.model.layers:
        for linear, factor in zip(
            (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj), factors.values(), strict=True
        ):
            linear.weight.data.mul_(factor)
    assert_equals(reference, tmp_path / "model.gguf", options)


def test_a_scale_of_each_expert_beside_nvfp4():
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 120, (3 * 8, 36), np.uint8)
    weight = StoredTensor("blk.0.ffn_up_exps.weight", (3, 8, 64), "NVFP4", blocks)
    scales = np.float32([1, 0.5, 3])
    tensors = {weight.name: weight, "blk.0.ffn_up_exps.scale": StoredTensor("s", (3,), "F32", scales)}
    found = scaled(tensors)
    assert list(found) == [weight.name]
    assert np.array_equal(found[weight.name].dequantize(), weight.dequantize() * scales[:, None, None])
    tensors["blk.0.ffn_up_exps.scale"] = StoredTensor("s", (2,), "F32", scales[:2])
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up_exps.scale has 2 numbers, but .* 3 rows"):
        scaled(tensors)


@pytest.mark.parametrize(("exponent", "kept"), [(104, True), (143, True), (103, False), (144, False), (0, False)])
def test_scales_beyond_half_precision_are_kept_as_floats(exponent, kept):
    blocks = np.full((4, 2 * 17), 0x11, np.uint8)
    blocks[:, ::17] = 120
    blocks[2, 17] = exponent
    stored, values = _stored(StoredTensor("x", (4, 64), "MXFP4", blocks), None)
    assert stored == ("MXFP4" if kept else "F32")
    if not kept:
        assert np.array_equal(values.view(np.float32).reshape(4, 64)[2, 32:], np.full(32, 2.0 ** (exponent - 128)))
    blocks[2, 18:] = 0x80
    assert _stored(StoredTensor("x", (4, 64), "MXFP4", blocks), None)[0] == "MXFP4"


@pytest.mark.parametrize("dtype", TYPES)
def test_storage_types(dtype, tmp_path):
    reference = tiny_models.make("llama", tmp_path / "hf", **SHAPE, head_dim=32)
    tiny_gguf.write(tmp_path / "model.gguf", reference, "llama", dtype)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    query = checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"]
    assert query.dtype == dtype
    stored = reference.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    assert np.array_equal(query.dequantize(), stored)
    assert query.raw().nbytes == query.nbytes < stored.nbytes
    assert_equals(reference, tmp_path / "model.gguf")
