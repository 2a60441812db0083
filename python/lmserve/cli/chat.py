"""`lmserve chat`: talk to a running server. The conversation lives there, in one session; only the new turn is sent."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmserve.cli.errors import CommandError

if TYPE_CHECKING:
    from types import FrameType

    import httpx

    from lmserve.cli.types import Commands

HELP = """\
/new   start a new conversation
/help  this text
Ctrl-C cancels the answer that is being written (what was written stays), Ctrl-D leaves.
"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a running server",
        description="Talk to a running server over /generate. The conversation is a session that lives on the server.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every flag of `chat`."""
    url = "http://127.0.0.1:23333"
    parser.add_argument("--url", default=url, help=f"the server (default: {url})")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: $LMSERVE_API_KEY)")
    parser.add_argument(
        "--session",
        metavar="ID",
        type=int,
        help="continue this session, or start it; it lives on afterwards (default: a new one, ended on leaving)",
    )
    parser.add_argument("--max-tokens", metavar="TOKENS", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--temperature", metavar="T", type=float, help="0 is greedy (default: the server's, 0.8)")
    parser.add_argument("--top-p", metavar="P", type=float, help="in (0, 1] (default: the server's, 0.8)")
    parser.add_argument("--top-k", metavar="K", type=int, help="0 is all (default: the server's, 40)")
    parser.add_argument("--seed", metavar="N", type=int, help="same seed, same answers (default: random)")


def run(arguments: argparse.Namespace) -> int:
    import httpx

    key = arguments.api_key or os.environ.get("LMSERVE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Answers may take long; only the connection has a deadline.
    timeout = httpx.Timeout(None, connect=10.0)
    try:
        with httpx.Client(base_url=arguments.url, headers=headers, timeout=timeout) as client:
            return Chat(client, arguments).run()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CommandError(f"no server answers at {arguments.url} (start one with lmserve serve): {error}") from error


class ServerError(Exception):
    """The server refused a turn; `code` is its reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Chat:
    """One conversation at a time, from stdin to stdout."""

    def __init__(self, client: httpx.Client, arguments: argparse.Namespace) -> None:
        self._client = client
        self._kept = arguments.session is not None
        self._session: int = arguments.session if self._kept else _new_id()
        self._started = self._kept  # whether the session may be on the server
        names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed"}
        given = {field: getattr(arguments, name) for name, field in names.items()}
        self._options = {"request_output_len": arguments.max_tokens}
        self._options |= {field: value for field, value in given.items() if value is not None}
        self._tty = sys.stdin.isatty()

    def run(self) -> int:
        if self._tty:
            # Gives input() its line editing and history.
            import readline  # noqa: F401

            models = self._client.get("/v1/models")
            if models.status_code == 200:
                print(f"{models.json()['data'][0]['id']} at {self._client.base_url}. /help says what there is.")
        failed = False
        try:
            for line in self._lines():
                failed = not self._handle(line) or failed
        finally:
            if self._started and not self._kept:
                self._end()
        return 1 if failed and not self._tty else 0

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield input("> " if self._tty else "")
            except EOFError:
                if self._tty:
                    print()
                return
            except KeyboardInterrupt:
                print()

    def _handle(self, line: str) -> bool:
        """One line of input. False if the server refused it."""
        text = line.strip()
        if not text:
            return True
        if text == "/help":
            print(HELP, end="")
        elif text == "/new":
            if self._started:
                self._end()
            self._session, self._started, self._kept = _new_id(), False, False
        elif text.startswith("/"):
            print(f"There is no command {text.split()[0]}; /help says what there is.", file=sys.stderr)
        else:
            return self._turn(line)
        return True

    def _turn(self, text: str) -> bool:
        try:
            try:
                self._stream(text, start=not self._started)
            except ServerError as error:
                # A session that was named on the command line, or that the server let go of.
                if error.code not in ("session_not_found", "session_expired"):
                    raise
                if not self._kept:
                    print("(the server no longer has this conversation; a new one begins)", file=sys.stderr)
                self._stream(text, start=True)
        except ServerError as error:
            print(f"{error} ({error.code})", file=sys.stderr)
            return False
        return True

    def _stream(self, text: str, *, start: bool) -> None:
        body = {"prompt": text, "instance_id": self._session, "sequence_start": start, "stream": True}
        with _Interrupt(self._cancel), self._client.stream("POST", "/generate", json=body | self._options) as response:
            if response.status_code != 200:
                response.read()
                raise _server_error(response)
            self._started = True
            for frame in _frames(response):
                print(frame["text"], end="", flush=True)
                if frame["finish_reason"] == "error":
                    print()
                    raise ServerError(frame["error"]["code"], frame["error"]["message"])
                if frame["finish_reason"] is not None:
                    print({"abort": " [cancelled]", "length": " [--max-tokens]"}.get(frame["finish_reason"], ""))

    def _cancel(self) -> None:
        self._post(stop=True)

    def _end(self) -> None:
        self._post(sequence_end=True)
        self._started = False

    def _post(self, **flags: bool) -> None:
        body = {"prompt": "", "instance_id": self._session, "request_output_len": 0, "sequence_start": False}
        self._client.post("/generate", json=body | flags)


class _Interrupt:
    """The first Ctrl-C calls `cancel` and lets the stream end by itself; a second is a KeyboardInterrupt."""

    def __init__(self, cancel: Any) -> None:
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
        return ServerError(f"HTTP {response.status_code}", "the server's answer is not lmserve's")
