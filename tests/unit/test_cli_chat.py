"""What `lmserve chat` asks of a server, with a transport in the server's place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from lmserve.cli import parser
from lmserve.cli.chat import Chat

Answer = Callable[[dict[str, Any]], httpx.Response]


def frames(*objects: dict[str, Any]) -> httpx.Response:
    return httpx.Response(200, content=b"".join(json.dumps(o).encode() + b"\0" for o in objects))


def words(*texts: str) -> httpx.Response:
    parts = [{"text": text, "tokens": n, "finish_reason": None} for n, text in enumerate(texts, 1)]
    return frames(*parts, {"text": "", "tokens": len(texts), "finish_reason": "stop"})


def refusal(status: int, code: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": f"refused: {code}", "code": code}})


class Conversation:
    """Types `lines`, records what is posted, and answers with `answer`."""

    def __init__(self, answer: Answer, *lines: str, arguments: tuple[str, ...] = ()) -> None:
        self.posted: list[dict[str, Any]] = []
        self._answer = answer
        self._lines: Iterator[str] = iter(lines)
        self._arguments = parser().parse_args(["chat", *arguments])

    def run(self, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setattr("builtins.input", self._type)
        with httpx.Client(transport=httpx.MockTransport(self._receive), base_url="http://server") as client:
            return Chat(client, self._arguments).run()

    def _type(self, _prompt: str) -> str:
        for line in self._lines:
            return line
        raise EOFError

    def _receive(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/generate"
        body = json.loads(request.content)
        self.posted.append(body)
        return self._answer(body)

    def turns(self) -> list[tuple[str, bool]]:
        """(prompt, sequence_start) of each turn that asked for an answer."""
        return [(body["prompt"], body["sequence_start"]) for body in self.posted if body["prompt"]]


def test_session_is_started_continued_and_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Conversation(lambda _: words("Hé", "llo"), "one", "  ", "two")
    assert chat.run(monkeypatch) == 0
    assert capsys.readouterr().out == "Héllo\nHéllo\n"
    assert chat.turns() == [("one", True), ("two", False)]
    (session,) = {body["instance_id"] for body in chat.posted}
    assert chat.posted[-1] == {
        "prompt": "",
        "instance_id": session,
        "request_output_len": 0,
        "sequence_start": False,
        "sequence_end": True,
    }


def test_new_ends_the_session_and_starts_another(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Conversation(lambda _: words("yes"), "one", "/new", "two")
    assert chat.run(monkeypatch) == 0
    first, end, second, _ = chat.posted
    assert end["sequence_end"] is True
    assert end["instance_id"] == first["instance_id"] != second["instance_id"]
    assert chat.turns() == [("one", True), ("two", True)]


def test_nothing_said_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Conversation(lambda _: words("yes"))
    assert chat.run(monkeypatch) == 0
    assert chat.posted == []


def test_named_session_is_continued_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Conversation(lambda _: words("yes"), "one", arguments=("--session", "7"))
    assert chat.run(monkeypatch) == 0
    assert [body["instance_id"] for body in chat.posted] == [7]
    assert chat.turns() == [("one", False)]


def test_named_session_that_is_not_there_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Conversation(
        lambda body: words("yes") if body["sequence_start"] else refusal(404, "session_not_found"),
        "one",
        arguments=("--session", "7"),
    )
    assert chat.run(monkeypatch) == 0
    assert chat.turns() == [("one", False), ("one", True)]


def test_options_are_sent_and_those_not_given_are_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--temperature", "0", "--seed", "3", "--max-tokens", "9")
    chat = Conversation(lambda _: words("yes"), "one", arguments=arguments)
    assert chat.run(monkeypatch) == 0
    sent = chat.posted[0]
    assert (sent["temperature"], sent["seed"], sent["request_output_len"]) == (0, 3, 9)
    assert not {"top_p", "top_k"} & set(sent)


def test_refused_turn_is_told_and_fails_the_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = refusal(400, "context_length_exceeded")
    chat = Conversation(lambda body: refused if body["prompt"] == "long" else words("yes"), "one", "long")
    assert chat.run(monkeypatch) == 1
    output = capsys.readouterr()
    assert output.out == "yes\n"
    assert output.err == "refused: context_length_exceeded (context_length_exceeded)\n"


def test_failure_in_the_stream_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = {"message": "the model failed", "code": "internal_error"}
    last = {"text": "", "tokens": 1, "finish_reason": "error", "error": error}
    chat = Conversation(lambda body: frames({"text": "He", "tokens": 1, "finish_reason": None}, last), "one")
    assert chat.run(monkeypatch) == 1
    output = capsys.readouterr()
    assert output.out == "He\n"
    assert output.err == "the model failed (internal_error)\n"


def test_answer_that_is_not_lmserves_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Conversation(lambda _: httpx.Response(502, content=b"<html>Bad gateway"), "one")
    assert chat.run(monkeypatch) == 1
    assert capsys.readouterr().err == "the server's answer is not lmserve's (HTTP 502)\n"


def test_ways_an_answer_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        return frames({"text": "a", "tokens": 1, "finish_reason": body["prompt"]})

    chat = Conversation(answer, "abort", "length")
    assert chat.run(monkeypatch) == 0
    assert capsys.readouterr().out == "a [cancelled]\na [--max-tokens]\n"


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Conversation(lambda _: words("yes"), "/help", "/nonsense")
    assert chat.run(monkeypatch) == 0
    output = capsys.readouterr()
    assert output.out.startswith("/new   start a new conversation")
    assert output.err == "There is no command /nonsense; /help says what there is.\n"
