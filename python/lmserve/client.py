"""A client of the session API, synchronous and asynchronous. It needs only httpx, neither torch nor the core.

An error reply is raised as `LmserveError`, with its status and its error object. Errors of the connection are httpx's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
import msgspec

from lmserve.errors import LmserveError
from lmserve.schemas.generate import GenerateReply
from lmserve.schemas.models import ModelList
from lmserve.schemas.sessions import Appended, Cancelled, Deleted, SessionCard, SessionList, Transcript

T = TypeVar("T")

URL: Final = "http://127.0.0.1:23333"
SESSIONS: Final = "/v1/sessions"
CONNECT_TIMEOUT: Final = 10.0

Prompt = str | Sequence[Mapping[str, str]]


class GenerateOptions(TypedDict, total=False):
    """Options of a turn; what is left out is the server's default."""

    session_id: int | str  # none: a turn without a session
    start: bool  # begin the session anew; false: it must exist, and the turn continues it
    end: bool  # the session ends with this turn
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    stop: list[str]
    ignore_eos: bool
    on_disconnect: Literal["rollback", "keep"]
    on_overflow: Literal["error", "truncate_output", "drop_oldest_turns"]


# Where `/generate` has a name of its own.
WIRE_NAMES: Final = {
    "session_id": "instance_id",
    "start": "sequence_start",
    "end": "sequence_end",
    "max_tokens": "request_output_len",
    "stop": "stop_words",
}


def path_of(session_id: int | str, verb: str = "") -> str:
    return f"{SESSIONS}/{quote(str(session_id), safe='')}{verb}"


def headers_of(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def timeout_of(seconds: float | None) -> httpx.Timeout:
    """Answers may take long: without a limit of the caller's, only the connection has one."""
    return httpx.Timeout(seconds, connect=CONNECT_TIMEOUT if seconds is None else seconds)


def error_of(response: httpx.Response) -> LmserveError:
    """A reply that is no 2xx, once it is read."""
    try:
        error = msgspec.json.decode(response.content)["error"]
        return LmserveError(response.status_code, {"code": "error", **error})
    except (msgspec.DecodeError, LookupError, TypeError):
        message = f"{response.request.url} answered {response.status_code} {response.reason_phrase}"
        return LmserveError.new(response.status_code, "not_lmserve", message)


class Frames:
    """The frames of a streamed `/generate` reply, from pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, piece: bytes) -> Iterator[GenerateReply]:
        """The frames that are whole now. Raises LmserveError in place of one that says that the turn failed."""
        *whole, self._rest = (self._rest + piece).split(b"\0")
        for frame in whole:
            reply = msgspec.json.decode(frame, type=GenerateReply)
            if not isinstance(reply.error, msgspec.UnsetType):
                raise LmserveError(500, msgspec.to_builtins(reply.error))
            yield reply


def generate_body(prompt: Prompt, options: GenerateOptions, *, stream: bool) -> dict[str, Any]:
    """The body of `/generate`."""
    body = {WIRE_NAMES.get(name, name): value for name, value in options.items()}
    if "session_id" in options:
        body.setdefault("sequence_start", False)
    return {"prompt": prompt if isinstance(prompt, str) else list(prompt), "stream": stream, **body}


class Client:
    """A server's sessions. Close it, or use it as a context manager."""

    def __init__(self, url: str = URL, *, api_key: str | None = None, timeout: float | None = None) -> None:
        """`timeout`: seconds for each reply, or for each piece of a streamed one; None: no limit."""
        self._http = httpx.Client(base_url=url, headers=headers_of(api_key), timeout=timeout_of(timeout))

    def models(self) -> ModelList:
        """The names under which the model is served."""
        return self._call("GET", "/v1/models", ModelList)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerateReply:
        """Run one turn. `prompt`: a user turn, or a whole conversation of `{role, content}`."""
        body = generate_body(prompt, options, stream=False)
        return self._call("POST", "/generate", GenerateReply, body)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[GenerateReply]:
        """Run one turn: its frames as they come. To stop reading is to leave, and the turn is forgotten."""
        body = generate_body(prompt, options, stream=True)
        frames = Frames()
        with self._http.stream("POST", "/generate", json=body) as response:
            if not response.is_success:
                response.read()
                raise error_of(response)
            for piece in response.iter_bytes():
                yield from frames.push(piece)

    def sessions(self, *, limit: int = 100, after: int | str = -1) -> SessionList:
        """A page of the key's sessions in order of their ids, after the id `after`; -1: the first page."""
        return self._call("GET", f"{SESSIONS}?limit={limit}&after={quote(str(after), safe='')}", SessionList)

    def session(self, session_id: int | str) -> SessionCard:
        """A session's size, age, and what of it is cached."""
        return self._call("GET", path_of(session_id), SessionCard)

    def transcript(self, session_id: int | str, *, token_ids: bool = False) -> Transcript:
        """A session's turns."""
        return self._call("GET", path_of(session_id, f"/transcript?token_ids={str(token_ids).lower()}"), Transcript)

    def fork(self, session_id: int | str, new_id: int | str, *, turns: int | None = None) -> SessionCard:
        """Begin session `new_id` where `session_id` stood after `turns` turns; None: where it stands."""
        body = {"session_id": new_id, "turns": turns}
        return self._call("POST", path_of(session_id, "/fork"), SessionCard, body)

    def rewind(self, session_id: int | str, turns: int) -> SessionCard:
        """Take a session back to where it stood after `turns` turns."""
        return self._call("POST", path_of(session_id, "/rewind"), SessionCard, {"turns": turns})

    def append(self, session_id: int | str, prompt: Prompt, *, create: bool = False) -> Appended:
        """Append messages to a session's history without an answer. `create`: create the session if there is none."""
        body = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "create": create}
        return self._call("POST", path_of(session_id, "/append"), Appended, body)

    def cancel(self, session_id: int | str) -> Cancelled:
        """End a session's running turn with what it has generated."""
        return self._call("POST", path_of(session_id, "/cancel"), Cancelled)

    def delete(self, session_id: int | str) -> Deleted:
        """End a session."""
        return self._call("DELETE", path_of(session_id), Deleted)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, method: str, path: str, reply: type[T], body: Mapping[str, Any] | None = None) -> T:
        response = self._http.request(method, path, json=body)
        if not response.is_success:
            raise error_of(response)
        return msgspec.json.decode(response.content, type=reply)


class AsyncClient:
    """`Client` for asyncio: the same methods, to be awaited; `stream` is an async iterator."""

    def __init__(self, url: str = URL, *, api_key: str | None = None, timeout: float | None = None) -> None:
        """As `Client`."""
        self._http = httpx.AsyncClient(base_url=url, headers=headers_of(api_key), timeout=timeout_of(timeout))

    async def models(self) -> ModelList:
        """As `Client.models`."""
        return await self._call("GET", "/v1/models", ModelList)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerateReply:
        """As `Client.generate`."""
        body = generate_body(prompt, options, stream=False)
        return await self._call("POST", "/generate", GenerateReply, body)

    async def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncIterator[GenerateReply]:
        """As `Client.stream`. Close the iterator to leave before its end."""
        body = generate_body(prompt, options, stream=True)
        frames = Frames()
        async with self._http.stream("POST", "/generate", json=body) as response:
            if not response.is_success:
                await response.aread()
                raise error_of(response)
            async for piece in response.aiter_bytes():
                for frame in frames.push(piece):
                    yield frame

    async def sessions(self, *, limit: int = 100, after: int | str = -1) -> SessionList:
        """As `Client.sessions`."""
        return await self._call("GET", f"{SESSIONS}?limit={limit}&after={quote(str(after), safe='')}", SessionList)

    async def session(self, session_id: int | str) -> SessionCard:
        """As `Client.session`."""
        return await self._call("GET", path_of(session_id), SessionCard)

    async def transcript(self, session_id: int | str, *, token_ids: bool = False) -> Transcript:
        """As `Client.transcript`."""
        path = path_of(session_id, f"/transcript?token_ids={str(token_ids).lower()}")
        return await self._call("GET", path, Transcript)

    async def fork(self, session_id: int | str, new_id: int | str, *, turns: int | None = None) -> SessionCard:
        """As `Client.fork`."""
        body = {"session_id": new_id, "turns": turns}
        return await self._call("POST", path_of(session_id, "/fork"), SessionCard, body)

    async def rewind(self, session_id: int | str, turns: int) -> SessionCard:
        """As `Client.rewind`."""
        return await self._call("POST", path_of(session_id, "/rewind"), SessionCard, {"turns": turns})

    async def append(self, session_id: int | str, prompt: Prompt, *, create: bool = False) -> Appended:
        """As `Client.append`."""
        body = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "create": create}
        return await self._call("POST", path_of(session_id, "/append"), Appended, body)

    async def cancel(self, session_id: int | str) -> Cancelled:
        """As `Client.cancel`."""
        return await self._call("POST", path_of(session_id, "/cancel"), Cancelled)

    async def delete(self, session_id: int | str) -> Deleted:
        """As `Client.delete`."""
        return await self._call("DELETE", path_of(session_id), Deleted)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _call(self, method: str, path: str, reply: type[T], body: Mapping[str, Any] | None = None) -> T:
        response = await self._http.request(method, path, json=body)
        if not response.is_success:
            raise error_of(response)
        return msgspec.json.decode(response.content, type=reply)
