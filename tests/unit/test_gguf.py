"""The GGUF header reader: against the `gguf` package, and against files that lie."""

from __future__ import annotations

import random
import resource
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from lmserve._core import GgufFile
from lmserve.errors import LmserveError

VALUES: dict[str, Any] = {
    "u8": (200, gguf.GGUFValueType.UINT8),
    "i8": (-100, gguf.GGUFValueType.INT8),
    "u16": (60_000, gguf.GGUFValueType.UINT16),
    "i16": (-30_000, gguf.GGUFValueType.INT16),
    "u32": (2**32 - 1, gguf.GGUFValueType.UINT32),
    "i32": (-(2**31), gguf.GGUFValueType.INT32),
    "f32": (0.5, gguf.GGUFValueType.FLOAT32),
    "yes": (True, gguf.GGUFValueType.BOOL),
    "no": (False, gguf.GGUFValueType.BOOL),
    "text": ("héllo \n 你", gguf.GGUFValueType.STRING),
    "empty": ("", gguf.GGUFValueType.STRING),
    "u64": (2**64 - 1, gguf.GGUFValueType.UINT64),
    "i64": (-(2**63), gguf.GGUFValueType.INT64),
    "f64": (1e-300, gguf.GGUFValueType.FLOAT64),
    "numbers": ([1, -2, 3], gguf.GGUFValueType.ARRAY),
    "floats": ([0.25, -1.5], gguf.GGUFValueType.ARRAY),
    "flags": ([True, False], gguf.GGUFValueType.ARRAY),
    "texts": (["a", "", "é"], gguf.GGUFValueType.ARRAY),
    "nested": ([[1, 2], [3]], gguf.GGUFValueType.ARRAY),
    "long": (list(range(1000)), gguf.GGUFValueType.ARRAY),
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with a value of every type and three tensors."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind) in VALUES.items():
        writer.add_key_value(f"test.{key}", value, kind)
    rng = np.random.default_rng(0)
    writer.add_tensor("a", rng.standard_normal((3, 64), dtype=np.float32))
    writer.add_tensor("b", rng.standard_normal(7).astype(np.float16))
    blocks = gguf.quantize(rng.standard_normal((2, 5, 256), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_tensors(ours: GgufFile, oracle: gguf.GGUFReader) -> None:
    assert len(ours.tensors()) == len(oracle.tensors)
    for (name, kind, shape, offset, nbytes), tensor in zip(ours.tensors(), oracle.tensors, strict=True):
        assert (name, kind) == (tensor.name, tensor.tensor_type.name)
        assert shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (ours.data_offset + offset, nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_values_of_every_type_are_read(small: Path) -> None:
    file = GgufFile(small)
    for key, (value, _) in VALUES.items():
        assert file.get(f"test.{key}") == value
    listed = file.metadata()
    assert listed["general.architecture"] == "llama"
    assert {f"test.{key}" for key in VALUES} - set(listed) == {"test.long"}
    assert file.get("no.such.key") is None


def test_tensors_are_where_the_gguf_package_finds_them(small: Path) -> None:
    same_tensors(GgufFile(small), gguf.GGUFReader(small))


def test_a_real_file_is_read_as_the_gguf_package_reads_it(smollm2_gguf: Path) -> None:
    ours, oracle = GgufFile(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    same_tensors(ours, oracle)
    keys = [key for key in oracle.fields if not key.startswith("GGUF.")]
    assert len(keys) == 33
    for key in keys:
        assert ours.get(key) == oracle.fields[key].contents()


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(keys: bytes = b"", num_keys: int = 0, tensors: bytes = b"", num_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + keys + tensors


def tensor(name: bytes, shape: list[int], kind: int, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def array(kind: int, length: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + items


LIES = {
    "empty": b"",
    "other format": b"PK\3\4" + bytes(100),
    "version 1": header(version=1),
    "version 4": header(version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many keys": header(num_keys=2**63),
    "many tensors": header(num_tensors=2**63),
    "long key": header(struct.pack("<Q", 2**62), 1),
    "key overflows": header(struct.pack("<Q", 2**64 - 1), 1),
    "key is no UTF-8": header(key(b"\xff", 7, b"\1"), 1),
    "text is no UTF-8": header(key(b"a", 8, string(b"\xc3")), 1),
    "long array": header(key(b"a", 9, array(4, 2**61)), 1),
    "long array of texts": header(key(b"a", 9, array(8, 2**40)), 1),
    "long array of arrays": header(key(b"a", 9, array(9, 2**40)), 1),
    "deep array": header(key(b"a", 9, array(9, 1) * 10_000), 1),
    "unknown value type": header(key(b"a", 13, b""), 1),
    "unknown item type": header(key(b"a", 9, array(77, 0)), 1),
    "flag of 2": header(key(b"a", 7, b"\2"), 1),
    "key twice": header(key(b"a", 7, b"\1") * 2, 2),
    "odd alignment": header(key(b"general.alignment", 4, struct.pack("<I", 3)), 1),
    "no alignment": header(key(b"general.alignment", 4, struct.pack("<I", 0)), 1),
    "tensor twice": header(tensors=tensor(b"a", [0], 0) * 2, num_tensors=2),
    "unknown tensor type": header(tensors=tensor(b"a", [1], 5), num_tensors=1) + bytes(99),
    "five dimensions": header(tensors=tensor(b"a", [1] * 5, 0), num_tensors=1) + bytes(99),
    "many dimensions": header(tensors=string(b"a") + struct.pack("<I", 2**32 - 1), num_tensors=1) + bytes(99),
    "size overflows": header(tensors=tensor(b"a", [2**40, 2**40], 0), num_tensors=1) + bytes(99),
    "half a block": header(tensors=tensor(b"a", [33], 8), num_tensors=1) + bytes(99),
    "behind the end": header(tensors=tensor(b"a", [64], 0), num_tensors=1) + bytes(99),
    "far behind the end": header(tensors=tensor(b"a", [1], 0, 2**64 - 32), num_tensors=1) + bytes(99),
    "not aligned": header(tensors=tensor(b"a", [1], 0, 4), num_tensors=1) + bytes(999),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie_are_refused(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(LIES[lie])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LmserveError, match=r"a\.gguf") as caught:
        GgufFile(path)
    assert caught.value.status == 400
    # KiB: what a file states of itself is never allocated.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_a_file_that_ends_early_is_refused_wherever_it_ends(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    path = tmp_path / "cut.gguf"
    for end in range(0, len(whole) - 32, 37):
        path.write_bytes(whole[:end])
        with pytest.raises(LmserveError):
            GgufFile(path)


def test_flipped_bytes_are_refused_or_read_but_never_crash(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    end = GgufFile(small).data_offset
    rng = random.Random(1)
    path = tmp_path / "flipped.gguf"
    refused = []
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(end)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        path.write_bytes(data)
        try:
            GgufFile(path).metadata()
        except LmserveError as error:
            refused.append(error.status)
    assert 50 < len(refused) < 600
    assert set(refused) == {400}


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(LmserveError, match=path.name):
            GgufFile(path)


def test_blocks_have_the_sizes_of_the_gguf_package(tmp_path: Path) -> None:
    for kind, (elements, nbytes) in GGML_QUANT_SIZES.items():
        path = tmp_path / "a.gguf"
        path.write_bytes(header(tensors=tensor(b"a", [elements * 3, 2], kind), num_tensors=1) + bytes(4096))
        assert GgufFile(path).tensors() == [("a", kind.name, (2, elements * 3), 0, nbytes * 6)]
