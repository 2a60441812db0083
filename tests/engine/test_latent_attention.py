"""Latent attention: in every form of its weights and of the cache, and alone as in any batch."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_gguf
import tiny_models
import torch
from lmserve.model import CheckpointError, load_runner, open_checkpoint, plan_memory
from model_driver import Driver, assert_alone_as_in_a_batch, greedy
from test_experts import CPU, EXACT, TORCH, assert_equals, rewrite
from test_model_quantized import FORMATS, set_config

# Whole blocks of 256 in what is multiplied with latents, and with what becomes one.
WIDE = {"kv_lora_rank": 256, "qk_nope_head_dim": 32, "v_head_dim": 32, "hidden_size": 256, "q_lora_rank": 256}
WIDE |= {"intermediate_size": 96, "moe_intermediate_size": 64}


@pytest.mark.parametrize("kv_dtype", ["fp32", "fp16", "int8"])
def test_the_cache_has_one_latent_for_all_heads(kv_dtype, tmp_path):
    reference = tiny_models.make("deepseek_v3", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    options = dataclasses.replace(EXACT, kv_dtype=kv_dtype)
    plan, runner = plan_memory(checkpoint, options), load_runner(checkpoint, options)
    assert runner.info.kv_bytes_per_token == plan.kv_bytes_per_token
    assert runner.info.weight_bytes == plan.weight_bytes
    # Keys and values are the latent of 32 and the rotated 8, filled up to whole vectors in values.
    size = {"fp32": 4, "fp16": 2, "int8": 1}[kv_dtype]
    assert plan.kv_bytes_per_token >= 3 * (40 + 48) * size
    assert plan.kv_bytes_per_token <= 3 * ((40 + 48) * size + 12)
    greedy(runner)
    driver = Driver(runner)
    sequence = driver.start(np.random.default_rng(0).integers(0, 199, 60))
    driver.generate([sequence], 8)
    logits = tiny_models.reference_logits(reference, sequence.tokens)[-9:-1]
    error = np.linalg.norm(np.array(sequence.logits) - logits) / np.linalg.norm(logits)
    assert error < {"fp32": 1e-5, "fp16": 2e-3, "int8": 3e-2}[kv_dtype]


@pytest.mark.parametrize("quantize", ["q8", "q4"])
def test_a_request_has_the_same_logits_alone_as_in_a_batch_and_in_pieces_to_the_bit(quantize, tmp_path):
    tiny_models.make("deepseek_v3", tmp_path)
    runner = load_runner(open_checkpoint(tmp_path), dataclasses.replace(CPU, quantize=quantize, kv_dtype="fp16"))
    assert_alone_as_in_a_batch(runner)


def test_queries_and_outputs_with_biases(tmp_path):
    reference = tiny_models.make("deepseek_v3", tmp_path, attention_bias=True)
    assert_equals(reference, tmp_path, TORCH)
    assert_equals(reference, tmp_path, EXACT)


def test_pairs_that_are_half_apart_already(tmp_path):
    reference = tiny_models.make("deepseek_v3", tmp_path, rope_interleave=False)
    assert_equals(reference, tmp_path, EXACT)


def test_a_gguf_file_with_corrected_scores_has_a_sigmoid_even_if_it_does_not_say_so(tmp_path, monkeypatch):
    reference = tiny_models.make("glm4_moe_lite", tmp_path / "hf")
    monkeypatch.setattr("gguf.GGUFWriter.add_expert_gating_func", lambda *_: None)
    tiny_gguf.write(tmp_path / "model.gguf", reference, "deepseek2")
    assert_equals(reference, tmp_path / "model.gguf", TORCH)


@pytest.mark.parametrize("dtype", ["BF16", "Q8_0", "Q4_0"])
def test_types_of_gguf(dtype, tmp_path):
    reference = tiny_models.make("deepseek_v3", tmp_path / "hf", **WIDE)
    tiny_gguf.write(tmp_path / "model.gguf", reference, "deepseek2", dtype)
    keys = open_checkpoint(tmp_path / "model.gguf").tensors["model.layers.1.self_attn.k_b_proj.weight"]
    assert keys.dtype == dtype
    assert keys.shape == (6, 256, 32)
    assert_equals(reference, tmp_path / "model.gguf", TORCH)
    assert_equals(reference, tmp_path / "model.gguf", EXACT)


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_a_gguf_file_with_keys_and_values_in_one_matrix(dtype, tmp_path, monkeypatch):
    reference = tiny_models.make("deepseek_v3", tmp_path / "hf", **WIDE)
    monkeypatch.setattr(tiny_gguf, "_with_heads_apart", lambda tensors, _config: tensors)
    monkeypatch.setitem(tiny_gguf.OTHER_NAMES["deepseek2"], "self_attn.kv_b_proj", "attn_kv_b")
    tiny_gguf.write(tmp_path / "model.gguf", reference, "deepseek2", dtype)
    tensors = open_checkpoint(tmp_path / "model.gguf").tensors
    keys, values = (tensors[f"model.layers.0.self_attn.{part}_b_proj.weight"] for part in "kv")
    assert (keys.dtype, values.dtype) == ("F32", dtype)
    stored = reference.model.layers[0].self_attn.kv_b_proj.weight.detach().view(6, 64, 256).numpy()
    assert np.array_equal(keys.dequantize(), stored[:, :32].transpose(0, 2, 1))
    assert np.array_equal(values.dequantize(), stored[:, 32:])
    assert np.array_equal(keys.select_rows(np.array([4, 1])).dequantize(), keys.dequantize()[[4, 1]])
    assert keys.nbytes == values.nbytes == keys.whole.nbytes // 2
    assert_equals(reference, tmp_path / "model.gguf", TORCH)
    assert_equals(reference, tmp_path / "model.gguf", EXACT)


def test_fp8_of_safetensors(tmp_path):
    reference = tiny_models.make("deepseek_v3", tmp_path)
    config, packer, options = FORMATS["fp8-block"]
    generator = torch.Generator().manual_seed(5)

    def quantized(tensors):
        found = {}
        for name, tensor in tensors.items():
            if "self_attn" not in name or not name.endswith(("proj.weight", "mqa.weight")):
                found[name] = tensor
                continue
            parts, values = packer(tensor, generator, **options)
            found |= {f"{name.removesuffix('.weight')}.{kind}": part for kind, part in parts.items()}
            reference.get_parameter(name).data.copy_(values)
        return found

    rewrite(tmp_path, quantized)
    set_config(tmp_path, config)
    assert_equals(reference, tmp_path, TORCH)
    assert_equals(reference, tmp_path, EXACT)


def test_mistral_small_4_is_served_as_its_text_model(tmp_path):
    reference = tiny_models.make("mistral4", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    wrapper = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(wrapper | {"text_config": raw | {"architectures": None}}))
    rewrite(
        tmp_path,
        lambda tensors: (
            {
                name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1): tensor
                for name, tensor in tensors.items()
            }
            | {"model.vision_tower.patch_conv.weight": torch.ones(2, 2)}
        ),
    )
    assert_equals(reference, tmp_path, EXACT)


def test_a_choice_among_groups_by_a_softmax_of_mistral4_is_refused(tmp_path):
    tiny_models.make("mistral4", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"n_group": 2}))
    with pytest.raises(CheckpointError, match="n_group of mistral4 must be 1, but 2 was given"):
        open_checkpoint(tmp_path)
