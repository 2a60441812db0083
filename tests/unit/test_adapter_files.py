"""Adapters' files: what is read of them, and which are refused."""

import json

import numpy as np
import pytest
from lmserve.model.adapter_files import read_adapter
from lmserve.model.errors import AdapterError
from safetensors.numpy import save_file

Q, V = "base_model.model.model.layers.3.self_attn.q_proj", "base_model.model.model.layers.3.self_attn.v_proj"


def write(folder, tensors=None, **config):
    """An adapter of q_proj [6, 5] and v_proj [4, 5]."""
    folder.mkdir(exist_ok=True)
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | config
    (folder / "adapter_config.json").write_text(json.dumps(given))
    generator = np.random.default_rng(1)
    shapes = {f"{Q}.lora_A.weight": (2, 5), f"{Q}.lora_B.weight": (6, 2)}
    shapes |= {f"{V}.lora_A.default.weight": (2, 5), f"{V}.lora_B.default.weight": (4, 2)}
    own = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    own |= tensors or {}
    save_file(
        {name: tensor for name, tensor in own.items() if tensor is not None}, folder / "adapter_model.safetensors"
    )
    return own


def product(adapter, module):
    own = adapter.modules[module]
    return own.up @ own.down


def test_matrices_are_scaled_by_alpha_over_rank(tmp_path):
    own = write(tmp_path)
    adapter = read_adapter(tmp_path, max_rank=2)
    assert list(adapter.modules) == ["layers.3.self_attn.q_proj", "layers.3.self_attn.v_proj"]
    for name, module, suffix in ((Q, "layers.3.self_attn.q_proj", ""), (V, "layers.3.self_attn.v_proj", ".default")):
        expected = 1.5 * own[f"{name}.lora_B{suffix}.weight"] @ own[f"{name}.lora_A{suffix}.weight"]
        assert np.allclose(product(adapter, module), expected)
    assert (adapter.rank, adapter.size) == (2, 2 * 5 + 6 * 2 + 2 * 5 + 4 * 2)
    write(tmp_path, use_rslora=True)
    rooted = read_adapter(tmp_path, max_rank=2)
    assert np.allclose(
        product(rooted, "layers.3.self_attn.q_proj"), product(adapter, "layers.3.self_attn.q_proj") * 2**0.5
    )
    assert rooted.digest != adapter.digest


def test_patterns_give_modules_their_own_rank_and_alpha(tmp_path):
    wide = {f"{V}.lora_A.default.weight": np.ones((4, 5), np.float32)}
    wide |= {f"{V}.lora_B.default.weight": np.ones((4, 4), np.float32)}
    write(tmp_path, wide, rank_pattern={"v_proj": 4}, alpha_pattern={r"layers\.3\.self_attn\.v_proj": 8, "proj": 1})
    adapter = read_adapter(tmp_path, max_rank=4)
    assert np.allclose(product(adapter, "layers.3.self_attn.v_proj"), 2.0 * 4)
    # A pattern names the end of a path after a dot, not any end.
    own = write(tmp_path, alpha_pattern={"proj": 1, "^model": 1})
    expected = 1.5 * own[f"{Q}.lora_B.weight"] @ own[f"{Q}.lora_A.weight"]
    assert np.allclose(product(read_adapter(tmp_path, max_rank=2), "layers.3.self_attn.q_proj"), expected)


def test_the_digest_is_of_what_is_computed_and_not_of_names(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, base_model_name_or_path=name)
    write(tmp_path / "three", lora_alpha=4)
    digests = [read_adapter(tmp_path / name, max_rank=2).digest for name in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, but is 'IA3'"),
        ({"use_dora": True}, "use_dora is True, which is not supported; it must be False"),
        ({"bias": "all"}, "bias is 'all', which is not supported; it must be 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], which is not supported"),
        ({"r": 0}, "r must be a whole number from 1 on, but is 0"),
        ({"r": True}, "r must be a whole number from 1 on, but is True"),
        ({"lora_alpha": None}, "lora_alpha must be a number above 0, but is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number above 0, but is nan"),
        ({"rank_pattern": ["v_proj"]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern has '(', which is no pattern"),
        ({"alpha_pattern": {"x": "4"}}, "alpha_pattern['x'] must be a number above 0, but is '4'"),
        ({"r": 4}, "q_proj.lora_A.weight has shape [2, 5], but adapter_config.json needs [4, 5]"),
        ({"r": 9}, "has rank 9; the limit is 8 (max_lora_rank)"),
    ],
)
def test_other_settings_are_refused(tmp_path, config, said):
    write(tmp_path, **config)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path, max_rank=8)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{Q}.lora_B.weight": None}, "lora_B of model.layers.3.self_attn.q_proj is missing"),
        ({f"{Q}.lora_magnitude_vector": np.ones(6, np.float32)}, "lora_magnitude_vector is not supported"),
        ({"base_model.model.lm_head.weight": np.ones((2, 2), np.float32)}, "lm_head.weight is not supported"),
        ({f"{Q}.lora_A.default.weight": np.ones((2, 5), np.float32)}, "is there twice, with and without .default"),
        ({f"{Q}.lora_A.weight": np.ones((2, 5), np.int32)}, "must be a matrix of F32, F16, BF16, but is I32 [2, 5]"),
        ({f"{Q}.lora_A.weight": np.ones(2, np.float32)}, "must be a matrix of F32, F16, BF16, but is F32 [2]"),
        ({f"{Q}.lora_A.weight": np.full((2, 5), np.inf, np.float32)}, "has a value that is not finite"),
        ({f"{Q}.lora_B.weight": np.ones((6, 3), np.float32)}, "has shape [6, 3], but adapter_config.json needs [6, 2]"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, said):
    write(tmp_path, tensors)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path, max_rank=8)
    assert said in str(caught.value)


def test_damaged_and_missing_files_are_refused(tmp_path):
    def refused() -> str:
        with pytest.raises(AdapterError) as caught:
            read_adapter(tmp_path / "adapter", max_rank=8)
        return str(caught.value)

    assert "is not an adapter's folder: it has no adapter_config.json" in refused()
    write(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is truncated" in refused()
    weights.unlink()
    assert "has no adapter_model.safetensors" in refused()
    (tmp_path / "adapter" / "adapter_config.json").write_text("[1]")
    assert "must hold an object, but holds list" in refused()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "is not JSON" in refused()
