"""The docs as a site: it is built without a warning, links are checked, and nothing in it comes from another host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("mkdocs", reason="`make docs` installs mkdocs")

ROOT = Path(__file__).parents[1]
# What a page loads by itself, by tag and attribute.
LOADS = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}


def build(site: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


class Loaded(HTMLParser):
    """The addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if (tag, name) in LOADS and value]


def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    pages = [*tmp_path.rglob("*.html")]
    assert len(pages) > len([*(ROOT / "docs").glob("*.md")])
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text("utf-8"))
        assert loaded.addresses
        assert [address for address in loaded.addresses if re.match(r"(https?:)?//", address)] == [], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text("utf-8")), sheet
    assert '"location":"sessions/' in (tmp_path / "search" / "search_index.json").read_text("utf-8")


def test_the_recorded_terminal_is_a_picture_of_its_own() -> None:
    text = (ROOT / "docs" / "images" / "chat.svg").read_text("utf-8")
    rows = ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")
    said = [" ".join("".join(row.itertext()).split()) for row in rows]
    assert "$ lmserve run --temperature 0" in said
    assert any("Tokyo" in row for row in said)
    assert "http" not in re.sub(r"http://(www.w3.org|127.0.0.1)", "", text)


@pytest.mark.parametrize(
    "link", ["[x](nothing.md)", "[x](sessions.md#nothing)", "[x](../src/lib.rs)", "![x](images/no.png)"]
)
def test_a_broken_link_is_an_error(tmp_path: Path, link: str) -> None:
    for name in ("docs", "tools", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in (
        "mkdocs.yml",
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs" / "keys.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{link}\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0
    assert "keys.md" in done.stderr
