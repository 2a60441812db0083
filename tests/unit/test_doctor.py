"""What `lmserve doctor` says of machines that it has never seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from lmserve.cli import main
from lmserve.config import GIB
from lmserve.doctor import CacheFolder, Machine, examine, findings

WELL = Machine(
    processor="Some CPU",
    architecture="x86_64",
    isa="avx512",
    isa_runs=True,
    cores=8,
    usable_cores=8,
    load=0.5,
    memory=32 * GIB,
    free_memory=20 * GIB,
    torch=None,
    gpus=(),
    caches=(CacheFolder(Path("/cache"), True, 100 * GIB),),
    models=1,
    models_size=GIB,
    port_taken=False,
)


def advice(**changes: Any) -> list[str]:
    found = findings(dataclasses.replace(WELL, **changes))
    return [finding.advice for finding in found if finding.advice is not None]


def test_a_machine_that_is_well_needs_no_advice() -> None:
    assert advice() == []
    lines = {finding.name: finding.text for finding in findings(WELL)}
    assert lines["Processor"] == "Some CPU, kernels for avx512"
    assert lines["Memory"] == "20 GiB free of 32 GiB"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"isa": "portable"}, "QEMU: -cpu host"),
        ({"usable_cores": 2}, "docker run --cpus"),
        ({"load": 7.5}, "The load of the last minute is 7.5"),
        ({"free_memory": GIB // 2}, "Less than 1 GiB is free"),
        ({"gpus": (80 * GIB,)}, "pip install 'lmserve[cuda]'"),
        ({"gpus": (80 * GIB,), "torch": "2.10.0+cpu"}, "built without CUDA"),
        ({"caches": (CacheFolder(Path("/cache"), False, 100 * GIB),)}, "/cache cannot be written"),
        ({"caches": (CacheFolder(Path("/cache"), True, GIB),)}, "free some space"),
    ],
)
def test_what_to_change(changes: dict[str, Any], expected: str) -> None:
    (line,) = advice(**changes)
    assert expected in line


def test_an_instruction_set_that_is_not_here_breaks_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMSERVE_CPU_ISA", "avx9000")
    assert main(["doctor", "--no-speed"]) == 1
    assert "but avx9000 was given: unset it" in " ".join(capsys.readouterr().out.split())


def test_this_machine_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMSERVE_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    machine = examine()
    assert machine.isa_runs
    assert 0 < machine.free_memory <= machine.memory
    assert 1 <= machine.usable_cores <= machine.cores
    assert [(cache.writable, cache.free > 0) for cache in machine.caches] == [(True, True)] * 2
    assert (machine.models, machine.models_size) == (0, 0)


def test_a_setting_that_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LMSERVE_PORT", "99999")
    assert main(["doctor", "--no-speed"]) == 1
    assert "LMSERVE_PORT must lie in [0, 65535], but 99999 was given" in " ".join(capsys.readouterr().out.split())


def test_the_speed_is_measured(smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(smollm2_gguf)]) == 0
    assert "tokens a second for one client" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "no-such-model"]) == 1
