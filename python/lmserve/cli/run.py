"""`lmserve run`: one command to a conversation. It serves the model if no server does, and chats."""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from lmserve.cli.chat import DEFAULT_URL, add_chat_options, talk
from lmserve.cli.conversation import HELP
from lmserve.cli.errors import CommandError

if TYPE_CHECKING:
    from lmserve.cli.types import Commands

READY: Final = re.compile(r"^Ready after", re.MULTILINE)
ADDRESS: Final = re.compile(r"^API +(https?://\S+)$", re.MULTILINE)


def add_parser(commands: Commands) -> None:
    description = (
        "Chat with MODEL. If a server at the default address serves this model, lmserve uses it. "
        "Otherwise it starts a server on a free port and stops it after the conversation. With "
        "QUESTION, or with text from a pipe, it answers once."
    )
    parser = commands.add_parser(
        "run",
        help="chat with a model; starts a server for it if none is running",
        description=description,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="the model, as for serve (default: the default model)"
    )
    parser.add_argument("question", metavar="QUESTION", nargs="*", help="answer this question and exit")
    add_chat_options(parser)
    parser.common = ("--session", "--system", "--max-tokens", "--temperature", "--plain")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    question = " ".join(arguments.question) or None
    if not sys.stdin.isatty():
        # What comes from a pipe is what the question is about.
        piped = sys.stdin.read().strip()
        question = "\n\n".join(part for part in (question, piped) if part)
        if not question:
            raise CommandError("there is no question: give one as an argument or through a pipe")
    if _serves(DEFAULT_URL, arguments):
        return talk(DEFAULT_URL, arguments, question)
    _fetch(arguments.model)
    with _server(arguments.model) as url:
        return talk(url, arguments, question)


def _serves(url: str, arguments: argparse.Namespace) -> bool:
    """Whether a server answers there and has the model that was asked for."""
    import httpx

    from lmserve.hub.errors import HubError
    from lmserve.hub.names import served_name

    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    try:
        reply = httpx.get(f"{url}/v1/models", headers=headers, timeout=2)
        names = [card["id"] for card in reply.json()["data"]] if reply.status_code == 200 else None
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return False
    if names is None or arguments.model is None:
        return names is not None
    try:
        wanted = {arguments.model, served_name(arguments.model)}
    except HubError:
        # The server that is started for it says why.
        return False
    return any(name in wanted for name in names)


def _fetch(model: str | None) -> None:
    """Fetch a model that is named and not here, as its progress is seen: the server that is started has no terminal."""
    if model is not None and Path(model).expanduser().exists():
        return
    from lmserve.cli.models import tell
    from lmserve.cli.progress import DownloadProgress
    from lmserve.errors import LmserveError
    from lmserve.source import SourceError, find_model

    try:
        find_model(model, DownloadProgress(model or "the default model"), tell)
    except (SourceError, LmserveError) as error:
        raise CommandError(str(error)) from error


@contextlib.contextmanager
def _server(model: str | None) -> Iterator[str]:
    """A server of our own; its address, once its model is loaded."""
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "lmserve", "serve", *([] if model is None else [model]), "--port", "0"]
        # A session of its own: Ctrl-C cancels an answer here, and must not reach the server.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield _wait(process, output, model)
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], output: IO[bytes], model: str | None) -> str:
    shown = sys.stderr.isatty()
    started = time.monotonic()
    name = Path(model).name if model else "the default model"
    while process.poll() is None:
        text = _printed(output)
        if (address := ADDRESS.search(text)) and READY.search(text):
            if shown:
                sys.stderr.write("\r\x1b[K")
            return address[1]
        if shown:
            sys.stderr.write(f"\rLoading {name} … {time.monotonic() - started:.0f} s")
            sys.stderr.flush()
        time.sleep(0.1)
    lines = _printed(output).strip().splitlines() or ["the server ended without a message"]
    raise CommandError(lines[-1].removeprefix("lmserve: error: "))


def _printed(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode("utf-8", "replace")
