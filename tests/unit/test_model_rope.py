"""Rope: what checkpoints say of it and the tables made of that, against transformers' own functions."""

from typing import Any

import numpy as np
import pytest
from lmserve.model import CheckpointError
from lmserve.model.config import RopeConfig
from lmserve.model.rope import head_order, inverse_frequencies, rope_tables
from lmserve.model.rope_config import context_of, gguf_rope, rope_of
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HEAD_DIM = 64
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
SHORT, LONG = [1.0 + i / 32 for i in range(32)], [2.0 + i for i in range(32)]


def reference(kind: str, parameters: dict[str, Any], length: int) -> tuple[np.ndarray, float]:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    return frequencies.numpy(), scale


def read(kind: str, parameters: dict[str, Any], **more: Any) -> RopeConfig:
    raw = {"max_position_embeddings": 4096, "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}
    return rope_of(raw | more, head_dim=HEAD_DIM, context_length=4096)


def test_plain_frequencies_are_powers_of_theta():
    frequencies = inverse_frequencies(RopeConfig(theta=100.0), 4)
    np.testing.assert_allclose(frequencies, [1.0, 0.1])


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("linear", {"factor": 4.0}),
        ("linear", {"factor": 4.0, "partial_rotary_factor": 0.5}),
        ("dynamic", {"factor": 4.0}),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        ),
        ("yarn", YARN),
        ("yarn", YARN | {"factor": None}),
        ("yarn", YARN | {"attention_factor": 0.9, "beta_fast": 16, "beta_slow": 2}),
        ("yarn", YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}),
        ("yarn", YARN | {"mscale": 1.0}),
        ("yarn", YARN | {"truncate": False}),
        ("yarn", YARN | {"partial_rotary_factor": 0.5}),
        ("longrope", {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 1024}),
        (
            "longrope",
            {
                "short_factor": SHORT[:16],
                "long_factor": LONG[:16],
                "original_max_position_embeddings": 1024,
                "partial_rotary_factor": 0.5,
                "attention_factor": 1.19,
            },
        ),
        ("proportional", {"partial_rotary_factor": 0.25}),
        ("proportional", {"partial_rotary_factor": 0.25, "factor": 2.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) if len(value) < 4 else "all",
)
@pytest.mark.parametrize("length", [32, 2048])
def test_frequencies_and_factors_equal_transformers(kind: str, parameters: dict[str, Any], length: int):
    frequencies, scale = reference(kind, parameters, length)
    rope = read(kind, parameters)
    found = inverse_frequencies(rope, HEAD_DIM, length)
    np.testing.assert_allclose(found[: len(frequencies)], frequencies, rtol=1e-5)
    assert not found[len(frequencies) :].any()
    cos, sin = rope_tables(rope, HEAD_DIM, length)
    angles = np.arange(length)[:, None] * frequencies[None, :].astype(np.float64)
    # transformers computes angles in single precision.
    np.testing.assert_allclose(cos[:, : len(frequencies)], np.cos(angles) * scale, atol=2e-3)
    np.testing.assert_allclose(sin[:, : len(frequencies)], np.sin(angles) * scale, atol=2e-3)
    assert (cos[:, len(frequencies) :] == 1).all()


def test_layers_have_their_own_parameters():
    by_type = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    raw = {"rope_parameters": by_type, "max_position_embeddings": 4096}
    full, sliding = (
        rope_of(raw, head_dim=64, context_length=4096, layer_type=kind)
        for kind in ("full_attention", "sliding_attention")
    )
    assert full == RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert sliding == RopeConfig(theta=1e4)


def test_phi3_has_its_first_length_beside_the_parameters():
    parameters = {"short_factor": SHORT, "long_factor": LONG}
    rope = read("longrope", parameters, original_max_position_embeddings=1024)
    assert rope.original_context_length == 1024
    assert rope.attention_factor == pytest.approx((1 + np.log(4) / np.log(1024)) ** 0.5)


def test_yarn_makes_the_context_longer():
    raw = {"max_position_embeddings": 32768}
    qwen = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    assert context_of(raw | qwen) == 131072
    assert context_of(raw | {"rope_scaling": {"type": "linear", "factor": 4.0}}) == 32768
    # Some say the longer length already.
    gpt_oss = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    assert context_of({"max_position_embeddings": 131072, "rope_parameters": gpt_oss}) == 131072


@pytest.mark.parametrize(
    ("kind", "parameters", "says"),
    [
        ("axial", {}, "rope scaling 'axial' is not supported"),
        ("dynamic", {"factor": 4.0, "alpha": 1000.0}, "alpha of rope_parameters is not supported"),
        ("linear", {}, "no factor of rope scaling linear"),
        ("linear", {"factor": "big"}, "factor of the rotary embedding must be a positive number, but 'big' was given"),
        ("linear", {"factor": float("nan")}, "must be a positive number, but nan was given"),
        ("llama3", {"factor": 8.0}, "no low_freq_factor"),
        ("longrope", {"short_factor": [1.0], "long_factor": LONG}, "for each of 32 rotated pairs, but 1 were given"),
        ("default", {"partial_rotary_factor": 2.0}, "partial_rotary_factor 2 of head_dim 64 must rotate"),
    ],
)
def test_what_is_not_known_is_named(kind: str, parameters: dict[str, Any], says: str):
    with pytest.raises(CheckpointError, match=says):
        read(kind, parameters)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 4])
def test_the_order_of_a_head_puts_pairs_half_a_head_apart(interleaved: bool, rotary_dim: int):
    head_dim, position = 8, 5
    rope = RopeConfig(rotary_dim=rotary_dim, interleaved=interleaved)
    query, key = np.random.default_rng(0).normal(size=(2, head_dim))
    rotated = rotary_dim or head_dim

    def as_the_family_does(head: np.ndarray) -> np.ndarray:
        angles = position * 10000.0 ** -(np.arange(0, rotated, 2) / rotated)
        turns = np.exp(1j * angles)
        out = head.copy()
        if interleaved:
            turned = (head[:rotated:2] + 1j * head[1:rotated:2]) * turns
            out[:rotated:2], out[1:rotated:2] = turned.real, turned.imag
        else:
            turned = (head[: rotated // 2] + 1j * head[rotated // 2 : rotated]) * turns
            out[:rotated] = np.concatenate((turned.real, turned.imag))
        return out

    order = head_order(rope, head_dim)
    order = np.arange(head_dim) if order is None else order
    cos, sin = (table[position] for table in rope_tables(rope, head_dim, position + 1))

    def as_ops_do(head: np.ndarray) -> np.ndarray:
        low, high = head[order].reshape(2, -1)
        return np.concatenate((low * cos - high * sin, high * cos + low * sin))

    np.testing.assert_allclose(as_ops_do(query), as_the_family_does(query)[order], atol=1e-6)
    assert as_ops_do(query) @ key[order] == pytest.approx(as_the_family_does(query) @ key, abs=1e-6)


def gguf(keys: dict[str, Any], **factors: list[float]) -> RopeConfig:
    metadata = {f"llama.rope.{key}": value for key, value in keys.items()}
    return gguf_rope(metadata, "llama", head_dim=HEAD_DIM, context_length=4096, factors=factors)


def test_gguf_keys_are_read_as_llama_cpp_reads_them():
    assert gguf({}) == RopeConfig()
    assert gguf({"scale_linear": 4.0}) == gguf({"scaling.factor": 4.0}) == RopeConfig(kind="linear", factor=4.0)
    assert gguf({"scaling.type": "linear", "scale_linear": 0.0}) == RopeConfig()
    assert gguf({"scaling.type": "none", "scaling.factor": 4.0}) == RopeConfig()
    assert gguf({"dimension_count": 32, "freq_base": 5e5}) == RopeConfig(theta=5e5, rotary_dim=32)
    assert gguf({}, rope_freqs=SHORT).frequency_factors == tuple(SHORT)
    yarn = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 1024}
    attention = 0.1 * np.log(4.0) + 1
    assert gguf(yarn) == read("yarn", YARN)
    assert gguf(yarn | {"scaling.attn_factor": 0.5}).attention_factor == pytest.approx(0.5 * attention)
    multiplied = gguf(yarn | {"scaling.yarn_log_multiplier": 0.5})
    assert multiplied.attention_factor == pytest.approx(attention / (0.05 * np.log(4.0) + 1))
    # What is interpolated alone has the factor of its own key.
    plain = gguf(yarn | {"scaling.yarn_ext_factor": 0.0, "scaling.yarn_attn_factor": 0.7})
    assert (plain.kind, plain.factor, plain.attention_factor) == ("linear", 4.0, 0.7)
    long = gguf(
        {"scaling.type": "longrope", "scaling.original_context_length": 1024, "scaling.attn_factor": 1.19},
        rope_factors_short=SHORT,
        rope_factors_long=LONG,
    )
    assert long == read(
        "longrope",
        {
            "short_factor": SHORT,
            "long_factor": LONG,
            "attention_factor": 1.19,
            "original_max_position_embeddings": 1024,
        },
    )


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"scaling.type": "su"}, "rope scaling 'su' is not supported"),
        ({"scaling.alpha": 1000.0}, "llama.rope.scaling.alpha is not supported"),
        ({"scaling.type": "yarn", "scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor must be 0 or 1, but 0.5 was given"),
        ({"dimension_count": 65}, r"dimension_count must be even and in \[2, 64\], but is 65"),
        ({"freq_base": 0.0}, "freq_base of the rotary embedding must be a positive number, but 0.0 was given"),
    ],
)
def test_gguf_keys_that_are_not_known_are_named(keys: dict[str, Any], says: str):
    with pytest.raises(CheckpointError, match=says):
        gguf(keys)


def test_unknown_kinds_have_no_tables():
    with pytest.raises(ValueError, match="rope scaling kind 'dynamic'"):
        inverse_frequencies(RopeConfig(kind="dynamic"), HEAD_DIM)
