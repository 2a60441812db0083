"""Mixtures of experts: in every layout and type of weights, alone as in any batch, and what is refused."""

import dataclasses
import json
import re

import gguf
import numpy as np
import pytest
import tiny_gguf
import tiny_models
import torch
from lmserve.model import RunnerOptions, load_runner, open_checkpoint, plan_memory
from lmserve.model.errors import CheckpointError
from lmserve.model.interface import NO_TOKEN
from model_driver import Driver, assert_alone_as_in_a_batch, greedy
from safetensors.torch import load_file, save_file
from test_model_quantized import FORMATS, set_config

TORCH = RunnerOptions(device="cpu", ops="torch", max_batch=4, max_batch_tokens=64, threads=1)
CPU = RunnerOptions(device="cpu", ops="cpu", max_batch=16, max_batch_tokens=128, kv_memory=4 << 20, threads=2)
EXACT = dataclasses.replace(CPU, quantize="none")
STEPS = 16
# Whole blocks of 256 in every matrix of the experts.
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 8, "mlp_only_layers": []}


def assert_equals(reference, path, options) -> None:
    runner = load_runner(open_checkpoint(path), options)
    greedy(runner)
    driver = Driver(runner)
    sequence = driver.start(np.random.default_rng(0).integers(0, 199, 40))
    driver.generate([sequence], STEPS)
    logits = tiny_models.reference_logits(reference, sequence.tokens)[-STEPS - 1 : -1]
    assert np.abs(np.array(sequence.logits) - logits).max() < 1e-3
    assert sequence.tokens[-STEPS:] == logits.argmax(-1).tolist()


def rewrite(folder, change) -> None:
    """Store what `change` makes of the tensors."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def fused(tensors):
    """Each layer's experts as two tensors, as newer checkpoints have them."""
    found, parts = {}, {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if match:
            parts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    for prefix, kinds in parts.items():
        gate, up, down = (torch.stack([kinds[kind][i] for i in range(6)]) for kind in ("gate", "up", "down"))
        found |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), 1), f"{prefix}.down_proj": down}
    return found


@pytest.mark.parametrize("options", [TORCH, EXACT], ids=["torch", "cpu"])
def test_experts_in_one_tensor(options, tmp_path):
    reference = tiny_models.make("qwen3_moe", tmp_path)
    rewrite(tmp_path, fused)
    assert_equals(reference, tmp_path, options)


def test_experts_of_a_gguf_file_with_a_tensor_for_each(tmp_path, monkeypatch):
    reference = tiny_models.make("mixtral", tmp_path / "hf")
    add = gguf.GGUFWriter.add_tensor

    def one_by_one(writer, name, values, **how):
        match = re.fullmatch(r"(blk\.\d+\.ffn_\w+)_exps\.weight", name)
        if match is None:
            add(writer, name, values, **how)
            return
        for expert, own in enumerate(values):
            add(writer, f"{match[1]}.{expert}.weight", own, **how)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", one_by_one)
    tiny_gguf.write(tmp_path / "model.gguf", reference, "llama")
    assert_equals(reference, tmp_path / "model.gguf", TORCH)
    assert_equals(reference, tmp_path / "model.gguf", EXACT)


@pytest.mark.parametrize("form", ["gptq", "awq", "fp8-tensor", "fp8-block"])
def test_quantized_experts_of_safetensors(form, tmp_path):
    reference = tiny_models.make("qwen3_moe", tmp_path, moe_intermediate_size=48)
    config, packer, options = FORMATS[form]
    generator = torch.Generator().manual_seed(5)

    def quantized(tensors):
        found = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
            if match is None:
                found[name] = tensor
                continue
            parts, values = packer(tensor, generator, **options)
            found |= {f"{name.removesuffix('.weight')}.{kind}": part for kind, part in parts.items()}
            own = reference.get_parameter(f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}")
            rows = slice(48, None) if match[3] == "up" else slice(0, 48)
            own.data[int(match[2])][rows].copy_(values)
        return found

    rewrite(tmp_path, quantized)
    set_config(tmp_path, config)
    assert_equals(reference, tmp_path, TORCH)
    assert_equals(reference, tmp_path, EXACT)


def mxfp4(weight):
    """Blocks [experts, rows, columns / 32, 16], scales and values of a weight [experts, rows, columns]."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    groups = weight.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1).log2().floor() - 2).clamp(-24, 15)
    nearest = (groups / exponents.exp2()[..., None]).unsqueeze(-1).sub(numbers).abs().argmin(-1).to(torch.uint8)
    values = numbers[nearest.long()] * exponents.exp2()[..., None]
    return nearest[..., ::2] | nearest[..., 1::2] << 4, (exponents + 127).to(torch.uint8), values.flatten(-2)


def test_mxfp4_experts_of_gpt_oss(tmp_path):
    reference = tiny_models.make("gpt_oss", tmp_path, hidden_size=96, intermediate_size=64)

    def quantized(tensors):
        found = {}
        for name, tensor in tensors.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                found[name] = tensor
                continue
            blocks, scales, values = mxfp4(tensor.transpose(1, 2))
            found |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            reference.get_parameter(name).data.copy_(values.transpose(1, 2))
        return found

    rewrite(tmp_path, quantized)
    set_config(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    checkpoint = open_checkpoint(tmp_path)
    up = checkpoint.tensors["model.layers.1.mlp.experts.up_proj.weight"]
    assert up.dtype == "MXFP4"
    assert up.shape == (6, 64, 96)
    assert up.nbytes == 6 * 64 * 96 // 32 * 17
    stored = reference.model.layers[1].mlp.experts.gate_up_proj.detach().transpose(1, 2)[:, 1::2].numpy()
    assert np.array_equal(up.dequantize(), stored)
    assert np.array_equal(up.select_rows(np.array([4, 1])).dequantize(), stored[[4, 1]])
    assert_equals(reference, tmp_path, TORCH)
    assert_equals(reference, tmp_path, EXACT)
    runner = load_runner(checkpoint, CPU)
    assert runner.info.weight_bytes == plan_memory(checkpoint, CPU).weight_bytes
    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if "down_proj_sc" not in name})
    with pytest.raises(CheckpointError, match=r"down_proj_blocks of shape \[6, 96, 2, 16\] needs scales"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_layers_that_predict_further_tokens_are_left_out(form, tmp_path):
    reference = tiny_models.make("glm4_moe", tmp_path / "hf")
    if form == "safetensors":
        path = tmp_path / "hf"
        rewrite(path, lambda tensors: tensors | {"model.layers.3.eh_proj.weight": torch.ones(48, 96)})
    else:
        path = tmp_path / "model.gguf"
        reference.config.num_nextn_predict_layers = 1
        reference.config.num_hidden_layers += 1
        tiny_gguf.write(path, reference, "glm4moe", extra={"blk.3.nextn.eh_proj.weight": np.ones((48, 96), np.float32)})
        reference.config.num_hidden_layers -= 1
    assert_equals(reference, path, EXACT)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "Q2_K"])
def test_types_of_gguf(dtype, tmp_path):
    reference = tiny_models.make("qwen3_moe", tmp_path / "hf", **WIDE, head_dim=32)
    tiny_gguf.write(tmp_path / "model.gguf", reference, "qwen3moe", dtype)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    gate = checkpoint.tensors["model.layers.1.mlp.experts.gate_proj.weight"]
    assert gate.dtype == dtype
    assert gate.shape == (6, 256, 256)
    stored = reference.model.layers[1].mlp.experts.gate_up_proj[:, :256].detach().numpy()
    assert np.array_equal(gate.dequantize(), stored)
    assert_equals(reference, tmp_path / "model.gguf", TORCH)
    assert_equals(reference, tmp_path / "model.gguf", EXACT)
    plan = plan_memory(checkpoint, CPU)
    runner = load_runner(checkpoint, CPU)
    assert runner.info.weight_bytes == plan.weight_bytes
    greedy(runner)
    driver = Driver(runner)
    sequence = driver.start(np.random.default_rng(0).integers(0, 199, 20))
    driver.generate([sequence], STEPS)
    logits = tiny_models.reference_logits(reference, sequence.tokens)[-STEPS - 1 : -1]
    likeliest = logits[np.arange(STEPS), sequence.tokens[-STEPS:]]
    # Activations have 8 bits, so a token may be chosen that is likeliest but for that.
    assert (logits.max(-1) - likeliest).max() < 0.25 * logits.std()


@pytest.mark.parametrize("quantize", ["none", "q8", "q4"])
def test_what_was_planned_is_what_is_taken(quantize, tmp_path):
    tiny_models.make("qwen3_moe", tmp_path)
    options = dataclasses.replace(CPU, quantize=quantize)
    checkpoint = open_checkpoint(tmp_path)
    assert load_runner(checkpoint, options).info.weight_bytes == plan_memory(checkpoint, options).weight_bytes


SPARSE = ["qwen3_moe", "gpt_oss", "gemma4_moe", "glm4_moe", "llama4", "phimoe"]


@pytest.mark.parametrize(
    ("family", "quantize"), [(family, "q8") for family in SPARSE] + [("qwen3_moe", "none"), ("gpt_oss", "q4")]
)
def test_a_request_has_the_same_logits_alone_as_in_a_batch_and_in_pieces_to_the_bit(family, quantize, tmp_path):
    tiny_models.make(family, tmp_path)
    options = dataclasses.replace(CPU, quantize=quantize, kv_dtype="fp16")
    runner = load_runner(open_checkpoint(tmp_path), options)
    assert_alone_as_in_a_batch(runner)


@pytest.mark.parametrize("ops", ["torch", "cpu"])
def test_a_row_that_is_no_number_harms_no_other(ops, tmp_path):
    tiny_models.make("qwen3_moe", tmp_path)
    expected = first_tokens(tmp_path, ops)

    def harm(tensors):
        tensors["model.embed_tokens.weight"][7, 11] = float("nan")
        return tensors

    rewrite(tmp_path, harm)
    assert NO_TOKEN not in expected
    assert first_tokens(tmp_path, ops) == [expected[0], NO_TOKEN, expected[2]]


def first_tokens(folder, ops):
    runner = load_runner(open_checkpoint(folder), dataclasses.replace(CPU, ops=ops))
    greedy(runner)
    driver = Driver(runner)
    prompts = [[1, 2, 3], [5, 7, 9], [11, 12]]
    sizes = driver.fill([(driver.start(prompt), len(prompt)) for prompt in prompts])
    runner.launch(*sizes, None)
    runner.collect()
    return runner.buffers.sampled[: len(prompts)].tolist()


def test_a_missing_expert_is_named(tmp_path):
    tiny_models.make("qwen3_moe", tmp_path)
    name = "model.layers.0.mlp.experts.4.up_proj.weight"
    rewrite(tmp_path, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=r"experts\.up_proj\.weight of 6 experts: there is none of expert 4"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, but 0 was given"),
        ({"num_experts": 1 << 20}, "num_experts is 1048576; it must be at least 1 and at most 65536"),
        ({"num_experts_per_tok": 7}, "to go to 7 experts of 1 groups, but there are 1 groups of 6 experts"),
        ({"num_experts_per_tok": 0}, "to go to 0 experts"),
        ({"moe_intermediate_size": -1}, "expert_size is -1; it must be at least 1"),
        ({"num_experts": 5}, "of 5 experts: there are more"),
    ],
)
def test_numbers_of_experts_that_no_model_has_are_refused(changes, words, tmp_path):
    tiny_models.make("qwen3_moe", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["num_experts"] = raw.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    assert words in str(refused.value)
