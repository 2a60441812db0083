"""`lmserve bench` against a scripted server."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from lmserve.bench.load import Run
from lmserve.bench.outcome import Outcome
from lmserve.bench.report import report_of
from lmserve.bench.svg import number, ticks
from lmserve.bench.workload import WORKLOADS, Sizes
from lmserve.cli import main
from scripted_server import Script, choice, chunked, event, events, scripted_server, whole


def bench(url: str, *arguments: str) -> int:
    return main(["bench", url, "--output-tokens", "4", *arguments])


def test_figures_in_terminal_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, drawing = tmp_path / "figures.json", tmp_path / "figures.svg"
    with scripted_server() as server:
        code = bench(
            server.url + "/v1",
            *("--workload", "all", "--concurrency", "2,3", "--requests", "5", "--turns", "2", "--seed", "9"),
            *("--json", str(figures), "--plot", str(drawing)),
        )
    assert code == 0
    result = json.loads(figures.read_text())
    assert (result["url"], result["model"], result["seed"]) == (server.url, "scripted", 9)
    runs = result["runs"]
    assert [(run["workload"], run["concurrency"]) for run in runs] == [(w, c) for w in WORKLOADS for c in (2, 3)]
    for run in runs:
        several = run["workload"] in ("agent", "chat")
        requests = 10 if several else 5
        assert (run["requests"], run["errors"]) == (requests, {})
        assert (run["prompt_tokens"], run["output_tokens"]) == (7 * requests, 4 * requests)
        assert run["output_tokens_per_s"] * run["elapsed_s"] == pytest.approx(4 * requests)
        assert run["total_tokens_per_s"] * run["elapsed_s"] == pytest.approx(11 * requests)
        assert 0 < run["ttft_ms"]["p50"] <= run["ttft_ms"]["p90"] <= run["ttft_ms"]["p99"] <= run["ttft_ms"]["worst"]
        assert len(run["turn_ttft_ms"]) == (2 if several else 1)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed if line.startswith("mixed")] == [
        ["mixed", "2", "5"],
        ["mixed", "3", "5"],
    ]
    titles = {node.text for node in ET.parse(drawing).iter("{http://www.w3.org/2000/svg}text")}
    assert titles >= {f"scripted at {server.url}", *WORKLOADS, "time to first token, 3 clients"}


def spoiled(spoil: Callable[[list[bytes]], list[bytes]]) -> Script:
    return lambda body: (chunked(spoil(events(body))), True)


WRONG: list[tuple[str, Script]] = [
    ("4 tokens were asked for, but usage says 3", lambda _: (chunked(events({"max_tokens": 3})), True)),
    ("the stream has no usage", spoiled(lambda parts: [*parts[:-2], parts[-1]])),
    ("the stream ended without [DONE]", spoiled(lambda parts: parts[:-1])),
    ("finish_reason should be 'length', but is None", spoiled(lambda parts: [*parts[:-3], *parts[-2:]])),
    ("4 tokens came in 5 chunks of text", spoiled(lambda parts: [parts[0], *parts])),
    ("4 tokens came in 0 chunks of text", spoiled(lambda parts: parts[4:])),
    (
        "a chunk is not OpenAI's: Input data was truncated",
        spoiled(lambda parts: [*parts[:1], b"data: {\n\n", *parts[1:]]),
    ),
    ("the stream ended in an error: no memory", spoiled(lambda parts: [event({"error": {"message": "no\nmemory"}})])),
    ("HTTP 429: too many", lambda _: (whole(429, {"error": {"message": "too many"}}), True)),
    ("HTTP 500: [1]", lambda _: (whole(500, [1]), True)),
    ("the server closed the connection before the reply's end", lambda body: (chunked(events(body))[:200], False)),
    ("the server closed the connection before the reply's end", lambda _: (b"", False)),
    ("the reply is not HTTP", lambda _: (b"nonsense\r\n\r\n", False)),
]


@pytest.mark.parametrize(("expected", "script"), WRONG)
def test_what_is_wrong_is_an_error(
    expected: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    with scripted_server(script) as server:
        assert bench(server.url, "--concurrency", "1", "--requests", "2", "--json", str(figures)) == 1
    (run,) = json.loads(figures.read_text())["runs"]
    ((error, count),) = run["errors"].items()
    assert error.startswith(expected)
    assert count == 2
    assert (run["output_tokens"], run["ttft_ms"]) == (0, None)
    assert f"  2 x {expected}" in capsys.readouterr().out


def test_a_server_that_closes_after_each_reply_is_served_as_well() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    with scripted_server(lambda body: (head + b"".join(events(body)), False)) as server:
        assert bench(server.url, "--concurrency", "2", "--requests", "6") == 0
    assert len(server.bodies) == 6


def test_a_server_that_closes_without_a_word_is_asked_again() -> None:
    with scripted_server(lambda body: (chunked(events(body)), False)) as server:
        assert bench(server.url, "--concurrency", "1", "--requests", "6") == 0
    assert len(server.bodies) == 6


def test_requests_are_greedy_and_of_exact_length() -> None:
    with scripted_server() as server:
        assert bench(server.url, "--concurrency", "1", "--requests", "1", "--model", "other") == 0
    (body,) = server.bodies
    assert len(body.pop("prompt").split()) >= 30
    assert body == {
        "model": "other",
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def chat_bodies(owner: str, *arguments: str) -> list[dict[str, Any]]:
    with scripted_server(owner=owner) as server:
        chat = ("--workload", "chat", "--concurrency", "1", "--requests", "2", "--turns", "3")
        assert bench(server.url, *chat, *arguments) == 0
    return server.bodies


def test_conversations_live_in_sessions_of_lmserve() -> None:
    bodies = chat_bodies("lmserve")
    assert [len(body["messages"]) for body in bodies] == [1] * 6
    assert [body["renew_session"] for body in bodies] == [True, False, False] * 2
    sessions = [body["session_id"] for body in bodies]
    assert sessions == [sessions[0]] * 3 + [sessions[0] + 1] * 3


@pytest.mark.parametrize("arguments", [("someone",), ("lmserve", "--resend-history")])
def test_other_servers_are_sent_the_history(arguments: tuple[str, ...]) -> None:
    bodies = chat_bodies(*arguments)
    assert [len(body["messages"]) for body in bodies] == [1, 3, 5] * 2
    assert all("session_id" not in body for body in bodies)
    for earlier, later in pairwise(bodies[:3]):
        said = {"role": "assistant", "content": "w0 w1 w2 w3 "}
        assert later["messages"][:-1] == [*earlier["messages"], said]


def test_a_failed_turn_ends_its_conversation() -> None:
    with scripted_server(lambda _: (whole(500, {}), True)) as server:
        assert bench(server.url, "--workload", "chat", "--concurrency", "1", "--requests", "2", "--turns", "3") == 1
    assert len(server.bodies) == 2


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_stream_reads_alike_however_it_is_cut(size: int) -> None:
    stream = b": ping\r\n\r\n" + b"".join(events({"max_tokens": 3, "messages": []})).replace(b"\n", b"\r\n")
    outcome = Outcome(0.0)
    for start in range(0, len(stream), size):
        outcome.feed(stream[start : start + size], 1.0)
    outcome.check(3)
    assert outcome.error is None
    assert "".join(outcome.text) == "w0 w1 w2 "
    assert len(outcome.arrivals) == 3


def test_times_are_those_of_chunks_with_text() -> None:
    outcomes = []
    for started, arrivals in ((10.0, (10.5, 10.6, 10.8)), (10.0, (11.5, 11.6, 11.8))):
        outcome = Outcome(started)
        outcome.feed(choice("", chat=True), started + 0.1)
        for at, now in enumerate(arrivals):
            outcome.feed(choice("x", chat=True, reason="length" if at == 2 else None), now)
        outcome.feed(event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}), 13.0)
        outcome.feed(b"data: [DONE]\n\n", 13.0)
        outcome.check(3)
        assert outcome.error is None
        outcomes.append(outcome)
    report = report_of(Run("chat", 2, 4.0, [outcomes]))
    assert (report.output_tokens_per_s, report.total_tokens_per_s) == (1.5, 4.0)
    assert report.ttft_ms is not None
    assert report.inter_token_ms is not None
    assert (report.ttft_ms.p50, report.ttft_ms.worst) == (pytest.approx(1000), pytest.approx(1500))
    assert (report.inter_token_ms.p50, report.inter_token_ms.worst) == (pytest.approx(150), pytest.approx(200))


def words(name: str, *, seed: int = 1, concurrency: int = 1, **sizes: Any) -> list[list[str]]:
    conversations = WORKLOADS[name].conversations(seed, concurrency, Sizes(**sizes))
    return [turn.prompt.split() for conversation in conversations for turn in conversation]


def test_mixed_prompts_have_the_lengths_that_they_should() -> None:
    lengths = [len(prompt) for prompt in words("mixed", requests=4000)]
    assert min(lengths) >= 30
    assert max(lengths) <= 388
    assert sum(lengths) / len(lengths) == pytest.approx(142, rel=0.03)


def test_prompts_are_decided_by_the_seed_and_no_two_runs_share_one() -> None:
    assert words("mixed") == words("mixed")
    starts = [
        tuple(prompt[:30]) for seed in (1, 2) for c in (1, 8) for prompt in words("mixed", seed=seed, concurrency=c)
    ]
    assert len(set(starts)) == len(starts)


def test_shared_prefixes_are_shared_and_the_rest_is_not() -> None:
    prompts = words("shared-prefix")
    assert len(prompts) == 32
    assert len({tuple(prompt[:1535]) for prompt in prompts}) == 1
    assert len({tuple(prompt[1535:]) for prompt in prompts}) == 32


def test_sizes_of_the_other_workloads() -> None:
    assert {len(prompt) for prompt in words("long-prompt")} == {4000}
    assert {len(prompt) for prompt in words("prompt")} == {2000}
    assert len(words("chat", concurrency=8)) == 48
    assert len(words("burst", concurrency=64)) == 64


def test_no_server_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lmserve: error: no server answers at http://127.0.0.1:9: no connection: ")
    assert error.count("\n") == 1


def test_a_server_that_cannot_do_it_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        assert main(["bench", server.url + "/nowhere"]) == 0
        assert (
            main(["bench", server.url, "--json", "/nowhere/figures.json", "--requests", "1", "--concurrency", "1"]) == 1
        )
    assert "/nowhere/figures.json cannot be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("ftp://x",), "a URL such as http://127.0.0.1:23333 is needed, but 'ftp://x' was given"),
        (
            ("u", "--workload", "mixed,fast"),
            "a workload is one of mixed, shared-prefix, long-prompt, prompt, agent, chat, burst, but 'fast'",
        ),
        (("u", "--concurrency", "0"), "an integer in [1, 4096] is needed, but '0' was given"),
        (("u", "--concurrency", "8,x"), "an integer in [1, 4096] is needed, but 'x' was given"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert expected in capsys.readouterr().err


def test_axes_have_round_steps() -> None:
    assert ticks(95) == [0, 25, 50, 75, 100]
    assert ticks(0.3) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert ticks(0) == [0, 1]
    assert [number(value) for value in (0, 0.0123, 1.5, 157.4, 12345.6)] == ["0", "0.0123", "1.5", "157", "12,346"]
