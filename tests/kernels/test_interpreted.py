"""Starts the other tests of this folder with Triton's interpreter, and compiles kernels for GPUs that are not here."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("torch came without triton", allow_module_level=True)

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="these are the tests that it starts")
@pytest.mark.parametrize("file", sorted(path.name for path in Path(__file__).parent.glob("test_packed_*.py")))
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "product"), [(80, "mma.sync"), (90, "wgmma")])
@pytest.mark.parametrize(("name", "tile", "split"), [("Q4_K", 0, 4), ("Q6_K", 2, 1), ("IQ4_XS", 1, 1)])
def test_kernels_compile_for_gpus(name, tile, split, capability, product, tmp_path, monkeypatch):
    """To machine code, with products by tensor cores; whether it computes the right thing only a GPU can tell."""
    import triton
    from lmserve.model import packed_kernel
    from lmserve.model.packed_formats import FORMATS
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    form, size = FORMATS[name], packed_kernel.TILES[tile]
    scale = "*fp16" if form.scale_bytes == 2 else "*u8" if form.mins or form.scale == "e8m0" else "*i8"
    pointers = {
        "x": "*bf16",
        "out": "*bf16" if split == 1 else "*fp32",
        "low": "*u8",
        "high": "*i32" if form.high else "*u8",
        "scales": scale,
        "mins": scale if form.mins else "*u8",
        "factors": "*fp16" if form.factors else "*u8",
    }
    whole = ("outputs", "inputs", "x_stride", "out_stride")
    given = packed_kernel.constants(form) | {
        "ROWS": size.rows,
        "OUTPUTS": size.outputs,
        "CHUNKS": size.chunks,
        "SPLIT": split,
    }
    kernel = packed_kernel.packed_matmul
    source = ASTSource(
        kernel,
        pointers | dict.fromkeys(("rows", *whole), "i32") | {"factor": "fp32"} | dict.fromkeys(given, "constexpr"),
        constexprs={(kernel.arg_names.index(key),): value for key, value in given.items()},
        attrs={(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in (*pointers, *whole)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": size.warps})
    assert product in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
    # What the smallest of these GPUs lets a program have.
    assert compiled.metadata.shared <= 99 << 10


@pytest.mark.skipif("DRY_RUNS" not in os.environ, reason="make test-gpu-dry runs it: it takes half a minute")
def test_a_dry_run_of_the_tests_for_gpus():
    environment = os.environ | {"DEVICE": "cpu", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b8 passed, \d+ skipped", done.stdout)


@pytest.mark.skipif("DRY_RUNS" not in os.environ, reason="make test-gpu-dry runs it: it takes half a minute")
def test_a_dry_run_of_the_benchmark_for_gpus():
    """With a stand-in for vLLM, which takes the calls that vLLM documents."""
    standins = Path(__file__).with_name("standins")
    environment = os.environ | {"PYTHONPATH": str(standins), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "| | packed | floats | transformers | vLLM |" in done.stdout
    lines = [line[2:-2].split(" | ", 1) for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = {point: cells for point, cells in lines if point != "|"}
    for point in ("prompt of 70", "decode, 1 clients", "decode, 2 clients", "loaded in s"):
        assert re.fullmatch(r"[\d.,]+( \| [\d.,]+){3}", rows[point]), done.stdout


def test_the_benchmark_for_gpus_begins_nothing_after_its_time(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    table = gpu.Table(gpu.DRY, deadline=0)
    table.add("packed", "loaded in s", 1.5)
    table.measure("packed", table.prompt, 70, lambda: 1 / 0)
    lines = list(table.lines())
    assert lines[0] == "| | packed |"
    assert "| loaded in s | 1.50 |" in lines
    assert f"| {table.prompt} |  |" in lines
    assert lines[-1] == f"No time was left for packed: {table.prompt}."
