"""`lmserve chat`: talk to a running server. The conversation lives there, in one session; only the new turn is sent."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, Final

from lmserve.cli.conversation import HELP, Chat
from lmserve.cli.errors import CommandError

if TYPE_CHECKING:
    from lmserve.cli.types import Commands

DEFAULT_URL: Final = "http://127.0.0.1:23333"
DEFAULT_PORT: Final = 23333


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a running server",
        description="Talk to a running server over /generate. The server keeps the conversation in a session.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.common = ("--url", "--api-key", "--session", "--system", "--max-tokens", "--temperature", "--plain")
    parser.set_defaults(run=run)
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every flag of `chat`."""
    parser.add_argument("--url", default=DEFAULT_URL, help=f"URL of the server, or HOST:PORT (default: {DEFAULT_URL})")
    add_chat_options(parser)


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """The flags of a conversation, whichever server it is with."""
    parser.add_argument("--api-key", metavar="KEY", help="API key for the server (default: $LMSERVE_API_KEY)")
    parser.add_argument(
        "--session",
        metavar="ID",
        type=lambda text: int(text) if text.isascii() and text.isdigit() else text,
        help="continue or begin this session; it is kept afterwards (default: a new one, which is deleted "
        "when you leave)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the template's)")
    parser.add_argument(
        "--max-tokens",
        metavar="TOKENS",
        type=int,
        default=512,
        help="largest number of tokens in an answer (default: 512)",
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, help="sampling temperature; 0 is greedy (default: the server's)"
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        help="sample only from the most likely tokens whose probabilities add up to P (default: the server's)",
    )
    parser.add_argument(
        "--top-k",
        metavar="K",
        type=int,
        help="sample only from the K most likely tokens; 0 is all tokens (default: the server's)",
    )
    parser.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same answers (default: random)")
    parser.add_argument("--plain", action="store_true", help="print no bold text and no colours")


def full_url(given: str) -> str:
    """A server's address from any form that people type: a port, host:port, a URL with a path."""
    text = given.strip().rstrip("/")
    if re.fullmatch(r":?\d+", text):
        return f"http://127.0.0.1:{text.lstrip(':')}"
    if "://" in text:
        return text.removesuffix("/v1")
    host, slash, path = text.partition("/")
    has_port = re.search(r":\d+$", host) and (host.count(":") == 1 or "]" in host)
    if host.count(":") > 1 and "]" not in host:
        host = f"[{host}]"
    return f"http://{host}{'' if has_port else f':{DEFAULT_PORT}'}{slash}{path}".removesuffix("/v1")


def run(arguments: argparse.Namespace) -> int:
    return talk(full_url(arguments.url), arguments)


def talk(url: str, arguments: argparse.Namespace, question: str | None = None) -> int:
    """A conversation with the server at `url`, or one question. Raises CommandError where none answers."""
    import httpx

    key = arguments.api_key or os.environ.get("LMSERVE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Answers may take long; only the connection has a deadline.
    timeout = httpx.Timeout(None, connect=10.0)
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout) as client:
            return Chat(client, arguments, plain=arguments.plain).run(question)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        message = f"no server answers at {url} (start one with lmserve serve, or use lmserve run): {error}"
        raise CommandError(message) from error
    except BrokenPipeError:
        # Whoever read the answer has enough.
        sys.stderr.close()
        return 0
