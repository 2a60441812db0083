"""`lmserve plan`: the numbers it prints, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lmserve.cli import main
from lmserve.model import open_checkpoint, options, weights_cache
from lmserve.model.families import qwen3
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 3000,
}
KV_BYTES = 2 * 3 * 2 * 16 * 4  # K and V, layers, heads, values, fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = qwen3.FAMILY.expected_tensors(qwen3.FAMILY.hf_config(CONFIG))
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def test_it_says_how_many_sessions_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 10_000 * KV_BYTES  # 625 blocks of 16 tokens
    arguments = [
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--ops",
        "torch",
        "--kv-memory",
        str(size),
        "--served-model-name",
        "it",
    ]
    assert main(["plan", str(folder), *arguments]) == 0
    model, device, sampling, cache, sessions = capsys.readouterr().out.splitlines()
    assert model == f"Model     it, from {folder}"
    assert device.startswith("Device    cpu, fp32, weights ")
    assert device.endswith("context 3000 tokens")
    assert sampling == "Sampling  defaults for requests that set none: temperature 1"
    assert cache == "KV cache  625 blocks of 16 tokens: 10000 tokens, 768 B a token, 7.3 MiB in all"
    # 32, 128 and 188 blocks each.
    assert sessions == "Sessions  19 of 512 tokens, or 4 of 2048 tokens, or 3 of 3000 tokens fit into the KV cache"


def test_it_counts_adapters(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rank in (("first", 2), ("second", 8)):
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        matrices = {
            f"{module}.lora_A.weight": np.ones((rank, 32), np.float32),
            f"{module}.lora_B.weight": np.ones((64, rank), np.float32),
        }
        save_file(matrices, tmp_path / name / "adapter_model.safetensors")
    given = [f"--lora={name}={tmp_path / name}" for name in ("first", "second")]
    for ops, dtype, size in (("cpu", "fp32", "3.8 KiB"), ("torch", "bf16", "1.9 KiB")):
        assert main(["plan", str(folder), "--device", "cpu", "--ops", ops, "--dtype", dtype, *given]) == 0
        (adapters,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Adapters"))
        assert adapters == f"Adapters  2, of rank 8 at most, {size} in all: first, second"
    # The KV cache leaves them room.
    checkpoint = open_checkpoint(folder)

    def kv_memory(numbers: int) -> int:
        limits = options.RunnerOptions(device="cuda", gpu_memory_fraction=1, adapter_numbers=numbers, max_batch=4096)
        return options.plan_memory(checkpoint, limits, gpu_memory=1 << 30).kv_memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "cuda_memory", lambda index: 1 << 30)
        assert kv_memory(0) - kv_memory(10 << 20) == 20 << 20


def test_it_says_what_speculation_takes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", str(folder), "--device", "cpu", "--max-batch", "4", "--speculate", "3"]) == 0
    drafts = capsys.readouterr().out.splitlines()[-1]
    assert drafts == "Drafts    up to 3 tokens of a sequence, 16 sampled rows a step with them"
    monkeypatch.setattr(options, "cuda_memory", lambda index: 1 << 30)
    assert main(["plan", str(folder), "--device", "cuda", "--max-batch", "4", "--speculate", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{drafts}; a step with drafts replays no CUDA graph"
    assert main(["plan", str(folder), "--speculate", "33"]) == 2
    assert "--speculate" in capsys.readouterr().err


def test_a_head_that_the_model_has_not_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--mtp"]) == 1
    assert "no head that guesses tokens ahead (MTP) is known of models of qwen3" in capsys.readouterr().err


def test_what_cannot_be_is_refused_as_serve_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--max-model-len", "3001"]) == 1
    assert "this model takes 1 to 3000 tokens" in capsys.readouterr().err
    assert main(["plan", "/nowhere/model"]) == 1
    assert "/nowhere/model" in capsys.readouterr().err
    assert main(["plan", str(folder), "--max-queue", "0"]) == 2


def test_it_loads_neither_torch_nor_litestar(folder: Path) -> None:
    script = (
        "import sys; sys.modules.update(torch=None, litestar=None, uvicorn=None, transformers=None)\n"
        f"from lmserve.cli import main; sys.exit(main(['plan', {str(folder)!r}, '--device', 'cpu']))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_it_says_where_the_weights_are(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(*flags: str) -> str:
        assert main(["plan", str(folder), "--device", "cpu", *flags]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Weights   "))

    assert (
        weights() == weights("--weights-cache", "off") == "Weights   packed at every start, into memory of this process"
    )
    monkeypatch.setattr(weights_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(weights_cache, "SPARE_BYTES", 0)
    written = weights()
    assert written.startswith("Weights   packed at the first start, which writes ")
    assert written.endswith(f" to {folder / 'weights.lmserve'} for later starts")
    monkeypatch.setattr(weights_cache, "available_memory", lambda: 1000)
    assert weights() == f"{written} and maps them from there itself"
    monkeypatch.setattr(weights_cache, "packed_made_of", lambda _: weights_cache.key_of(open_checkpoint(folder), None))
    assert weights().startswith(f"Weights   mapped from {folder / 'weights.lmserve'}: ")
    assert not (folder / "weights.lmserve").exists()
