"""Install a wheel for aarch64 beside an aarch64 Python in an emulator, and ask the default model a question.

Usage: python3 tools/emulated_wheel.py ROOT WHEEL; ROOT is what `make test-wheel-aarch64` unpacks: a Debian with Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
SITE: Final = ROOT / "target" / "aarch64-site"
# Up to the glibc of the oldest suite that has a Python of 3.11: each is a name for packages that run there.
TAGS: Final = ("manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 37)))
QUESTION: Final = """
import platform, sys
from lmserve import LLM, SamplingParams, StopParams
with LLM(kv_memory="64MiB", threads=1, weights_cache="off") as llm:
    question = [{"role": "user", "content": "What is the capital of Japan?"}]
    (answer,) = llm.chat(question, SamplingParams(temperature=0), StopParams(max_tokens=8))
print(platform.machine(), platform.python_version(), answer.text)
"""


def typed(command: list[str], **more: str) -> str:
    print(f"==> {' '.join(command[:4])} ...", flush=True)
    done = subprocess.run(command, env=os.environ | more, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} ended with {done.returncode}")
    return done.stdout


def main() -> int:
    root, wheel = map(Path, sys.argv[1:])
    (python,) = (path for path in root.glob("usr/bin/python3.*") if path.name.removeprefix("python3.").isdigit())
    version = python.name.removeprefix("python")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(SITE), str(wheel)]
    install += ["--only-binary", ":all:", "--python-version", version, "--implementation", "cp"]
    for abi in (f"cp{version.replace('.', '')}", "abi3", "none"):
        install += ["--abi", abi]
    for tag in TAGS:
        install += ["--platform", tag]
    typed(install, PIP_CONSTRAINT=str(ROOT / "constraints.txt"), PIP_ROOT_USER_ACTION="ignore")
    answer = typed(["qemu-aarch64", "-L", str(root), str(python), "-c", QUESTION], PYTHONPATH=str(SITE))
    print(answer.strip())
    if not answer.startswith("aarch64") or "Tokyo" not in answer:
        sys.exit("that is no answer to the question")
    return 0


if __name__ == "__main__":
    sys.exit(main())
