"""Rope tables against transformers' own rope initialisation."""

import numpy as np
import pytest
from lmserve.model.config import RopeConfig
from lmserve.model.rope import inverse_frequencies, rope_tables
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HEAD_DIM = 64


def reference(kind: str, **parameters):
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return frequencies.numpy(), scale


def test_plain_frequencies_are_powers_of_theta():
    frequencies = inverse_frequencies(RopeConfig(theta=100.0), 4)
    np.testing.assert_allclose(frequencies, [1.0, 0.1])


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (RopeConfig(kind="linear", factor=4.0), {"factor": 4.0}),
        (
            RopeConfig(kind="llama3", factor=8.0, original_context_length=1024),
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        ),
        (
            RopeConfig(kind="yarn", factor=4.0, original_context_length=1024, attention_factor=0.1 * np.log(4.0) + 1),
            {"factor": 4.0, "original_max_position_embeddings": 1024},
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, RopeConfig) else "",
)
def test_scaled_frequencies_equal_transformers(rope: RopeConfig, parameters):
    frequencies, scale = reference(rope.kind, **parameters)
    np.testing.assert_allclose(inverse_frequencies(rope, HEAD_DIM), frequencies, rtol=1e-5)
    cos, sin = rope_tables(rope, HEAD_DIM, 32)
    angles = np.arange(32)[:, None] * frequencies[None, :]
    np.testing.assert_allclose(cos, np.cos(angles) * scale, atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles) * scale, atol=1e-5)


def test_factors_divide_each_frequency():
    rope = RopeConfig(kind="factors", frequency_factors=(1.0, 2.0))
    np.testing.assert_allclose(
        inverse_frequencies(rope, 4), inverse_frequencies(RopeConfig(), 4) / np.array([1.0, 2.0])
    )


def test_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="rope scaling kind 'dynamic'"):
        inverse_frequencies(RopeConfig(kind="dynamic"), HEAD_DIM)
