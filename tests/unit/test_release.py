"""The release workflow: what it runs exists here, and the version is one."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8"))["jobs"]
TAGS = {
    "x86_64-unknown-linux-gnu": "manylinux2014_x86_64.manylinux_2_17_x86_64",
    "aarch64-unknown-linux-gnu": "manylinux2014_aarch64.manylinux_2_17_aarch64",
    "aarch64-apple-darwin": "macosx_11_0_arm64",
    "x86_64-apple-darwin": "macosx_10_12_x86_64",
}


def test_each_command_exists() -> None:
    commands = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
    targets = {words[1] for command in commands if (words := command.split())[0] == "make"}
    assert targets == {"wheels", "test-wheel"}
    for target in targets:
        assert re.search(rf"^{target}:.*##", MAKEFILE, re.MULTILINE)
    (script,) = [command.removeprefix("bash ") for command in commands if command.startswith("bash ")]
    assert (ROOT / script).is_file()


def test_each_wheel_is_tried_on_one_machine() -> None:
    (targets,) = re.findall(r"^WHEEL_TARGETS \?= (.*)$", MAKEFILE, re.MULTILINE)
    patterns = [entry["wheel"] for entry in JOBS["try"]["strategy"]["matrix"]["include"]]
    assert targets.split() == list(TAGS)
    for target in targets.split():
        name = f"lmserve-0.1.0-cp311-abi3-{TAGS[target]}"
        assert sum(fnmatch(name, f"*{pattern}") for pattern in patterns) == 1
    assert JOBS["publish"]["needs"] == ["test", "try"]


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert tomllib.loads((ROOT / "Cargo.toml").read_text("utf-8"))["package"]["version"] == project
    assert f"## {project}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")
