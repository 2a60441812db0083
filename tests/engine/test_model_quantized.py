"""Quantized safetensors checkpoints: logits equal the dequantized model's. The packers follow the formats' own code."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from lmserve.model import CheckpointError, RunnerOptions, load_runner, open_checkpoint
from lmserve.model.quantization import read_quantization
from lmserve.model.quantized_source import E4M3, restore
from lmserve.model.safetensors_source import read_safetensors
from model_driver import Driver
from safetensors.torch import load_file, save_file

OPTIONS = RunnerOptions(device="cpu", ops="torch", max_batch=4, max_batch_tokens=64, threads=1)
PROMPT = [int(t) for t in np.random.default_rng(3).integers(0, 199, 21)]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def rounded(weight, group, bits):
    """Numbers, zero points and scales of [out, in]; `group` is each input's. All are [in or groups, out]."""
    inputs = weight.double().T
    groups = int(group.max()) + 1
    most = 2**bits - 1
    scales, zeros = torch.zeros(groups, weight.shape[0]), torch.zeros(groups, weight.shape[0], dtype=torch.int64)
    for g in range(groups):
        part = inputs[group == g]
        low, high = part.min(0).values.clamp(max=0), part.max(0).values.clamp(min=0)
        scales[g] = ((high - low) / most).half()
        zeros[g] = (-low / scales[g]).round().clamp(0, most).long()
    numbers = (inputs / scales[group] + zeros[group]).round().clamp(0, most).long()
    return numbers, zeros, scales


def packed_along(numbers, bits, axis, order=None):
    """32-bit words of the numbers along an axis; `order`: which of a word's numbers is at each place, lowest first."""
    per_word = 32 // bits
    rows = numbers.movedim(axis, 0)
    words = torch.zeros(len(rows) // per_word, *rows.shape[1:], dtype=torch.int64)
    for word in range(len(words)):
        for place in range(per_word):
            words[word] |= rows[word * per_word + (order[place] if order else place)] << (bits * place)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.movedim(0, axis).to(torch.int32).contiguous()


def gptq(weight, generator, *, bits=4, group_size=16, desc_act=False, checkpoint_format="gptq"):
    inputs = weight.shape[1]
    size = inputs if group_size == -1 else group_size
    group = torch.arange(inputs) // size
    if desc_act:
        group = group[torch.randperm(inputs, generator=generator)]
    numbers, zeros, scales = rounded(weight, group, bits)
    stored = (zeros - int(checkpoint_format == "gptq")) % 2**bits
    parts = {
        "qweight": packed_along(numbers, bits, 0),
        "qzeros": packed_along(stored, bits, 1),
        "scales": scales.half(),
        "g_idx": group.int(),
    }
    return parts, (scales[group] * (numbers - zeros[group])).T


def awq(weight, generator, *, group_size=16):
    group = torch.arange(weight.shape[1]) // group_size
    numbers, zeros, scales = rounded(weight, group, 4)
    parts = {
        "qweight": packed_along(numbers, 4, 1, AWQ_ORDER),
        "qzeros": packed_along(zeros, 4, 1, AWQ_ORDER),
        "scales": scales.half(),
    }
    return parts, (scales[group] * (numbers - zeros[group])).T


def fp8(weight, generator, *, block=None, name="weight_scale", scale_type=torch.float32):
    rows, columns = weight.shape
    height, width = block or (rows, columns)
    scale = torch.zeros(-(-rows // height), -(-columns // width))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            part = weight[row * height : (row + 1) * height, column * width : (column + 1) * width]
            scale[row, column] = part.abs().max() / 448
    scale = scale.to(scale_type)
    expanded = scale.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    stored = (weight / expanded).to(torch.float8_e4m3fn)
    if scale.numel() == 1:
        scale = scale.reshape(1)
    return {"weight": stored, name: scale, "input_scale": torch.ones(1)}, stored.float() * expanded


def compressed(strategy, **more):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    group = {"weights": weights, "input_activations": None, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
FORMATS = {
    "gptq": (GPTQ, gptq, {}),
    "gptq-act-order": ({**GPTQ, "desc_act": True}, gptq, {"desc_act": True}),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq, {"checkpoint_format": "gptq_v2"}),
    "gptq-one-group": ({**GPTQ, "group_size": -1}, gptq, {"group_size": -1}),
    "gptq-8-bit": ({**GPTQ, "bits": 8}, gptq, {"bits": 8}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM", "zero_point": True}, awq, {}),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8, {}),
    "fp8-block": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]},
        fp8,
        {"block": (16, 32), "name": "weight_scale_inv"},
    ),
    "compressed-tensor": (compressed("tensor"), fp8, {"scale_type": torch.bfloat16}),
    "compressed-channel": (compressed("channel"), fp8, {"block": (1, 10**6)}),
    "compressed-block": (compressed("block", block_structure=[32, 16]), fp8, {"block": (32, 16)}),
}


def quantize(folder, reference, config, packer, options, linear=r"_proj.weight"):
    """Rewrite a folder's linear weights; the reference gets the values that they stand for."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(linear)]:
        parts, values = packer(tensors.pop(name), generator, **options)
        tensors |= {f"{name.removesuffix('.weight')}.{kind}": part for kind, part in parts.items()}
        if reference is not None:
            reference.get_parameter(name).data.copy_(values)
    save_file(tensors, folder / "model.safetensors")
    set_config(folder, config)


def set_config(folder, config):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_the_dequantized_models(name, tmp_path):
    config, packer, options = FORMATS[name]
    reference = tiny_models.make("llama", tmp_path)
    plain = tiny_models.reference_logits(reference, PROMPT)
    quantize(tmp_path, reference, config, packer, options)
    checkpoint = open_checkpoint(tmp_path)
    driver = Driver(load_runner(checkpoint, OPTIONS))
    sequence = driver.start(PROMPT)
    driver.generate([sequence], 8)
    logits = tiny_models.reference_logits(reference, sequence.tokens)
    assert np.abs(np.array(sequence.logits) - logits[len(PROMPT) - 1 : -1]).max() < 1e-3
    # The rounding is there: neither is the unquantized model.
    assert np.abs(logits[: len(PROMPT)] - plain).max() > 1e-2
    stored = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    assert stored.nbytes < 4 * np.prod(stored.shape) / 2
    assert np.array_equal(stored.raw(), stored.dequantize())


def test_one_matrix_for_query_key_and_value(tmp_path):
    """InternLM2's rows are chosen from a quantized matrix."""
    tiny_models.make("internlm2", tmp_path)
    plain = open_checkpoint(tmp_path)
    before = {name: tensor.dequantize() for name, tensor in plain.tensors.items()}
    quantize(tmp_path, None, *FORMATS["compressed-channel"], linear="wqkv.weight")
    after = open_checkpoint(tmp_path).tensors
    for projection in "qkv":
        name = f"model.layers.1.self_attn.{projection}_proj.weight"
        assert after[name].shape == before[name].shape
        values = after[name].dequantize()
        assert 0 < np.abs(values - before[name]).max() < 0.05
        rows = np.array([4, 1])
        assert np.array_equal(after[name].select_rows(rows).dequantize(), values[rows])


def test_layers_may_be_left_as_they_are(tmp_path):
    reference = tiny_models.make("llama", tmp_path)
    quantize(tmp_path, reference, GPTQ, gptq, {}, linear="mlp.down_proj.weight")
    tensors = open_checkpoint(tmp_path).tensors
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        assert np.allclose(tensors[name].dequantize(), reference.get_parameter(name).detach().numpy(), atol=1e-6)


def test_a_bias_of_zeros_is_none(tmp_path):
    """AutoGPTQ gives every layer a bias."""
    quantize(tmp_path, tiny_models.make("llama", tmp_path), *FORMATS["gptq"])
    tensors = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.0.mlp.up_proj.bias"
    save_file(tensors | {bias: torch.zeros(80)}, tmp_path / "model.safetensors")
    assert bias not in open_checkpoint(tmp_path).tensors
    save_file(tensors | {bias: torch.ones(80)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.bias is not one of a supported model"):
        open_checkpoint(tmp_path)


def test_every_fp8_number():
    torchs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3, torchs, equal_nan=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method is one of gptq, awq, fp8, compressed-tensors, modelopt, mxfp4, but 'bitsandb",
        ),
        ({"bits": 4}, "but 'unknown' was given"),
        ([1], "quantization_config must be an object"),
        ({**GPTQ, "bits": 3}, "gptq may have bits 4, 8, but 3 was given"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format gptq, gptq_v2, but 'marlin'"),
        ({**GPTQ, "dynamic": {"+:x": {}}}, "gptq with dynamic"),
        ({**GPTQ, "group_size": 0}, "group_size of gptq is positive or -1, but 0"),
        ({**GPTQ, "group_size": "many"}, "a value of the wrong kind"),
        ({**GPTQ, "group_size": 32}, r"scales has shape \[5, 48\], quantization_config needs \[3, 48\]"),
        ({"quant_method": "awq", "version": "gemv"}, "awq may have version gemm, but 'gemv'"),
        ({"quant_method": "awq", "zero_point": False}, "awq may have zero_point True, but False"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 may have fmt e4m3, but 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "a block of scales is two positive numbers"),
        (
            {**compressed("tensor"), "format": "pack-quantized"},
            "format float-quantized, nvfp4-pack-quantized, .*, but 'pack-quantized'",
        ),
        (compressed("token"), "strategy tensor, channel, block, but 'token'"),
        (compressed("tensor", type="int"), "type float, but 'int'"),
        ({**compressed("tensor"), "kv_cache_scheme": {"num_bits": 8}}, "a quantized KV cache"),
        ({**compressed("tensor"), "config_groups": {}}, "one kind of scales, but 0 were given"),
    ],
)
def test_other_schemes_are_refused(config, message, tmp_path):
    quantize(tmp_path, tiny_models.make("llama", tmp_path), *FORMATS["gptq"])
    set_config(tmp_path, config)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
PACKED = {"quant_method": "compressed-tensors", "config_groups": {}}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ("weight", "weight_scale", "weight_scale_2")),
        ({**PACKED, "format": "nvfp4-pack-quantized"}, ("weight_packed", "weight_scale", "weight_global_scale")),
        ({"quant_method": "mxfp4"}, ("weight", "weight_scale", None)),
        ({**PACKED, "format": "mxfp4-pack-quantized"}, ("weight_packed", "weight_scale", None)),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, ("weight", "weight_scale", None)),
        ({**PACKED, "format": "mxfp8-quantized"}, ("weight", "weight_scale", None)),
    ],
    ids=lambda value: value.get("format", value.get("quant_algo", "mxfp4")) if isinstance(value, dict) else "",
)
def test_small_floats(config, names, tmp_path):
    generator = torch.Generator().manual_seed(1)
    scheme = read_quantization({"quantization_config": config})
    rows, columns, group = 3, 64, scheme.group_size
    if scheme.bits == 8:
        stored = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
        values = stored.float()
    else:
        codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
        signs = 1.0 - 2.0 * (codes >> 3)
        values = torch.tensor(E2M1)[(codes & 7).long()] * signs
        stored = codes[:, ::2] | codes[:, 1::2] << 4
    if scheme.method == "nvfp4":
        scale = (torch.rand(rows, columns // group, generator=generator) + 0.5).to(torch.float8_e4m3fn)
        whole = torch.tensor([0.25])
        scales = scale.float() * (4.0 if "global" in names[2] else 0.25)
    else:
        scale = torch.randint(120, 130, (rows, columns // group), generator=generator, dtype=torch.uint8)
        whole, scales = None, 2.0 ** (scale.float() - 127)
    parts = {names[0]: stored, names[1]: scale} | ({} if whole is None else {names[2]: whole})
    save_file({f"x.{name}": part for name, part in parts.items()}, tmp_path / "model.safetensors")
    tensors = restore(read_safetensors(tmp_path), scheme)
    expected = values * scales.repeat_interleave(group, 1)
    assert list(tensors) == ["x.weight"]
    assert tensors["x.weight"].shape == (rows, columns)
    assert np.array_equal(tensors["x.weight"].dequantize(), expected.numpy())
    if whole is not None:
        del parts[names[2]]
        save_file({f"x.{name}": part for name, part in parts.items()}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="has 0 scales of the whole tensor"):
            restore(read_safetensors(tmp_path), scheme)


def change(folder, changed):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: value(tensors[name]) for name, value in changed.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


LAYER = "model.layers.2.mlp.gate_proj"


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("gptq", {"scales": lambda _: None}, "needs the tensor .*gate_proj.scales, but it is missing"),
        ("gptq", {"qzeros": lambda t: t[:, :4].contiguous()}, r"qzeros has shape \[3, 4\]"),
        ("gptq", {"g_idx": lambda t: t + 1}, r"g_idx must lie in \[0, 3\), but \[1, 3\] was given"),
        ("gptq", {"qweight": lambda t: t.half()}, "qweight must be I32, but is F16"),
        ("awq", {"qweight": lambda t: t[:40].contiguous()}, r"has shape \[80, 40\], the configuration needs"),
        ("fp8-tensor", {"weight_scale": lambda _: None}, "needs one of weight_scale and weight_scale_inv"),
        ("fp8-tensor", {"weight_scale": lambda _: torch.ones(2)}, r"weight_scale has shape \[2\]"),
        ("fp8-block", {"weight_scale_inv": lambda t: t[:1]}, r"weight_scale_inv has shape \[1, 2\]"),
        ("fp8-block", {"weight": lambda t: t.float()}, "weight must be F8_E4M3|gate_proj.weight, but it is missing"),
    ],
)
def test_broken_parts_are_named(name, changed, message, tmp_path):
    quantize(tmp_path, tiny_models.make("llama", tmp_path), *FORMATS[name])
    change(tmp_path, {f"{LAYER}.{kind}": value for kind, value in changed.items()})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
