"""Agents and SDKs of others, in a cache folder of their own, where `python tests/clients/installed.py` installs them.

Those of npm share one folder; each of PyPI has an environment of its own. The folder is lmserve-test-clients beside
lmserve's cache, or $LMSERVE_TEST_CLIENTS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmserve.assets import cache_dir

NPM: Final = {
    "@anthropic-ai/claude-code": "2.1.197",
    "@openai/codex": "0.171.0",
    "opencode-ai": "1.18.33",
    "@qwen-code/qwen-code": "0.15.10",
    "ai": "6.0.326",
    "@ai-sdk/openai-compatible": "2.0.92",
}
PYPI: Final = {"aider-chat": "0.86.2", "openai-agents": "0.24.0"}
# What npm runs after it has unpacked a package, where it is not told to leave that out.
AFTERWARDS: Final = {"@anthropic-ai/claude-code": "install.cjs", "opencode-ai": "postinstall.mjs"}


class NotInstalledError(Exception):
    """The client is not there; the message says why."""


@dataclass(frozen=True)
class Client:
    """A package as it was installed."""

    folder: Path
    version: str


def home() -> Path:
    """The cache folder."""
    given = os.environ.get("LMSERVE_TEST_CLIENTS")
    return Path(given) if given else cache_dir().with_name("lmserve-test-clients")


def of_npm(package: str) -> Client:
    """Raises NotInstalledError."""
    if shutil.which("node") is None:
        raise NotInstalledError("node is not on the PATH")
    folder = home() / "npm" / "node_modules" / package
    try:
        version = json.loads((folder / "package.json").read_bytes())["version"]
    except OSError as error:
        raise NotInstalledError(f"{package} is not in {home()}: `make test-clients` installs it") from error
    return Client(folder, version)


def of_pypi(package: str) -> Client:
    """Raises NotInstalledError."""
    folder = home() / package
    found = list(folder.glob(f"lib/python*/site-packages/{package.replace('-', '_')}-*.dist-info"))
    if not found:
        raise NotInstalledError(f"{package} is not in {home()}: `make test-clients` installs it")
    return Client(folder, found[0].name.removesuffix(".dist-info").rpartition("-")[2])


def install() -> None:
    """What is not there in the version that is named above. What cannot be had is told and left out."""
    for package, version in NPM.items():
        _install(package, version, of_npm, _from_npm)
    for package, version in PYPI.items():
        _install(package, version, of_pypi, _from_pypi)


def _install(package: str, version: str, find: Callable[[str], Client], fetch: Callable[[str, str], None]) -> None:
    try:
        if find(package).version == version:
            return
    except NotInstalledError:
        pass
    sys.stderr.write(f"==> {package} {version}\n")
    try:
        fetch(package, version)
    except (OSError, subprocess.CalledProcessError, NotInstalledError) as error:
        sys.stderr.write(f"{package} cannot be installed, so that its test is skipped: {error}\n")


def _from_npm(package: str, version: str) -> None:
    folder = home() / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    quiet = ["--no-fund", "--no-audit", "--loglevel=error", "--save-exact"]
    _run("npm", "install", *quiet, "--prefix", str(folder), f"{package}@{version}")
    if package in AFTERWARDS:
        subprocess.run(["node", AFTERWARDS[package]], cwd=of_npm(package).folder, check=True)


def _from_pypi(package: str, version: str) -> None:
    folder = home() / package
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    _run(str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", f"{package}=={version}")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    install()
