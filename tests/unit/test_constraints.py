"""constraints.txt: a version for every package that is installed, within pyproject.toml's range, and no address."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LINES = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, list[str]]:
    """The versions of each package; more than one where Pythons or machines differ."""
    versions: dict[str, list[str]] = {}
    for line in LINES:
        requirement = Requirement(line)
        (version,) = requirement.specifier
        assert version.operator == "==", line
        assert requirement.url is None, line
        versions.setdefault(canonical(requirement.name), []).append(version.version)
    return versions


def requirements() -> list[str]:
    project = PROJECT["project"]
    extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    groups = [line for lines in PROJECT["dependency-groups"].values() for line in lines]
    return [*project["dependencies"], *extras, *groups, *PROJECT["build-system"]["requires"]]


@pytest.mark.parametrize("line", [line for line in requirements() if not line.startswith("lmserve[")])
def test_every_requirement_has_a_version_in_its_range(line: str) -> None:
    requirement = Requirement(line)
    versions = pinned()[canonical(requirement.name)]
    assert versions
    assert all(requirement.specifier.contains(version) for version in versions), (line, versions)


def test_it_names_no_address_and_no_path() -> None:
    assert len(LINES) > 50
    for line in LINES:
        assert not re.search(r"https?:|file:|@|--|/", line), line


def test_what_installs_is_constrained() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    installs = re.findall(r"(?:pip install|tools/install\.py) .*", makefile)
    commands = [line for line in installs if not line.startswith("tools/install.py\n")]
    assert len(commands) == 7
    assert all("--constraint $(CONSTRAINTS)" in line for line in commands)
