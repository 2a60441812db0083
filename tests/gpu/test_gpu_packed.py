"""Weights that stay packed: the kernel of each type on the GPU, and a model beside transformers."""

import numpy as np
import pytest
import tiny_gguf
import tiny_models
import torch
from lmserve.model import RunnerOptions, load_runner, open_checkpoint, packed_check
from lmserve.model.packed_formats import FORMATS
from lmserve.model.torch_packed import PackedWeight
from model_driver import Driver, greedy

pytestmark = pytest.mark.dry
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
STEPS = 8


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_products_equal_those_of_floats(name, dtype, device):
    if device == "cpu" and (dtype == "bf16" or name not in ("Q4_K", "Q6_K")):
        pytest.skip("the interpreter has no bf16, and takes its time: tests/kernels have all types")
    found = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert packed_check.fault([FORMATS[name]], torch.device(device), found) is None


@pytest.mark.parametrize(("dtype", "graphs"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_a_model_is_near_transformers(dtype, graphs, device, tmp_path):
    """Greedy tokens too, in fp32; in bf16 a near-tie may turn."""
    if device == "cpu" and dtype == "bf16":
        pytest.skip("the interpreter has no bf16")
    reference = tiny_models.make("llama", tmp_path / "hf", **SHAPE)
    tiny_gguf.write(tmp_path / "model.gguf", reference, "llama", "Q4_K")
    options = RunnerOptions(device=device, dtype=dtype, ops="torch", graphs=graphs, max_batch=4, kv_memory=1 << 26)
    runner = load_runner(open_checkpoint(tmp_path / "model.gguf"), options)
    assert isinstance(runner.model.head, PackedWeight)
    greedy(runner)
    driver = Driver(runner)
    sequences = [driver.start(np.random.default_rng(n).integers(0, 199, n)) for n in (1, 20, 70)]
    driver.generate(sequences, STEPS)
    for sequence in sequences:
        logits = tiny_models.reference_logits(reference, sequence.tokens)[-STEPS - 1 : -1]
        error = np.abs(np.array(sequence.logits) - logits)
        if dtype == "fp32":
            assert error.max() < 1e-2
            assert sequence.tokens[-STEPS:] == logits.argmax(-1).tolist()
        else:
            assert error.mean() < 0.03 * logits.std()
