"""Reads the id of a session: an integer or a string, in the body, in the path, or in a header."""

from __future__ import annotations

import unicodedata
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from litestar import Request
from msgspec import Struct, structs

from lmserve.engine.sessions import SessionId
from lmserve.errors import LmserveError
from lmserve.schemas.bounds import ANONYMOUS, MAX_SESSION_CHARS, MAX_SESSION_NUMBER

T = TypeVar("T", bound=Struct)

# Names the session where the body names none.
HEADER: Final = "x-lmserve-session"
# Longest quotation of what was given, in characters.
MAX_QUOTE: Final = 40


def session_id_of(given: int | str, param: str) -> SessionId | None:
    """The session's id in one form: a number for its digits, too. None: no session, which -1 stands for.

    Raises LmserveError (400) for what is no id.
    """
    if isinstance(given, int):
        return None if given == ANONYMOUS else given
    if not 1 <= len(given) <= MAX_SESSION_CHARS:
        message = f"{param}: a session id must have 1 to {MAX_SESSION_CHARS} characters, but {len(given)} were given"
        raise LmserveError.invalid(param, message)
    control = next((character for character in given if unicodedata.category(character) == "Cc"), None)
    if control is not None:
        message = f"{param}: a session id must not have control characters, but U+{ord(control):04X} was given"
        raise LmserveError.invalid(param, message)
    if given == str(ANONYMOUS):
        return None
    if given.isascii() and given.isdigit() and str(int(given)) == given and int(given) <= MAX_SESSION_NUMBER:
        return int(given)
    return given


def named_session(given: int | str, param: str) -> SessionId:
    """As `session_id_of`, where there must be a session. Raises LmserveError (400) for -1."""
    found = session_id_of(given, param)
    if found is None:
        raise LmserveError.invalid(param, f"{param} must name a session, but -1 was given, which means no session")
    return found


def session_in_path(given: str) -> SessionId:
    """The id in a path, where a slash and a percent sign are quoted twice. Raises LmserveError (400)."""
    return named_session(unquote(given), "session_id")


def with_session(data: T, field: str, request: Request[Any, Any, Any]) -> T:
    """The request with its session's id in `field`, whether it was named there or by the header; -1: no session.

    Raises LmserveError (400) for what is no id, and where body and header name two.
    """
    given = getattr(data, field)
    named = None if given is None else session_id_of(given, field)
    by_header = _in_header(request)
    if by_header is not None and named is not None and named != by_header:
        message = f"{HEADER} names the session {_quoted(by_header)}, but {field} names {_quoted(named)}"
        raise LmserveError.invalid(field, message)
    chosen = by_header if named is None else named
    return structs.replace(data, **{field: ANONYMOUS if chosen is None else chosen})


def _in_header(request: Request[Any, Any, Any]) -> SessionId | None:
    given = request.headers.get(HEADER)
    if given is None:
        return None
    try:
        # A header's bytes come as Latin-1.
        text = given.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise LmserveError.invalid(HEADER, f"{HEADER} must be UTF-8, but {given[:MAX_QUOTE]!r} was given") from error
    return session_id_of(text, HEADER)


def _quoted(session_id: SessionId) -> str:
    return repr(session_id)[:MAX_QUOTE]
