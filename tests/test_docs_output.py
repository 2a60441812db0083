"""Commands of the docs whose output is shown below them: it is what the server answers. `...` stands for anything."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess, serving

ROOT = Path(__file__).parents[1]
URL = "http://127.0.0.1:23333"
BLOCK = re.compile(r"^```bash\n(?P<command>.*?)^```\n(?:\n(?P<output>(?: {4}[^\n]*\n)+))?", re.MULTILINE | re.DOTALL)
PAGES = ["README.md", "docs/api.md"]


def commands(page: str) -> Iterator[tuple[str, str | None]]:
    """The page's commands in their order, each with the output that is shown."""
    for block in BLOCK.finditer((ROOT / page).read_text("utf-8")):
        if URL in block["command"]:
            yield block["command"], block["output"]


def matches(shown: str, output: str) -> bool:
    """Whether the output is what is shown, but for white space and what `...` stands for."""
    parts = [re.escape("".join(part.split())) for part in shown.split("...")]
    return re.fullmatch(".*".join(parts), "".join(output.split())) is not None


@pytest.fixture
def server(smollm2_gguf: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """The default model, of which nobody has asked anything."""
    assert smollm2_gguf.is_file()
    with serving(tmp_path) as server:
        yield server


@pytest.mark.parametrize("page", PAGES)
def test_the_output_is_as_shown(server: ServerProcess, page: str) -> None:
    compared = 0
    for command, shown in commands(page):
        script = command.replace(URL, server.url).replace("curl ", "curl -sS ")
        done = subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True, timeout=120, check=True)
        if shown is not None:
            compared += 1
            assert matches(shown, done.stdout), f"{command}\nshown:\n{shown}\nanswered:\n{done.stdout}"
    assert compared


def test_what_matches() -> None:
    assert matches('    {"a": 1, ...,\n     "b": 2}\n', '{"a":1,"x":[3],"b":2}\n')
    assert not matches('    {"a": 1, ...}\n', '{"a":2,"b":2}')
