"""Weights of a file of packed weights are to the bit those that are packed, and a bad file is written anew."""

import dataclasses
import fcntl
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from lmserve.model import OptionError, RunnerOptions, cpu_ops, load_runner, open_checkpoint, plan_memory, weights_cache
from model_driver import Driver, greedy

OPTIONS = RunnerOptions(device="cpu", ops="cpu", max_batch=4, max_batch_tokens=64, kv_memory=4 << 20, threads=2)
PROMPT = np.random.default_rng(5).integers(0, 199, 40)
# Plain layers with biases; and experts, heads and a router.
FAMILIES = ("qwen2", "deepseek_v3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        tiny_models.make(family, folder)
    return folders


@pytest.fixture(autouse=True)
def small_models_are_kept_too(monkeypatch):
    monkeypatch.setattr(weights_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(weights_cache, "SPARE_BYTES", 0)


def logits(folder: Path, options: RunnerOptions) -> np.ndarray:
    runner = load_runner(open_checkpoint(folder), options)
    greedy(runner)
    driver = Driver(runner)
    sequence = driver.start(PROMPT)
    driver.generate([sequence], 2)
    return np.array(sequence.logits)


def with_file(path: Path, **changes) -> RunnerOptions:
    return dataclasses.replace(OPTIONS, weights_cache=str(path), **changes)


def wait_for(path: Path) -> bytes:
    """The file's bytes, once the thread that gives it its name is done."""
    part = path.with_name(f"{path.name}.part")
    end = time.monotonic() + 20
    while part.exists() or not path.exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    return path.read_bytes()


def forbid_packing(monkeypatch) -> None:
    monkeypatch.setattr(cpu_ops, "_stored", lambda *_: pytest.fail("a weight was read to be packed"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", ["auto", "q4"])
def test_a_second_start_packs_nothing_and_gives_the_same_bits(folders, family, quantize, tmp_path, monkeypatch):
    folder, path = folders[family], tmp_path / "weights"
    options = with_file(path, quantize=quantize)
    expected = logits(folder, dataclasses.replace(OPTIONS, quantize=quantize))
    plan = plan_memory(open_checkpoint(folder), options)
    assert not plan.weights_are_mapped
    assert np.array_equal(logits(folder, options), expected)
    written = wait_for(path)
    assert len(written) >= plan.weight_bytes / 2
    forbid_packing(monkeypatch)
    assert plan_memory(open_checkpoint(folder), options).weights_are_mapped
    assert np.array_equal(logits(folder, options), expected)
    assert load_runner(open_checkpoint(folder), options).info.weight_bytes == plan.weight_bytes
    assert path.read_bytes() == written


def test_weights_that_memory_holds_only_once_are_mapped_as_they_are_packed(folders, tmp_path, monkeypatch):
    folder, path = folders["deepseek_v3"], tmp_path / "weights"
    options = with_file(path)
    expected = logits(folder, OPTIONS)
    monkeypatch.setattr(weights_cache, "available_memory", lambda: 1000)
    assert plan_memory(open_checkpoint(folder), options).weights_are_mapped
    assert np.array_equal(logits(folder, options), expected)
    wait_for(path)
    forbid_packing(monkeypatch)
    assert np.array_equal(logits(folder, options), expected)


def flip(data: bytes) -> bytes:
    at = 70_000
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"GGUF" * 1000],
    ids=["flipped", "cut", "empty", "foreign"],
)
def test_a_damaged_file_is_told_of_and_written_anew(folders, tmp_path, caplog, damage):
    folder, path = folders["qwen2"], tmp_path / "weights"
    expected = logits(folder, with_file(path))
    written = wait_for(path)
    path.unlink()
    path.write_bytes(damage(written))
    with caplog.at_level(logging.WARNING, "lmserve.model"):
        assert np.array_equal(logits(folder, with_file(path)), expected)
    assert "are not used: " in caplog.text
    end = time.monotonic() + 20
    while path.read_bytes() != written:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_model_that_was_changed_is_packed_anew(folders, tmp_path):
    folder, path = folders["qwen2"], tmp_path / "weights"
    logits(folder, with_file(path))
    wait_for(path)
    assert plan_memory(open_checkpoint(folder), with_file(path)).weights_are_mapped
    assert not plan_memory(open_checkpoint(folder), with_file(path, quantize="q8")).weights_are_mapped
    file = folder / "model.safetensors"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not plan_memory(open_checkpoint(folder), with_file(path)).weights_are_mapped


def test_what_a_killed_process_left_is_taken_and_what_another_writes_is_left_alone(folders, tmp_path, monkeypatch):
    folder, path = folders["qwen2"], tmp_path / "weights"
    part = path.with_name("weights.part")
    expected = logits(folder, OPTIONS)
    with part.open("wb") as other:
        other.write(b"x" * (1 << 20))
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert np.array_equal(logits(folder, with_file(path)), expected)
        assert part.stat().st_size == 1 << 20
        assert not path.exists()
        # What does not fit otherwise cannot be loaded then.
        with monkeypatch.context() as patch:
            patch.setattr(weights_cache, "available_memory", lambda: 1000)
            with pytest.raises(OptionError, match="fit only if they can be mapped"):
                load_runner(open_checkpoint(folder), with_file(path))
    assert np.array_equal(logits(folder, with_file(path)), expected)
    assert plan_memory(open_checkpoint(folder), OPTIONS).weight_bytes / 2 < len(wait_for(path)) < 1 << 20


def test_a_disk_without_room_keeps_nothing(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_cache, "SPARE_BYTES", 1 << 62)
    monkeypatch.setattr(weights_cache, "SPARE_SHARE", 1.0)
    folder, path = folders["qwen2"], tmp_path / "weights"
    assert plan_memory(open_checkpoint(folder), with_file(path)).weights_cache is None
    logits(folder, with_file(path))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_leaves_a_model_that_runs(folders, tmp_path, monkeypatch, caplog):
    folder, path = folders["qwen2"], tmp_path / "weights"

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_cache.os, "fsync", refuse)
    expected = logits(folder, OPTIONS)
    assert np.array_equal(logits(folder, with_file(path)), expected)
    end = time.monotonic() + 20
    while "could not be kept" not in caplog.text:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert list(tmp_path.iterdir()) == []
