"""Models from GGUF files: every architecture and storage type equals transformers with the stored values."""

import numpy as np
import pytest
import tiny_gguf
import tiny_models
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from model_driver import Driver, greedy

OPTIONS = RunnerOptions(device="cpu", ops="torch", max_batch=4, max_batch_tokens=64, threads=1)
STEPS = 16


def assert_equals(reference, path) -> None:
    runner = load_runner(open_checkpoint(path), OPTIONS)
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


# The architecture's name, where it is not the family's.
ARCHITECTURES = {
    "llama3": "llama",
    "gemma4_31b": "gemma4",
    "mistral": "llama",
    "ministral3": "mistral3",
    "olmo3": "olmo2",
    "cohere": "command-r",
}


@pytest.mark.parametrize("family", list(tiny_models.CONFIGS))
def test_architectures(family, tmp_path):
    architecture = ARCHITECTURES.get(family, family)
    reference = tiny_models.make(family, tmp_path / "hf")
    tiny_gguf.write(tmp_path / "model.gguf", reference, architecture)
    assert_equals(reference, tmp_path / "model.gguf")


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_storage_types(dtype, tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
    reference = tiny_models.make("llama", tmp_path / "hf", **shape, head_dim=32)
    tiny_gguf.write(tmp_path / "model.gguf", reference, "llama", dtype)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    query = checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"]
    assert query.dtype == dtype
    stored = reference.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    assert np.array_equal(query.dequantize(), stored)
    assert query.raw().nbytes == query.nbytes < stored.nbytes
    assert_equals(reference, tmp_path / "model.gguf")
