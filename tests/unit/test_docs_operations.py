"""Each promise of docs/operations.md names tests, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text("utf-8")
TEST = re.compile(r"`([\w/.-]+\.(?:py|rs))::(\w+)`")


def test_every_test_that_is_named_is_there() -> None:
    named = TEST.findall(PAGE)
    assert len(named) > 40
    for path, name in named:
        keyword = "def" if path.endswith(".py") else "fn"
        assert re.search(rf"\b{keyword} {name}\(", (ROOT / path).read_text("utf-8")), f"{path}::{name}"


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Fault ")]
    assert len(rows) > 25
    for row in rows:
        assert TEST.search(row.rsplit("|", 2)[1]), row
