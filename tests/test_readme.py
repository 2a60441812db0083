"""README.md: its clients run as they stand against a real server, and docs/flags.md is what `--help` says."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lmserve.cli.serve_options import add_options
from server_process import ServerProcess

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
FLAGS = Path(__file__).parents[1] / "docs" / "flags.md"
URL = "http://127.0.0.1:23333"
EXAMPLES = [
    pytest.param(language, text, id=f"{language}-{number}")
    for number, (language, text) in enumerate(re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    if URL in text or language == "python"
]
COMMANDS = [text for language, text in (example.values for example in EXAMPLES) if language == "bash"]


def run(server: ServerProcess, language: str, text: str) -> str:
    """Run an example against `server`; what it prints."""
    program = {"bash": ["bash", "-e"], "python": [sys.executable, "-"]}[language]
    text = text.replace(URL, server.url).replace("curl ", "curl -sS --fail-with-body ")
    done = subprocess.run(program, input=text, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reply(server: ServerProcess, about: str) -> Any:
    """The reply to the one curl command that contains `about`."""
    (command,) = [command for command in COMMANDS if about in command]
    return json.loads(run(server, "bash", command))


@pytest.mark.parametrize(("language", "text"), EXAMPLES)
def test_example_runs(default_server: ServerProcess, language: str, text: str) -> None:
    assert run(default_server, language, text).strip()


def test_curl_replies(default_server: ServerProcess) -> None:
    assert reply(default_server, "chat/completions")["choices"][0]["message"]["content"]
    vectors = [item["embedding"] for item in reply(default_server, "Good morning.")["data"]]
    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1, 1], abs=1e-5)


def test_curl_session(default_server: ServerProcess) -> None:
    first = reply(default_server, "capital of Japan")
    assert "Tokyo" in first["text"]
    second = reply(default_server, "How many people")
    assert "Tokyo" in second["text"]
    # The end token is counted, but what closes a turn in the history is the template's.
    history = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1
    assert second["usage"]["history_tokens"] == history
    assert history - 16 <= second["usage"]["cached_tokens"] < second["usage"]["prompt_tokens"]
    assert reply(default_server, '"sequence_end": true')["tokens"] == 0


def test_python_session(default_server: ServerProcess) -> None:
    (example,) = [text for language, text in (e.values for e in EXAMPLES) if language == "python" and "42" in text]
    printed = run(default_server, "python", example)
    assert printed.count("Tokyo") == 2
    usages = re.findall(r"history_tokens=(\d+)", printed)
    assert [int(tokens) > 20 for tokens in usages] == [False, True]


def test_python_offline(default_server: ServerProcess) -> None:
    (example,) = [text for language, text in (e.values for e in EXAMPLES) if language == "python" and "LLM(" in text]
    assert re.search(r"Tokyo.*\(\d+, .*Paris.*\(\d+, ", run(default_server, "python", example), re.DOTALL)


def flag_table() -> str:
    """Every flag of `lmserve serve`, as docs/flags.md lists it."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    rows = ["| Flag | Meaning |", "|---|---|"]
    for action in parser._actions:
        value = "" if action.nargs == 0 else f" {action.metavar}"
        rows.append(f"| `{action.option_strings[0]}{value}` | {action.help} |")
    return "\n".join(rows) + "\n"


def test_table_of_flags() -> None:
    page = FLAGS.read_text("utf-8")
    written = page[: page.index("| Flag |")] + flag_table()
    if os.environ.get("WRITE_FLAGS"):
        FLAGS.write_text(written, "utf-8")
    assert FLAGS.read_text("utf-8") == written, "the flags changed; `make flags` writes docs/flags.md anew"
