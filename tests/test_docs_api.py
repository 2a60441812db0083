"""docs/api.md and its neighbours: their examples run as they stand against a real server, and no route is left out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from lmserve.app import API
from server_process import ServerProcess

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "api.md").read_text("utf-8")
URL = "http://127.0.0.1:23333"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(TEXT)
COMMAND = re.compile(rf'curl (?:-X (?P<method>\w+) )?"?{re.escape(URL)}(?P<path>/[^\s"?]*)[^\n]*(?P<more>\\?)')
# They have their names in the text; the model of the commands has no labels, and its server takes no adapters.
ALIASES = {"/score", "/v2/rerank", "/v1/classify", "/classify", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}


def commands() -> list[tuple[str, str]]:
    """Method and path of each curl command."""
    found = []
    for language, text in BLOCKS:
        if language == "bash":
            for match in COMMAND.finditer(text):
                has_body = match[0].endswith("\\")
                found.append((match["method"] or ("POST" if has_body else "GET"), match["path"]))
    return found


def test_every_route_has_a_command() -> None:
    given = commands()
    for handler in API:
        for path in sorted(handler.paths - ALIASES):
            pattern = re.compile(re.sub(r"\{[^}]*\}", r"[^/]+", path))
            for method in sorted(handler.http_methods):
                if method != "OPTIONS":
                    assert any(m == method and pattern.fullmatch(p) for m, p in given), f"{method} {path}"
    assert all(f"`{alias}`" in TEXT for alias in ALIASES)


@pytest.mark.parametrize("page", ["api.md", "tools.md", "structured-output.md"])
def test_every_example_runs_in_order(default_server: ServerProcess, page: str) -> None:
    blocks = [block for block in BLOCK.findall((DOCS / page).read_text("utf-8")) if "127.0.0.1:23333" in block[1]]
    assert blocks
    for language, text in blocks:
        program = {"bash": ["bash", "-e"], "python": [sys.executable, "-"]}[language]
        here = default_server.url
        script = (
            text.replace(URL, here)
            .replace(URL.replace("http", "ws"), here.replace("http", "ws"))
            .replace("curl ", "curl -sS --fail-with-body ")
        )
        done = subprocess.run(program, input=script, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, text + done.stdout + done.stderr
        assert done.stdout.strip(), text
