"""What `lmserve chat` asks of a server, with a transport in the server's place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from lmserve.cli import parser
from lmserve.cli.chat import full_url
from lmserve.cli.conversation import Chat
from lmserve.cli.markdown import BOLD, CODE, PLAIN, Styler

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
    assert capsys.readouterr().err == "the reply is not from an lmserve server (HTTP 502)\n"


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
    assert output.out.startswith("/new            start a new conversation")
    assert output.err == "There is no command /nonsense. /help lists the commands.\n"


class Session:
    """A server that keeps what is said in each session, and loses it on demand."""

    def __init__(self) -> None:
        self.turns: dict[int, int] = {}
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    def receive(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        self.asked.append((request.method, request.url.path, body))
        if request.url.path != "/generate":
            session, verb = request.url.path.removeprefix("/v1/sessions/").split("/")
            if verb == "fork":
                self.turns[body["session_id"]] = self.turns[int(session)]
            else:
                assert body["turns"] < self.turns[int(session)]
                self.turns[int(session)] = body["turns"]
            return httpx.Response(200, json={})
        session = body["instance_id"]
        if body.get("sequence_end"):
            self.turns.pop(session, None)
        elif body["sequence_start"]:
            self.turns[session] = 1
        elif session not in self.turns:
            return refusal(404, "session_not_found")
        else:
            self.turns[session] += 1
        return words("yes")

    def prompts(self) -> list[Any]:
        return [body["prompt"] for _, path, body in self.asked if path == "/generate" and body["prompt"]]


def converse(monkeypatch: pytest.MonkeyPatch, server: Session, *lines: str | Callable[[], str]) -> int:
    """Type `lines` (or what they return, when their time comes)."""
    given = iter(lines)

    def typed(_prompt: str) -> str:
        for line in given:
            return line() if callable(line) else line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    with httpx.Client(transport=httpx.MockTransport(server.receive), base_url="http://server") as client:
        return Chat(client, parser().parse_args(["chat"])).run()


def test_rewind_and_fork_leave_no_session_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Session()
    assert (
        converse(monkeypatch, server, "one", "two", "three", "/rewind 2", "/fork", "four", "/rewind", "/rewind", "five")
        == 0
    )
    verbs = [(path.rpartition("/")[2], body) for _, path, body in server.asked if path != "/generate"]
    assert [verb for verb, _ in verbs] == ["rewind", "fork", "rewind"]
    assert verbs[0][1] == {"turns": 1}
    # Taking back a first turn ends the session; the next turn begins it.
    assert server.prompts() == ["one", "two", "three", "four", "five"]
    assert server.asked[-3][2]["sequence_start"] is True
    assert server.turns == {}


def test_a_conversation_that_the_server_lost_is_told_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Session()

    def lose() -> str:
        server.turns.clear()
        return "two"

    assert converse(monkeypatch, server, "one", lose, "three", "/rewind", "/rewind", "four") == 0
    assert "sending it again" in capsys.readouterr().err
    told = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}]
    prompts = server.prompts()
    assert prompts[2] == [*told, {"role": "user", "content": "two"}]
    assert prompts[3] == "three"
    assert prompts[4] == [*told, {"role": "user", "content": "four"}]


def test_system_prompt_settings_and_saving(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = Session()
    saved = tmp_path / "chat.md"
    lines = ("/system Be brief.", "/set temperature 0.5", "/set top_k x", "/set nothing 1", "one", f"/save {saved}")
    assert converse(monkeypatch, server, *lines, "/set temperature -", "two", f"/save {tmp_path}/no/x", "/set") == 0
    first, second = (body for _, _, body in server.asked if body["prompt"])
    assert first["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    assert first["temperature"] == 0.5
    assert "temperature" not in second
    assert saved.read_text() == "**System**\n\nBe brief.\n\n**You**\n\none\n\n**Model**\n\nyes\n"
    output = capsys.readouterr()
    assert "top_k must be a number, but 'x' was given." in output.err
    assert "/set needs one of temperature, top_p" in output.err
    assert "could not be written: No such file or directory" in output.err
    assert "max_tokens 512" in output.out


def test_what_is_text_and_what_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server = Session()
    lines = (
        "/usr/bin/env what is this?",
        "/tmp is full, why?",
        '"""first',
        "second",
        'third"""',
        '"""one line"""',
        "exit now?",
        "/neu",
        "exit",
        "never",
    )
    assert converse(monkeypatch, server, *lines) == 0
    assert server.prompts() == [
        "/usr/bin/env what is this?",
        "/tmp is full, why?",
        "first\nsecond\nthird",
        "one line",
        "exit now?",
    ]
    assert "There is no command /neu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("8000", "http://127.0.0.1:8000"),
        (":8000", "http://127.0.0.1:8000"),
        ("host", "http://host:23333"),
        ("host:80", "http://host:80"),
        ("host:80/llm/", "http://host:80/llm"),
        ("::1", "http://[::1]:23333"),
        ("[::1]:80", "http://[::1]:80"),
        ("https://host/v1", "https://host"),
    ],
)
def test_addresses_in_any_form(given: str, url: str) -> None:
    assert full_url(given) == url


def test_markdown_is_styled_and_keeps_its_marks() -> None:
    text = "# Head\nA **bold** `co**de` 2 * 3\n```py\n# no head **x**\n```\nend **open\nplain"
    whole = Styler()
    styled = whole.push(text) + whole.end()
    assert re.sub(r"\x1b\[\d+m", "", styled) == text
    assert f"{BOLD}# Head{PLAIN}\n" in styled
    assert f"{BOLD}**bold**{PLAIN} {CODE}`co**de`{PLAIN}" in styled
    assert f"{CODE}```py\n# no head **x**\n```{PLAIN}\n" in styled
    assert styled.endswith(f"{BOLD}**open{PLAIN}\nplain")
    for size in (1, 2, 3, 7):
        pieces = Styler()
        joined = "".join(pieces.push(text[at : at + size]) for at in range(0, len(text), size)) + pieces.end()
        assert joined == styled
