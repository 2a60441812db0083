"""Sends a workload to a server and collects the outcome of each request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import msgspec
from msgspec import Struct

from lmserve.bench.http import Connection, HttpError, Target
from lmserve.bench.outcome import Outcome, shorten
from lmserve.bench.workload import Conversation, Workload

OWN_NAME = "lmserve"


class _Model(Struct):
    id: str
    owned_by: str = ""


class _Models(Struct):
    data: list[_Model]


class ServerError(Exception):
    """The server cannot be measured; the message says why."""


@dataclass(frozen=True)
class Server:
    """A server, its model, and whether it keeps conversations, so that only what is new must be sent."""

    target: Target
    model: str
    sessions: bool
    timeout: float  # seconds a request may take


async def discover(target: Target, *, model: str | None, patience: float, resend_history: bool = False) -> Server:
    """Ask the server what it serves; `patience`: seconds that a request may take. Raises ServerError."""
    body = bytearray()
    connection = Connection(target)
    try:
        async with asyncio.timeout(patience):
            status = await connection.request("GET", "/v1/models", b"", lambda data, _now: body.extend(data))
    except (HttpError, TimeoutError) as error:
        raise ServerError(f"no server answers at {target.url}: {error or 'no reply in time'}") from error
    finally:
        connection.close()
    if status != 200:
        raise ServerError(f"{target.url}/v1/models answers {status}: {_reason(body)}")
    try:
        served = msgspec.json.decode(body, type=_Models).data
    except msgspec.DecodeError as error:
        raise ServerError(f"{target.url}/v1/models is not OpenAI's: {error}") from error
    if not served:
        raise ServerError(f"{target.url} serves no model")
    chosen = next((entry for entry in served if model in (None, entry.id)), None)
    own = any(entry.owned_by == OWN_NAME for entry in served)
    # A server may accept names that it does not list; the first request will tell.
    name = model if chosen is None else chosen.id
    assert name is not None
    return Server(target, name, sessions=own and not resend_history, timeout=patience)


@dataclass
class Run:
    """One workload at one concurrency. `turns`: the outcomes of each conversation's first, second, ... turn."""

    workload: str
    concurrency: int
    elapsed: float  # seconds from the first request to the last reply
    turns: list[list[Outcome]]

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for turn in self.turns for outcome in turn]


class Load:
    """One run in progress; `outcomes` grows while it runs."""

    def __init__(
        self,
        server: Server,
        workload: Workload,
        concurrency: int,
        conversations: Sequence[Conversation],
        *,
        first_session: int,
        on_end: Callable[[Load], None] = lambda _load: None,
    ) -> None:
        """`first_session`: the conversations' ids on a server that keeps them are this and those after it."""
        self.total = sum(len(conversation) for conversation in conversations)
        self.outcomes: list[Outcome] = []
        self.started = 0.0
        self.concurrency = concurrency
        self.workload = workload
        self._server = server
        self._waiting = deque(enumerate(conversations, first_session))
        self._turns: list[list[Outcome]] = [[] for _ in range(max(map(len, conversations)))]
        self._on_end = on_end

    async def run(self) -> Run:
        """Put the load on the server, `concurrency` conversations at a time."""
        self.started = perf_counter()
        clients = min(self.concurrency, len(self._waiting))
        await asyncio.gather(*(self._client() for _ in range(clients)))
        return Run(self.workload.name, self.concurrency, perf_counter() - self.started, self._turns)

    async def _client(self) -> None:
        connection = Connection(self._server.target)
        try:
            while self._waiting:
                session, conversation = self._waiting.popleft()
                await self._converse(connection, session, conversation)
        finally:
            connection.close()

    async def _converse(self, connection: Connection, session: int, conversation: Conversation) -> None:
        history: list[dict[str, str]] = []
        for at, turn in enumerate(conversation):
            if (early := self.started + turn.arrival - perf_counter()) > 0:
                await asyncio.sleep(early)
            history.append({"role": "user", "content": turn.prompt})
            outcome = await self._request(connection, self._body(turn.output_tokens, history, session, at))
            outcome.check(turn.output_tokens)
            self.outcomes.append(outcome)
            self._turns[at].append(outcome)
            self._on_end(self)
            if outcome.error is not None:
                # The turns that build on this one would measure something else.
                return
            history.append({"role": "assistant", "content": "".join(outcome.text)})

    def _body(self, output_tokens: int, history: list[dict[str, str]], session: int, turn: int) -> bytes:
        body: dict[str, Any] = {
            "model": self._server.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.workload.route == "completions":
            body["prompt"] = history[-1]["content"]
        elif self._server.sessions:
            body |= {"messages": history[-1:], "session_id": session, "renew_session": turn == 0}
        else:
            body["messages"] = history
        return msgspec.json.encode(body)

    async def _request(self, connection: Connection, body: bytes) -> Outcome:
        path = "/v1/chat/completions" if self.workload.route == "chat" else "/v1/completions"
        outcome = Outcome(perf_counter())
        refusal = bytearray()

        def receive(data: bytes, now: float) -> None:
            # What is no stream has no event in it.
            if len(refusal) < MAX_REFUSAL:
                refusal.extend(data)
            outcome.feed(data, now)

        try:
            async with asyncio.timeout(self._server.timeout):
                status = await connection.request("POST", path, body, receive)
        except HttpError as error:
            outcome.error = str(error)
        except TimeoutError:
            outcome.error = f"no whole reply within {self._server.timeout:g} s"
        else:
            if status != 200:
                outcome.error = f"HTTP {status}: {_reason(refusal)}"
        return outcome


MAX_REFUSAL = 4096  # bytes of an error's body that are kept


def _reason(body: bytes | bytearray) -> str:
    try:
        reply = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return shorten(body.decode(errors="replace")) or "no body"
    return shorten(reply.get("error", reply) if isinstance(reply, dict) else reply)
