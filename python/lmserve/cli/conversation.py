"""A conversation with a server from stdin to stdout: what each line of it does."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from lmserve.cli.lines import Lines
from lmserve.cli.markdown import Styler

if TYPE_CHECKING:
    import argparse
    from types import FrameType

    import httpx

HELP: Final = '''\
/new            start a new conversation (/clear is the same)
/system TEXT    start a new conversation with this system prompt
/rewind [N]     remove the last N turns (default: 1)
/fork           continue in a copy of the conversation; the server keeps the original until you leave
/set [NAME VALUE]  set temperature, top_p, top_k, repetition_penalty, seed or max_tokens; VALUE - resets to the default
/save FILE      write the conversation to a Markdown file
/bye            leave (exit and Ctrl-D do the same)
/help           show this text
Three quotation marks (""") begin and end a text of several lines. A pasted text is one turn.
Ctrl-C cancels the running answer. The text so far is kept.
'''

GONE: Final = ("session_not_found", "session_expired")
# What /set takes, and its name in the body of /generate.
SETTINGS: Final[Mapping[str, tuple[str, type[int | float]]]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "repetition_penalty": ("repetition_penalty", float),
    "seed": ("seed", int),
    "max_tokens": ("request_output_len", int),
}


class ServerError(Exception):
    """The server refused a turn; `code` is its reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Leave(Exception):  # noqa: N818 - it is no error
    """The person wants to go."""


class Chat:
    """One conversation at a time."""

    def __init__(self, client: httpx.Client, arguments: argparse.Namespace, *, plain: bool = False) -> None:
        """`arguments`: those of `lmserve chat`. `plain`: no styles, whatever the terminal."""
        self._client = client
        self._lines = Lines()
        self._kept = arguments.session is not None
        self._session: int | str = arguments.session if self._kept else _new_id()
        self._started = self._kept  # whether the session may be on the server
        self._left: list[int | str] = []  # sessions that were forked from, and end with this one
        self._system: str | None = getattr(arguments, "system", None)
        self._turns: list[tuple[str, str]] = []  # what was said and answered here
        self._told = 1  # turns of these that are the first one on the server
        self._options: dict[str, Any] = {}
        for name, (field, _) in SETTINGS.items():
            value = getattr(arguments, name, None)
            if value is not None:
                self._options[field] = value
        styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._styler = Styler() if styled and not plain else None
        self._commands: dict[str, Callable[[str], None]] = {
            "/new": self._new,
            "/clear": self._new,
            "/system": self._set_system,
            "/rewind": self._rewind,
            "/fork": self._fork,
            "/set": self._set,
            "/save": self._save,
            "/bye": self._leave,
            "/exit": self._leave,
            "/quit": self._leave,
            "/help": lambda _: print(HELP, end=""),
        }

    def run(self, question: str | None = None) -> int:
        """Every turn from stdin; or `question` alone. Returns the exit code."""
        if question is None and self._lines.terminal:
            models = self._client.get("/v1/models")
            if models.status_code == 200:
                print(f"{models.json()['data'][0]['id']} at {self._client.base_url}. /help lists the commands.")
        failed = False
        try:
            with self._lines:
                for text in self._lines if question is None else [question]:
                    failed = not self._handle(text) or failed
        except Leave:
            pass
        finally:
            self._end_all()
        return 1 if failed and (question is not None or not self._lines.terminal) else 0

    def _handle(self, text: str) -> bool:
        """One input. False if the server refused it."""
        import httpx

        stripped = text.strip()
        if not stripped:
            return True
        word, _, rest = stripped.partition(" ")
        try:
            if word in self._commands:
                self._commands[word](rest.strip())
            elif stripped in ("exit", "quit"):
                self._leave("")
            # A path is text; what looks like a command and is none would be a strange question.
            elif word.startswith("/") and "/" not in word[1:] and "\n" not in stripped and not Path(word).exists():
                print(f"There is no command {word}. /help lists the commands.", file=sys.stderr)
            else:
                self._turn(text)
        except ServerError as error:
            print(f"{error} ({error.code})", file=sys.stderr)
            return False
        except httpx.TransportError as error:
            if not self._lines.terminal:
                raise
            print(
                f"\n(the server does not answer: {error}; send the message again once the server runs)", file=sys.stderr
            )
            return False
        return True

    def _turn(self, text: str) -> None:
        try:
            answer = self._stream(text if self._started else self._opening(text), start=not self._started)
        except ServerError as error:
            # A session that was named on the command line, or that the server let go of.
            if error.code not in GONE or not self._started:
                raise
            if self._turns:
                print("(the server no longer has this conversation; sending it again)", file=sys.stderr)
            answer = self._stream(self._opening(text), start=True)
            self._told = len(self._turns) + 1
        self._turns.append((text, answer))

    def _opening(self, text: str) -> str | list[dict[str, str]]:
        """A session's first turn: all that was said so far, and `text`."""
        if self._system is None and not self._turns:
            return text
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        for said, answer in self._turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": text}]

    def _stream(self, prompt: str | list[dict[str, str]], *, start: bool) -> str:
        body = {"prompt": prompt, "instance_id": self._session, "sequence_start": start, "stream": True}
        written = ""
        last: dict[str, Any] = {"finish_reason": None}
        with _Interrupt(self._cancel), self._client.stream("POST", "/generate", json=body | self._options) as response:
            if response.status_code != 200:
                response.read()
                raise _server_error(response)
            self._started = True
            try:
                for frame in _frames(response):
                    written += frame["text"]
                    self._print(frame["text"])
                    last = frame
            finally:
                self._print(None, {"abort": " [cancelled]", "length": " [--max-tokens]"}.get(last["finish_reason"], ""))
        if last["finish_reason"] == "error":
            raise ServerError(last["error"]["code"], last["error"]["message"])
        return written

    def _print(self, text: str | None, note: str = "") -> None:
        """A piece of the answer; None ends it, with `note`."""
        if text is None:
            print((self._styler.end() if self._styler else "") + note)
        else:
            print(self._styler.push(text) if self._styler else text, end="", flush=True)

    # Commands

    def _new(self, _: str) -> None:
        self._end_all()
        self._session, self._kept = _new_id(), False
        self._turns, self._told = [], 1

    def _set_system(self, text: str) -> None:
        self._new("")
        self._system = text or None

    def _rewind(self, count: str) -> None:
        turns = int(count) if count.isdecimal() else 1
        if not 1 <= turns <= len(self._turns):
            print(
                f"There are {len(self._turns)} turns that can be removed, but {count or 1} was given.", file=sys.stderr
            )
            return
        kept = len(self._turns) - turns
        on_server = kept - self._told + 1
        if on_server > 0:
            self._ask("POST", f"{self._path}/rewind", {"turns": on_server})
        else:
            # Before its first turn a session cannot go: the next turn begins it anew.
            self._end()
        del self._turns[kept:]

    def _fork(self, _: str) -> None:
        if not self._started:
            print("There is no conversation to fork yet.", file=sys.stderr)
            return
        new = _new_id()
        self._ask("POST", f"{self._path}/fork", {"session_id": new})
        if not self._kept:
            self._left.append(self._session)
        print(f"(continuing in session {new}; session {self._session} is unchanged)")
        self._session, self._kept = new, False

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not text:
            for name, (field, _) in SETTINGS.items():
                print(f"{name} {self._options.get(field, '-')}")
            return
        if name not in SETTINGS or not value:
            print(f"/set needs one of {', '.join(SETTINGS)} and a value, but {text!r} was given.", file=sys.stderr)
            return
        field, kind = SETTINGS[name]
        if value == "-":
            self._options.pop(field, None)
            return
        try:
            self._options[field] = kind(value)
        except ValueError:
            print(f"{name} must be a number, but {value!r} was given.", file=sys.stderr)

    def _save(self, path: str) -> None:
        if not path:
            print("/save needs the name of a file.", file=sys.stderr)
            return
        parts = [] if self._system is None else [f"**System**\n\n{self._system}\n"]
        parts += [f"**You**\n\n{said}\n\n**Model**\n\n{answer}\n" for said, answer in self._turns]
        try:
            Path(path).expanduser().write_text("\n".join(parts), "utf-8")
        except OSError as error:
            print(f"{path} could not be written: {error.strerror}", file=sys.stderr)

    def _leave(self, _: str) -> None:
        raise Leave

    # Calls

    @property
    def _path(self) -> str:
        return f"/v1/sessions/{quote(str(self._session), safe='')}"

    def _ask(self, method: str, path: str, body: dict[str, Any]) -> None:
        response = self._client.request(method, path, json=body)
        if response.status_code != 200:
            raise _server_error(response)

    def _cancel(self) -> None:
        self._post(self._session, stop=True)

    def _end(self) -> None:
        self._post(self._session, sequence_end=True)
        self._started = False
        self._told = 1

    def _end_all(self) -> None:
        import httpx

        try:
            if self._started and not self._kept:
                self._end()
            while self._left:
                self._post(self._left.pop(), sequence_end=True)
        except httpx.TransportError:
            # The server is gone, and a session in its memory with it.
            self._left.clear()
        self._started = False

    def _post(self, session: int | str, **flags: bool) -> None:
        body = {"prompt": "", "instance_id": session, "request_output_len": 0, "sequence_start": False}
        self._client.post("/generate", json=body | flags)


class _Interrupt:
    """The first Ctrl-C calls `cancel` and lets the stream end by itself; a second is a KeyboardInterrupt."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._before)
        # The main thread is reading the stream; a handler must not wait for another reply.
        threading.Thread(target=self._cancel, daemon=True).start()


def _new_id() -> int:
    return secrets.randbelow(2**53)


def _frames(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a reply, each ended by one NUL byte."""
    import msgspec

    rest = b""
    for chunk in response.iter_bytes():
        *frames, rest = (rest + chunk).split(b"\0")
        yield from (msgspec.json.decode(frame) for frame in frames)


def _server_error(response: httpx.Response) -> ServerError:
    try:
        error = response.json()["error"]
        return ServerError(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return ServerError(f"HTTP {response.status_code}", "the reply is not from an lmserve server")
