"""Adapters equal weights that they were merged into: logits to 1e-3, several of them and none in one batch."""

import re

import numpy as np
import pytest
import tiny_adapters
import tiny_gguf
import tiny_models
import torch
from lmserve.errors import LmserveError
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from lmserve.model.adapters import open_adapter
from lmserve.model.errors import AdapterError
from model_driver import Driver, greedy

STEPS = 12
OPTIONS = {
    "torch": RunnerOptions(device="cpu", ops="torch", max_batch=32, max_batch_tokens=128, threads=1),
    "cpu": RunnerOptions(device="cpu", ops="cpu", quantize="none", max_batch=32, max_batch_tokens=128, threads=2),
}
# Their checkpoints have other tensors than the transformers model has modules.
OTHER_NAMES = ("internlm2",)


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 199, length).tolist() for length in generator.integers(1, 40, count)]


def assert_equal(reference, sequence, prompt_length: int) -> None:
    logits = tiny_models.reference_logits(reference, sequence.tokens)[prompt_length - 1 : -1]
    assert len(sequence.logits) == STEPS
    assert np.abs(np.array(sequence.logits) - logits).max() < 1e-3


@pytest.fixture(scope="module", params=[name for name in tiny_models.CONFIGS if name not in OTHER_NAMES])
def adapted(request, tmp_path_factory):
    """A model, and two adapters of all layers that can have one."""
    path = tmp_path_factory.mktemp(request.param)
    reference = tiny_models.make(request.param, path / "model")
    modules = tiny_adapters.changeable(reference, path / "model")
    assert any(name.endswith(("o_proj", "out_proj")) for name in modules)
    first = tiny_adapters.write(path / "first", reference, modules, seed=1)
    some = [name for name in modules if "mlp" not in name][1:]
    second = tiny_adapters.write(path / "second", reference, some, seed=2, rank=7, alpha=2.5, use_rslora=True)
    return path, [reference, first, second]


@pytest.mark.parametrize("ops", OPTIONS)
def test_adapters_of_one_batch_equal_merged_weights(adapted, ops):
    path, references = adapted
    checkpoint = open_checkpoint(path / "model")
    runner = load_runner(checkpoint, OPTIONS[ops])
    for number, name in ((1, "first"), (2, "second")):
        runner.load_adapter(number, open_adapter(path / name, checkpoint, max_rank=8))
    greedy(runner)
    driver = Driver(runner, eager=True)
    given = prompts(6)
    sequences = [driver.start(prompt) for prompt in given]
    for at, sequence in enumerate(sequences):
        sequence.adapter = at % 3
    driver.generate(sequences, STEPS, chunk=9)
    for prompt, sequence in zip(given, sequences, strict=True):
        assert_equal(references[sequence.adapter], sequence, len(prompt))


def test_8_adapters_in_a_batch_of_32_equal_merged_weights_and_each_alone(tmp_path):
    reference = tiny_models.make("qwen3", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    modules = tiny_adapters.changeable(reference, tmp_path / "model")
    runner = load_runner(checkpoint, OPTIONS["cpu"])
    references = [reference]
    for number in range(1, 9):
        path, own = tmp_path / str(number), modules[number % 3 :: 2]
        references.append(tiny_adapters.write(path, reference, own, seed=number, rank=number, alpha=2 * number))
        runner.load_adapter(number, open_adapter(path, checkpoint, max_rank=8))
    greedy(runner)
    given = prompts(32, seed=3)
    driver = Driver(runner, eager=True)
    sequences = [driver.start(prompt) for prompt in given]
    for at, sequence in enumerate(sequences):
        sequence.adapter = at % 9
    driver.generate(sequences, STEPS)
    for prompt, sequence in zip(given, sequences, strict=True):
        assert_equal(references[sequence.adapter], sequence, len(prompt))
        other = Driver(runner, seed=5)
        alone = other.start(prompt)
        alone.adapter = sequence.adapter
        other.generate([alone], STEPS)
        assert alone.tokens == sequence.tokens
        assert np.array_equal(alone.logits, sequence.logits)


def test_an_adapter_that_is_unloaded_changes_nothing_any_more(tmp_path):
    reference = tiny_models.make("llama", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    tiny_adapters.write(tmp_path / "first", reference, ["model.layers.1.self_attn.v_proj"], seed=1)
    merged = tiny_adapters.write(tmp_path / "second", reference, ["model.layers.1.self_attn.v_proj"], seed=2)
    runner = load_runner(checkpoint, OPTIONS["cpu"])
    greedy(runner)
    runner.load_adapter(1, open_adapter(tmp_path / "first", checkpoint, max_rank=8))
    runner.unload_adapter(1)
    driver = Driver(runner)
    sequence = driver.start([1, 2, 3])
    sequence.adapter = 1
    with pytest.raises(LmserveError, match="adapter 1 is not loaded"):
        driver.generate([sequence], 1)
    runner.load_adapter(1, open_adapter(tmp_path / "second", checkpoint, max_rank=8))
    sequence = driver.start([1, 2, 3])
    sequence.adapter = 1
    driver.generate([sequence], STEPS)
    assert_equal(merged, sequence, 3)


def refused(tmp_path, model, modules, **config) -> str:
    tiny_adapters.write(tmp_path / "adapter", model, modules, **config)
    with pytest.raises(AdapterError) as caught:
        open_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "model"), max_rank=8)
    return str(caught.value)


def test_what_no_adapter_can_change_is_refused_by_name(tmp_path):
    model = tiny_models.make("mixtral", tmp_path / "model")
    assert "only linear layers within a text model's layers" in refused(tmp_path, model, ["lm_head"])
    model.model.layers[0].mlp.other = torch.nn.Linear(48, 5)
    said = refused(tmp_path, model, ["model.layers.0.mlp.other"])
    assert "layers.0.mlp.other, but in layers.0 an adapter can change only: self_attn.k_proj, self_attn.o_proj" in said
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(48, 5)])
    assert "adapters of experts are not supported" in refused(tmp_path, model, ["model.layers.0.mlp.experts.0"])
    model.vision = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(48, 5)])})
    assert "it changes vision.layers.0" in refused(tmp_path, model, ["vision.layers.0"])
    model.model.layers[2].self_attn.q_proj = torch.nn.Linear(48, 96)
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(40, 16)
    said = refused(tmp_path, model, ["model.layers.2.self_attn.q_proj"])
    assert "q_proj.lora_B.weight has shape [96, 4], but the model needs [48, 4]" in said
    said = refused(tmp_path, model, ["model.layers.1.self_attn.k_proj"])
    assert "k_proj.lora_A.weight has shape [4, 40], but the model needs [4, 48]" in said


# Layers that GGUF files store in another form, or turned around.
OTHER_IN_GGUF = re.compile(
    r"linear_attn|mamba|shared_mlp|shared_expert_gate|mixer\.(in|out|fc1_latent|fc2_latent)_proj"
)
LLAMA4_IN_GGUF = re.compile(r"feed_forward")
FACTORS_IN_GGUF = ("falcon_h1", "falcon_h1_normed")


@pytest.mark.parametrize(
    "family", [name for name in tiny_models.CONFIGS if name not in (*OTHER_NAMES, *FACTORS_IN_GGUF)]
)
def test_adapters_of_gguf_files_equal_merged_weights(tmp_path, family):
    reference = tiny_models.make(family, tmp_path / "model")
    path = tmp_path / "model.gguf"
    tiny_gguf.write(path, reference, tiny_gguf.ARCHITECTURES.get(family, family))
    other = LLAMA4_IN_GGUF if family == "llama4" else OTHER_IN_GGUF
    modules = tiny_adapters.changeable(reference, tmp_path / "model")
    taken = [name for name in modules if not other.search(name)]
    assert any("q_" in name or "qkv" in name for name in taken)
    merged = tiny_adapters.write(tmp_path / "adapter", reference, taken)
    checkpoint = open_checkpoint(path)
    for options in OPTIONS.values():
        runner = load_runner(checkpoint, options)
        runner.load_adapter(1, open_adapter(tmp_path / "adapter", checkpoint, max_rank=8))
        greedy(runner)
        driver = Driver(runner)
        sequences = [driver.start(prompt) for prompt in ([7, 8, 9], list(range(5, 40)))]
        sequences[1].adapter = 1
        driver.generate(sequences, STEPS)
        assert_equal(reference, sequences[0], 3)
        assert_equal(merged, sequences[1], 35)
    for name in set(modules) - set(taken):
        tiny_adapters.write(tmp_path / "adapter", reference, [name])
        with pytest.raises(AdapterError, match=rf"{name.removeprefix('model.')}, but in GGUF files of .* only: "):
            open_adapter(tmp_path / "adapter", checkpoint, max_rank=8)


def test_what_adapters_of_gguf_files_cannot_be_is_refused(tmp_path):
    model = tiny_models.make("falcon_h1", tmp_path / "model")
    tiny_adapters.write(tmp_path / "adapter", model, ["model.layers.0.self_attn.q_proj"])
    tiny_gguf.write(tmp_path / "falcon.gguf", model, "falcon-h1")
    with pytest.raises(AdapterError, match="adapters of GGUF files of falcon_h1 are not supported"):
        open_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "falcon.gguf"), max_rank=8)
    model = tiny_models.make("llama", tmp_path / "llama")
    tiny_gguf.write(tmp_path / "llama.gguf", model, "llama")
    checkpoint = open_checkpoint(tmp_path / "llama.gguf")
    for outputs, inputs, said in (
        (44, 48, "lora_B.weight has shape [44, 4]"),
        (48, 40, "lora_A.weight has shape [4, 40]"),
    ):
        model.model.layers[1].self_attn.q_proj = torch.nn.Linear(inputs, outputs)
        tiny_adapters.write(tmp_path / "adapter", model, ["model.layers.1.self_attn.q_proj"])
        with pytest.raises(AdapterError, match=re.escape(said)):
            open_adapter(tmp_path / "adapter", checkpoint, max_rank=8)
    model.model.layers[0].mlp.other = torch.nn.Linear(48, 5)
    tiny_adapters.write(tmp_path / "adapter", model, ["model.layers.0.mlp.other"])
    known = "mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj, self_attn.o_proj"
    with pytest.raises(AdapterError, match=rf"layers\.0\.mlp\.other, but in GGUF files of llama .* only: {known}"):
        open_adapter(tmp_path / "adapter", checkpoint, max_rank=8)


def test_scales_of_stored_tensors_are_no_part_of_an_adapter(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 8}
    reference = tiny_models.make("llama", tmp_path / "model", **shape, head_dim=32)
    scale = {"blk.0.attn_q.scale": np.float32([0.25])}
    tiny_gguf.write(tmp_path / "model.gguf", reference, "llama", "NVFP4", scale)
    reference.model.layers[0].self_attn.q_proj.weight.data.mul_(0.25)
    name = "model.layers.0.self_attn.q_proj"
    merged = tiny_adapters.write(tmp_path / "adapter", reference, [name], alpha=20)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    runner = load_runner(checkpoint, OPTIONS["torch"])
    runner.load_adapter(1, open_adapter(tmp_path / "adapter", checkpoint, max_rank=8))
    greedy(runner)
    driver = Driver(runner)
    sequence = driver.start(range(5, 40))
    sequence.adapter = 1
    driver.generate([sequence], STEPS)
    assert_equal(merged, sequence, 35)


def test_models_that_take_no_adapter_are_refused(minilm_folder, tmp_path):
    with pytest.raises(AdapterError, match="is an embedding model; adapters need a model that generates"):
        open_adapter(tmp_path, open_checkpoint(minilm_folder), max_rank=8)
