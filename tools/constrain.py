"""Writes constraints.txt: the newest version of every package that pyproject.toml allows.

Usage: .venv/bin/python tools/constrain.py constraints.txt [--upgrade]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from install import uv_environment

# What builds lmserve is no dependency of it, and is held to a version all the same.
TOOLS = ("maturin>=1.9.4,<2", "uv>=0.8,<1", "ziglang>=0.15,<1")

HEADER = """\
# The versions that lmserve was tested with, for Python 3.11 to 3.14. `make constraints` writes this file anew.
"""


def main() -> int:
    target, *flags = sys.argv[1:]
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--universal"]
    command += [
        "--python-version",
        "3.11",
        "--no-header",
        "--no-annotate",
        "--no-emit-index-url",
        "--no-emit-find-links",
    ]
    command += ["--all-extras"]
    for group in ("test", "page", "peft", "docs"):
        command += ["--group", group]
    command += ["pyproject.toml", "-", "--output-file", target, *flags]
    done = subprocess.run(command, input="\n".join(TOOLS), text=True, env=uv_environment(), check=False)
    if done.returncode == 0:
        path = Path(target)
        path.write_text(HEADER + path.read_text("utf-8").removeprefix(HEADER), "utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
