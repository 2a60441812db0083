"""`lmserve bench --trace`: requests that are sent when they are due."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lmserve.bench.trace import trace_workload
from lmserve.bench.workload import Sizes
from lmserve.cli import main
from scripted_server import ScriptedServer, scripted_server


def write(folder: Path, *requests: dict[str, Any]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def line(arrival: float, prompt: int = 4, output: int = 2, **more: int) -> dict[str, Any]:
    return {"arrival": arrival, "prompt_tokens": prompt, "output_tokens": output, **more}


def replay(path: Path, server: ScriptedServer, *arguments: str) -> dict[str, Any]:
    figures = path.with_name("figures.json")
    assert main(["bench", server.url, "--trace", str(path), "--json", str(figures), *arguments]) == 0
    (run,) = json.loads(figures.read_text())["runs"]
    return dict(run)


def test_requests_are_sent_when_they_are_due(tmp_path: Path) -> None:
    path = write(tmp_path, line(0.4, output=3), line(0.0), line(0.2))
    with scripted_server() as server:
        run = replay(path, server)
    assert [body["max_tokens"] for body in server.bodies] == [2, 2, 3]
    assert (run["workload"], run["requests"], run["output_tokens"]) == ("trace.jsonl", 3, 7)
    # The last of them was sent no earlier than it was due; until then nobody waits for a token.
    assert run["elapsed_s"] >= 0.4 > run["ttft_ms"]["worst"] / 1e3


def test_turns_of_a_session_follow_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, line(0, session=1), line(0, session=2), line(0, session=1))
    with scripted_server() as server:
        assert replay(path, server)["requests"] == 3
    assert sorted(len(body["messages"]) for body in server.bodies) == [1, 1, 3]


def test_prompts_have_their_lengths_and_share_what_they_should(tmp_path: Path) -> None:
    path = write(tmp_path, line(0, prompt=10, shared_tokens=6), line(1, prompt=8, shared_tokens=4), line(2, prompt=5))
    workload = trace_workload(path)
    first, second, third = (turn.prompt.split() for (turn,) in workload.conversations(1, 3, Sizes()))
    assert [len(words) for words in (first, second, third)] == [10, 8, 5]
    assert first[:4] == second[:4] != third[:4]
    assert first[4:6] != second[4:6]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"arrival": 0}', "line 1 of {path}: Object missing required field `prompt_tokens`"),
        ('\n{"arrival": -1, "prompt_tokens": 1, "output_tokens": 1}', "line 2 of {path} has an impossible number"),
        ("\n\n", "{path} has no request"),
    ],
)
def test_wrong_traces_are_refused(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    assert main(["bench", "http://127.0.0.1:9", "--trace", str(path)]) == 2
    assert expected.format(path=path) in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["http://127.0.0.1:9", "--fit", "f"]])
def test_a_server_or_a_fit_is_measured(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert "give either a URL or --fit" in capsys.readouterr().err
