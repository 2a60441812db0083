"""Products with packed weights equal those with the weights that the gguf package makes floats of."""

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
from gguf import GGMLQuantizationType as Type
from lmserve.model import packed_check, packed_kernel, torch_packed
from lmserve.model.packed_formats import FORMATS
from lmserve.model.packed_kernel import TILES
from lmserve.model.tensors import ScaledTensor, StoredTensor

CPU = torch.device("cpu")
OUTPUTS = 70
TYPES = list(FORMATS)


def stored(dtype: str, rows: int = OUTPUTS, seed: int = 0) -> StoredTensor:
    """A matrix of which no tile has a whole number, neither of its outputs nor of its inputs."""
    inputs = 768 if FORMATS[dtype].block == 256 else 288
    values = np.random.default_rng(seed).standard_normal((rows, inputs), np.float32)
    return StoredTensor("w", (rows, inputs), dtype, tiny_gguf.quantize(values, Type[dtype]))


def product(matrix, x, **given):
    out = torch.full((len(x), matrix.outputs), torch.nan, dtype=x.dtype)
    matrix.multiply(x, out, **given)
    return out


@pytest.mark.parametrize("dtype", TYPES)
def test_planes_hold_what_blocks_do(dtype, monkeypatch):
    monkeypatch.setattr("lmserve.model.packed_planes.AT_ONCE", 20 * 768)
    source = stored(dtype)
    matrix = torch_packed.pack(source, CPU)
    assert matrix.nbytes == FORMATS[dtype].nbytes(*source.shape)
    found = matrix.rows(torch.arange(OUTPUTS), torch.float32).numpy()
    assert np.abs(found).max() > 0
    assert np.array_equal(found, source.dequantize())
    chosen = torch.tensor([5, 69, 5])
    assert np.array_equal(matrix.rows(chosen, torch.float32).numpy(), source.dequantize()[chosen])


@pytest.mark.parametrize(("tile", "rows", "split"), [(0, 3, 1), (0, 16, 4), (1, 65, 1), (2, 5, 1)])
@pytest.mark.parametrize("dtype", TYPES)
def test_products_equal_those_of_floats(dtype, tile, rows, split):
    source = stored(dtype)
    matrix = torch_packed.pack(source, CPU)
    x = torch.randn(rows, source.shape[1], generator=torch.Generator().manual_seed(1))
    expected = x @ torch.from_numpy(source.dequantize()).T
    found = product(matrix, x, tile=TILES[tile], split=split)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["Q4_K", "Q6_K", "Q8_0"])
def test_weights_are_rounded_to_the_type_of_activations(dtype):
    source = stored(dtype)
    x = torch.randn(4, source.shape[1]).half()
    expected = x.float() @ torch.from_numpy(source.dequantize()).half().float().T
    found = product(torch_packed.pack(source, CPU), x)
    assert (found.float() - expected).abs().max() < 2e-3 * expected.abs().max()


def test_a_number_that_is_none_stays_in_its_row():
    source = stored("Q5_K")
    x = torch.randn(4, source.shape[1])
    x[2, 700] = torch.nan
    found = product(torch_packed.pack(source, CPU), x)
    assert found.isnan().all(1).tolist() == [False, False, True, False]
    assert not found[[0, 1, 3]].isnan().any()


def test_a_layer_of_several_types_with_a_bias():
    """Q4_K_M has q and k in other types than v; the last has no format."""
    floats = np.random.default_rng(9).standard_normal((30, 768), np.float32)
    sources = [stored("Q4_K"), stored("Q4_K", 9, 1), stored("Q6_K"), ScaledTensor(stored("Q4_K", 8, 2), 0.5)]
    sources.append(StoredTensor("f", floats.shape, "F32", floats))
    bias = torch.randn(sum(source.shape[0] for source in sources))
    layer = torch_packed.load(
        sources, bias, lambda source: torch.from_numpy(source.dequantize()), device=CPU, dtype=torch.float32
    )
    assert [getattr(part, "outputs", None) for part in layer.matrices] == [79, 70, 8, None]
    x = torch.randn(5, 2 * 768)[:, 1::2]
    whole = torch.from_numpy(np.concatenate([source.dequantize() for source in sources]))
    assert torch.allclose(layer.linear(x), x @ whole.T + bias, atol=1e-3)
    assert layer.linear(x[:0]).shape == (0, len(bias))


def test_a_layer_that_no_format_has_is_none():
    source = StoredTensor("f", (2, 4), "F32", np.ones((2, 4), np.float32))
    assert torch_packed.load([source], None, lambda _: None, device=CPU, dtype=torch.float32) is None


@pytest.mark.parametrize(
    ("tile", "rows", "outputs", "inputs", "split"),
    [
        (0, 1, 4096, 4096, 8),
        (0, 1, 14336, 4096, 2),
        (0, 1, 150000, 4096, 1),
        (2, 8192, 4096, 4096, 1),
        (0, 1, 64, 256, 1),
    ],
)
def test_few_outputs_are_split_among_more_programs(tile, rows, outputs, inputs, split):
    assert packed_kernel.split_of(TILES[tile], rows, outputs, inputs, 132) == split


def test_the_smallest_tile_with_all_rows_is_taken():
    rows = [packed_kernel.tile_of(n, torch.device("cuda")).rows for n in (1, 16, 17, 64, 65, 9999)]
    assert rows == [16, 16, 64, 64, 128, 128]


@pytest.mark.parametrize("dtype", ["Q4_K", "Q6_K", "MXFP4"])
def test_the_check_at_start_finds_a_kernel_that_is_wrong(dtype, monkeypatch):
    form = FORMATS[dtype]
    assert packed_check.fault([form], CPU, torch.float32) is None
    right = torch_packed.multiply

    def wrong(x, out, *others, **given):
        right(x, out, *others, **given)
        out[-1, -1] += 1 + out.abs().max()

    monkeypatch.setattr(torch_packed, "multiply", wrong)
    assert "is off by" in packed_check.fault([form], CPU, torch.float32)
    monkeypatch.setattr(torch_packed, "multiply", lambda *_, **__: None)
    assert "is off by nan" in packed_check.fault([form], CPU, torch.float32)
    monkeypatch.setattr(torch_packed, "multiply", lambda *_, **__: 1 / 0)
    assert packed_check.fault([form], CPU, torch.float32) == "ZeroDivisionError: division by zero"


def test_sizes_are_those_of_files_but_for_scales_of_six_bits():
    for dtype, form in FORMATS.items():
        elements, size = gguf.GGML_QUANT_SIZES[Type[dtype]]
        bits = {"Q4_K": 1 / 8, "Q5_K": 1 / 8, "Q3_K": 1 / 8, "IQ4_XS": 1 / 16, "Q2_K": 1 / 2}.get(dtype, 0)
        assert form.nbytes(2, 1024) * 8 / 2048 == size * 8 / elements + bits
