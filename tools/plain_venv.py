"""Type what a new user types, in a fresh virtual environment with its Python's own pip, and ask the server a question.

`maturin develop` in a copy of the sources, then `lmserve serve`; or, with --wheel FILE, `pip install FILE` first.

Usage: python3 tools/plain_venv.py [--wheel FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
# Below target/, so that the next run compiles only what has changed.
FOLDER: Final = ROOT / "target" / "plain"
BUILT: Final = frozenset({"target", "dist", ".venv", ".venv-newest", "__pycache__"})
READY_SECONDS: Final = 300.0
# What an installation may take, torch and a model apart.
LARGEST: Final = 200  # MB
QUESTION: Final = {"prompt": "What is the capital of Japan?", "temperature": 0}
# Not in a shell of the developer's: what would make this environment another than a new user's.
DROPPED: Final = ("PYTHONPATH", "PYTHONHOME", "PYO3_PYTHON", "CONDA_PREFIX")


class Venv:
    """A virtual environment, active for the commands that are typed in it."""

    def __init__(self, folder: Path) -> None:
        print(f"==> {sys.executable} -m venv {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if name not in DROPPED}
        self.environment |= {
            "VIRTUAL_ENV": str(folder),
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "CARGO_TARGET_DIR": str(FOLDER / "cargo"),
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        }

    def type(self, command: str, folder: Path = ROOT) -> None:
        """Run a command line; its failure ends this program."""
        print(f"==> {command}", flush=True)
        status = subprocess.run(command.split(), cwd=folder, env=self.environment, check=False).returncode
        if status != 0:
            sys.exit(f"{command!r} ended with {status}")

    def megabytes(self) -> int:
        """Size of what is in site-packages, without pip, maturin and what every environment has."""
        packages = next(self.folder.glob("lib/python*/site-packages"))
        skipped = ("pip", "setuptools", "maturin")
        kept = [path for path in packages.iterdir() if not path.name.startswith(skipped)]
        files = [file for path in kept for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
        return sum(file.stat().st_size for file in files) // 1_000_000


def source_names() -> set[str]:
    """The files of the repository; where it is no checkout of git, all but what is built."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
        return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".so")
    return {str(file) for file in files if not BUILT.intersection(file.parts)}


def copied_sources() -> Path:
    """The sources as they are here, without anything that was built, each file as old as it is here."""
    copy = FOLDER / "lmserve"
    names = source_names()
    for old in sorted(copy.rglob("*"), reverse=True):
        if old.is_dir() and not any(old.iterdir()):
            old.rmdir()
        elif not old.is_dir() and str(old.relative_to(copy)) not in names:
            old.unlink()
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def ask_server(venv: Venv) -> str:
    """What `lmserve serve` answers, started where there is no source and no file of the user's."""
    with tempfile.TemporaryDirectory() as folder, Path(folder, "output").open("w+") as output:
        print("==> lmserve serve", flush=True)
        command = [venv.folder / "bin" / "lmserve", "serve", "--port", "0"]
        server = subprocess.Popen(command, cwd=folder, env=venv.environment, stdout=output, stderr=output)
        try:
            url = _address(server, Path(output.name))
            body = json.dumps(QUESTION).encode()
            request = urllib.request.Request(  # noqa: S310 - the server's own address
                f"{url}/generate", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=READY_SECONDS) as reply:  # noqa: S310
                return str(json.load(reply)["text"])
        finally:
            server.terminate()
            server.wait()


def _address(server: subprocess.Popen[bytes], output: Path) -> str:
    deadline = time.monotonic() + READY_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        printed = output.read_text("utf-8")
        if "Ready after" in printed and (address := re.search(r"^API +(http://\S+)$", printed, re.MULTILINE)):
            return address[1]
        time.sleep(0.2)
    sys.exit(f"lmserve serve did not start:\n{output.read_text('utf-8')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", metavar="FILE", type=Path, help="install this (default: maturin develop)")
    wheel: Path | None = parser.parse_args().wheel
    venv = Venv(FOLDER / "venv")
    venv.type("pip --version")
    if wheel is None:
        venv.type("pip install --quiet maturin")
        venv.type("maturin develop", copied_sources())
    else:
        venv.type(f"pip install --quiet {wheel.resolve()}")
    answer = ask_server(venv)
    print(answer)
    if "Tokyo" not in answer:
        sys.exit("that is no answer to the question")
    size = venv.megabytes()
    print(f"==> {size} MB are in site-packages")
    if size >= LARGEST:
        sys.exit(f"that is not under {LARGEST} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
