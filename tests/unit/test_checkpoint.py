"""Opening Hugging Face folders and GGUF files: what is read, and what is refused with a clear message."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from lmserve.model import CheckpointError, open_checkpoint
from lmserve.model.config import ModelConfig, RopeConfig
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {
            f"{layer}input_layernorm.weight": (8,),
            f"{layer}post_attention_layernorm.weight": (8,),
            f"{layer}self_attn.q_proj.weight": (8, 8),
            f"{layer}self_attn.k_proj.weight": (4, 8),
            f"{layer}self_attn.v_proj.weight": (4, 8),
            f"{layer}self_attn.o_proj.weight": (8, 8),
            f"{layer}mlp.gate_proj.weight": (12, 8),
            f"{layer}mlp.up_proj.weight": (12, 8),
            f"{layer}mlp.down_proj.weight": (8, 12),
        }
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    write_config(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def write_config(folder, **changes) -> None:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def write_json(path, value) -> None:
    path.write_text(json.dumps(value))


def test_folder(folder):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == "generate"
    assert checkpoint.name == folder.name
    assert checkpoint.max_model_len == 64
    assert checkpoint.eos_token_ids == [2]
    assert checkpoint.config == ModelConfig(
        architecture="llama",
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0),
        tie_word_embeddings=False,
        context_length=64,
    )
    stored = tensors()
    assert checkpoint.tensors.keys() == stored.keys()
    for name, values in stored.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.shape, tensor.dtype, tensor.nbytes) == (values.shape, "F32", values.nbytes)
        assert np.array_equal(tensor.dequantize(), values)
        assert not tensor.raw().flags.writeable


@pytest.mark.parametrize(
    ("stored", "name", "raw"), [(torch.float16, "F16", np.float16), (torch.bfloat16, "BF16", np.uint16)]
)
def test_half_precision_is_kept_as_stored(folder, stored, name, raw):
    values = {name: torch.from_numpy(value).to(stored) for name, value in tensors().items()}
    save_torch_file(values, folder / "model.safetensors")
    tensor = open_checkpoint(folder).tensors["model.layers.0.mlp.up_proj.weight"]
    assert tensor.dtype == name
    assert tensor.raw().dtype == raw
    assert np.array_equal(tensor.dequantize(), values["model.layers.0.mlp.up_proj.weight"].float().numpy())


def test_selected_rows_compose(folder):
    tensor = open_checkpoint(folder).tensors["lm_head.weight"]
    chosen = tensor.select_rows(np.array([4, 2, 9])).select_rows(np.array([2, 0]))
    assert chosen.shape == (2, 8)
    assert chosen.nbytes == chosen.raw().nbytes == 64
    assert np.array_equal(chosen.dequantize(), tensor.dequantize()[[9, 4]])


def test_shards(folder):
    stored = tensors()
    names = sorted(stored)
    (folder / "model.safetensors").unlink()
    files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, members in files.items():
        save_file({name: stored[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in files.items() for name in members}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    checkpoint = open_checkpoint(folder)
    for name, values in stored.items():
        assert np.array_equal(checkpoint.tensors[name].dequantize(), values)
    weight_map["lm_head.weight"] = "b.safetensors" if weight_map["lm_head.weight"][0] == "a" else "a.safetensors"
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(
        CheckpointError, match=r"model.safetensors.index.json names the tensor lm_head.weight, but it is missing"
    ):
        open_checkpoint(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json names the shard b.safetensors, but it is missing"):
        open_checkpoint(folder)


def test_tied_embeddings_need_no_head(folder):
    stored = tensors()
    head = stored.pop("lm_head.weight")
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight is missing"):
        open_checkpoint(folder)
    write_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(folder).tensors
    save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(folder).tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architecture GPT2LMHeadModel is not supported \(LlamaForCausalLM, "),
        ({"hidden_act": "mish"}, r"activation 'mish' is not supported \(silu, "),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 24, "layer_types": ["chunked_attention"] * 2},
            r"each of 2 layer_types must be sliding_attention or full_attention, but 'chunked_attention' is among them",
        ),
        ({"hidden_size": None}, r"config.json has no hidden_size"),
        ({"hidden_size": "wide"}, r"it holds a value of the wrong kind"),
        ({"num_attention_heads": 0}, r"it holds a value of the wrong kind"),
        ({"num_key_value_heads": 3}, r"num_heads 4 is no multiple of num_kv_heads 3"),
        ({"head_dim": 3}, r"partial_rotary_factor 1 of head_dim 3 must rotate an even number"),
        ({"rope_scaling": {"rope_type": "axial"}}, r"rope scaling 'axial' is not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5 of head_dim 2 must rotate"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"quant_method is one of gptq, .*, but 'hqq' was given"),
        ({"intermediate_size": 13}, r"gate_proj.weight has shape \[12, 8\], the configuration needs \[13, 8\]"),
        ({"attention_bias": True}, r"tensor model.layers.0.self_attn.q_proj.bias is missing"),
        ({"num_hidden_layers": 1}, r"tensor model.layers.1.\S+ is not one of a supported model"),
        ({"num_hidden_layers": 0}, r"num_layers is 0; it must be at least 1"),
    ],
)
def test_configurations_that_are_refused(folder, changes, message):
    write_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 24}, [24, 24]),
        ({}, [4096, 4096]),
        ({"sliding_window": 24, "use_sliding_window": False}, [None, None]),
        ({"sliding_window": 24, "layer_types": ["full_attention"] * 2}, [None, None]),
        ({"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"]}, [None, 24]),
    ],
)
def test_windows_of_layers_leave_the_context_whole(folder, changes, windows):
    write_config(folder, architectures=["MistralForCausalLM"], **changes)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.max_model_len == 64
    assert isinstance(checkpoint.config, ModelConfig)
    assert [layer.window for layer in checkpoint.config.attention] == windows


def test_a_window_that_the_reference_does_not_read_is_none(folder):
    write_config(folder, sliding_window=24)
    config = open_checkpoint(folder).config
    assert isinstance(config, ModelConfig)
    assert [layer.window for layer in config.attention] == [None, None]


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(theta=5e5, kind="linear", factor=2.0)),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            RopeConfig(theta=1e6),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 32,
                }
            },
            RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_context_length=32),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 0.5, "beta_fast": 16}},
            RopeConfig(
                theta=5e5, kind="yarn", factor=1.0, original_context_length=64, beta_fast=16.0, attention_factor=0.5
            ),
        ),
    ],
)
def test_rope_in_the_forms_of_transformers_4_and_5(folder, changes, rope):
    write_config(folder, **changes)
    assert open_checkpoint(folder).config.rope == rope


def test_text_settings_of_a_folder(folder):
    write_config(folder, eos_token_id=7)
    write_json(folder / "generation_config.json", {"eos_token_id": [5, 7]})
    write_json(folder / "special_tokens_map.json", {"bos_token": "<b>", "unk_token": "<u>"})
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": {"content": "<s>", "lstrip": False},
            "eos_token": "<end>",
            "pad_token": None,
            "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
        },
    )
    write_json(
        folder / "tokenizer.json", {"added_tokens": [{"id": 9, "content": "<end>"}, {"id": 1, "content": "<s>"}]}
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.eos_token_ids == [5, 7, 9]
    assert checkpoint.special_tokens == {"bos_token": "<s>", "unk_token": "<u>", "eos_token": "<end>"}
    assert checkpoint.chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert open_checkpoint(folder).chat_template == "J"


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("tokenizer_config.json", []),
        ("generation_config.json", {"eos_token_id": 3.5}),
        ("tokenizer_config.json", {"chat_template": [5]}),
    ],
)
def test_broken_text_settings(folder, file, value):
    write_json(folder / file, value)
    with pytest.raises(
        CheckpointError, match=r"is not a JSON object|holds a value of the wrong kind|must be a token id"
    ):
        open_checkpoint(folder)


def test_decoders_that_embed_and_see_later_tokens_are_refused(folder):
    write_json(folder / "modules.json", [])
    assert open_checkpoint(folder).kind == "embed"
    write_config(folder, is_causal=False)
    with pytest.raises(CheckpointError, match="decoders of this family whose tokens see those after them"):
        open_checkpoint(folder)


def test_a_folder_without_tokenizer(folder):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        open_checkpoint(folder).tokenizer()


def test_paths_that_are_no_model(folder, tmp_path):
    for path, message in [
        (tmp_path / "nothing", "there is no such file or folder"),
        (folder / "config.json", "is not a GGUF file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin must be converted to safetensors first"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no config.json"):
        open_checkpoint(folder)


def test_every_truncation_of_safetensors_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|missing|broken"):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"lm_head.weight": 3}',
        b'{"lm_head.weight": {"dtype": "F32", "shape": [11, 8], "data_offsets": [0, 4]}}',
        b'{"lm_head.weight": {"dtype": "F32", "shape": [-1, -88], "data_offsets": [0, 352]}}',
        b'{"lm_head.weight": {"dtype": "F32", "shape": "x", "data_offsets": [0, 352]}}',
        b'{"lm_head.weight": {"dtype": "F32", "shape": [11, 8], "data_offsets": [352, 0]}}',
        b"\xff\xfe",
    ],
)
def test_broken_safetensors_headers(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(400))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a"]
TYPES = [3, 3, 3, 1]


def write_gguf(path, architecture="llama", dtype=np.float32, tokens=TOKENS, types=TYPES, more=None, **changes) -> None:
    writer = gguf.GGUFWriter(path, architecture, **(more or {}))
    values = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    } | changes
    for key, value in values.items():
        if value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(1)
    writer.add_bos_token_id(1)
    writer.add_chat_template("C")
    shapes = {"token_embd": (4, 32), "output_norm": (32,)}
    for layer in ("blk.0.", "blk.1."):
        shapes |= {f"{layer}{name}": (32, 32) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
        shapes |= {f"{layer}{name}": (16, 32) for name in ("attn_k", "attn_v")}
        shapes |= {f"{layer}{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        writer.add_tensor(f"{name}.weight", values.astype(dtype if name == "blk.1.attn_q" else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.name == "tiny"
    assert checkpoint.config.tie_word_embeddings
    assert checkpoint.config.vocab_size == 4
    assert checkpoint.eos_token_ids == [0, 1, 2]
    assert checkpoint.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}
    assert checkpoint.chat_template == "C"
    query = checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].dequantize()
    # Rows 0, 2, 4, 6 of a stored head are the first halves of its pairs.
    assert query[:, 0].reshape(4, 8)[1].tolist() == [32.0 * row for row in (8, 10, 12, 14, 9, 11, 13, 15)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "mamba"}, r"GGUF architecture 'mamba' is not supported \(llama, "),
        ({"dtype": np.float64}, r"blk.1.attn_q.weight is stored as F64, which is not supported \(F32, "),
        ({"block_count": None}, r"the key llama.block_count is missing"),
        ({"architecture": "qwen2", "expert_count": 8}, r"architecture qwen2 with experts are not supported"),
        ({"rope.dimension_count": 10}, r"llama.rope.dimension_count must be even and in \[2, 8\], but is 10"),
        ({"feed_forward_length": 33}, r"tensor blk.0.ffn_gate.weight has shape \[32, 32\]"),
        ({"block_count": 3}, r"tensor model.layers.2.input_layernorm.weight is missing"),
    ],
)
def test_gguf_files_that_are_refused(tmp_path, arguments, message):
    write_gguf(tmp_path / "tiny.gguf", **arguments)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_every_truncation_of_gguf_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for length in [*range(4, len(whole), 211), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_opening_and_planning_import_no_torch(folder):
    code = (
        "import sys; from lmserve.model import RunnerOptions, open_checkpoint, plan_memory;"
        f"plan_memory(open_checkpoint({str(folder)!r}), RunnerOptions(device='cpu'));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
