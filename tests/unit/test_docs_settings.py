"""Files and lines that docs/ shows for settings, keys and the log are ones that the server takes and writes."""

from __future__ import annotations

import re
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
from lmserve.api.http import request_log
from lmserve.api.http.request_log import Entry
from lmserve.cli import parse
from lmserve.cli.serve import config_of
from lmserve.keys import read_keys

DOCS = Path(__file__).parents[2] / "docs"
MIB = 1024 * 1024


def block(page: str, language: str) -> str:
    """The one block of a page in this language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return text


def test_the_file_of_settings(tmp_path: Path) -> None:
    file, keys = tmp_path / "lmserve.toml", tmp_path / "keys"
    keys.write_text("sk-1\n", "utf-8")
    file.write_text(block("settings.md", "toml").replace("/run/secrets/lmserve", str(keys)), "utf-8")
    config = config_of(parse(["serve", "--config", str(file)]), {})
    assert (config.host, config.port, config.max_body) == ("0.0.0.0", 8000, 8 * MIB)
    assert config.keyring.tenant_of(b"sk-1") == 1


def test_the_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(block("keys.md", "toml"), "utf-8")
    web, batch = read_keys(file)
    assert (web.limits.weight, web.limits.max_in_flight, web.limits.tokens_per_minute) == (3, 32, 120_000)
    assert batch.limits.max_priority == 10
    (command,) = re.findall(r"`(printf .*? sha256sum)`", (DOCS / "keys.md").read_text("utf-8"))
    done = subprocess.run(["bash", "-c", f"KEY=test; {command}"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == sha256(b"test").hexdigest() == batch.digest.hex()


def test_the_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lmserve.requests")
    entry = Entry(
        id="8f14e45fceea167a5a36dedd4bea2543",
        key="web",
        client="10.0.0.7",
        method="POST",
        path="/v1/chat/completions",
        status=200,
        session=7,
        batch=None,
        prompt_tokens=112,
        cached_tokens=96,
        completion_tokens=48,
        queue_s=0.002,
        first_token_s=0.061,
        duration_s=1.204,
        ended_ns=0,
    )
    request_log.write("text", entry)
    assert f"INFO lmserve.requests: {caplog.messages[0]}\n" in block("monitoring.md", "")
