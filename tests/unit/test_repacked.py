"""Types of one to three bits as blocks that the kernels know: bit for bit the numbers of the gguf package."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from lmserve.model.cpu_ops import _stored
from lmserve.model.repacked import DIVISORS
from lmserve.model.tensors import REPACKED_TYPES, StoredTensor

ROWS, COLUMNS = 7, 512


def matrix(kind: str, factor: float) -> StoredTensor:
    """Random blocks with that half-precision factor, of either sign."""
    size = gguf.GGML_QUANT_SIZES[Type[kind]][1]
    generator = np.random.default_rng(3)
    blocks = generator.integers(0, 256, (ROWS * COLUMNS // 256, size), np.uint8)
    factors = (factor * generator.choice([-1, 1], len(blocks))).astype(np.float16).view(np.uint16)
    if kind == "IQ1_M":
        words = blocks[:, 48:].copy().view(np.uint16)
        words &= 0x0FFF
        words |= (factors[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15) << 12
        blocks[:, 48:] = words.view(np.uint8)
    else:
        blocks[:, :2] = factors[:, None].view(np.uint8)
    return StoredTensor("x", (ROWS, COLUMNS), kind, blocks.reshape(ROWS, -1))


def of_indices(blocks: np.ndarray) -> np.ndarray:
    """What blocks of IQ2 stand for."""
    pairs = blocks[:, :128].reshape(-1, 8, 1, 16) >> np.array([0, 4], np.uint8)[:, None] & 15
    integers = np.array([-43, -25, -8, 8, 25, 43], np.float32)[pairs.reshape(-1, 16, 16)]
    factors = blocks[:, 144:].copy().view(np.float16).astype(np.float32)
    return integers * (factors * blocks[:, 128:144])[:, :, None]


@pytest.mark.parametrize("factor", [0.0137, 1.0, 0.0])
@pytest.mark.parametrize("kind", list(DIVISORS))
def test_nothing_is_lost(kind, factor):
    source = matrix(kind, factor)
    stored, data = _stored(source, None)
    size = {"Q6_K": 210, "IQ2": 146}[stored]
    assert (stored, data.size) == (REPACKED_TYPES[kind], ROWS * COLUMNS // 256 * size)
    if stored == "IQ2":
        values = of_indices(data.reshape(-1, size)).reshape(ROWS, -1)
    else:
        values = gguf.dequantize(data.reshape(ROWS, -1), Type.Q6_K)
    expected = source.dequantize()
    assert np.array_equal(values, expected)
    assert (np.abs(expected).max() > 0) == (factor > 0)


@pytest.mark.parametrize("kind", ["IQ3_XXS", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"])
def test_a_factor_that_half_precision_cannot_divide_leaves_floats(kind):
    source = matrix(kind, 2.0**-24)
    stored, data = _stored(source, None)
    assert stored == "F32"
    assert np.array_equal(data.view(np.float32).reshape(ROWS, COLUMNS), source.dequantize())
