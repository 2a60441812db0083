"""A request of `/v1/responses`: a stored one is a session of the core, and going on from it is a branch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Self

import msgspec

from lmserve.api.convert.parameters import given_or, output_limit, sampling_params, stop_params
from lmserve.api.convert.preamble import stable
from lmserve.api.convert.response_items import known_items, messages_of, stored_items
from lmserve.api.convert.thinking import response_thinking
from lmserve.api.convert.tools import Functions, response_calling
from lmserve.api.convert.unsupported import Ignored, refuse_unsupported
from lmserve.api.http.serving import Serving, model_of
from lmserve.api.responses.events import ResponseEvents
from lmserve.api.responses.store import (
    ResponseStore,
    StoredResponse,
    new_response_id,
    no_response,
    session_of,
)
from lmserve.engine.async_engine import AsyncStream
from lmserve.engine.submission import (
    Guide,
    JsonObject,
    JsonSchema,
    Messages,
    SessionRef,
    Submission,
)
from lmserve.errors import LmserveError
from lmserve.model.generation_defaults import GenerationDefaults
from lmserve.schemas.guided import JsonObjectFormat, TextFormat
from lmserve.schemas.responses import (
    Asked,
    InputItem,
    ResponseFailure,
    ResponseReply,
    ResponsesRequest,
    SchemaFormat,
)

LOGPROBS: Final = "message.output_text.logprobs"
PREVIOUS: Final = "previous_response_id"
ENDS: Final = (b"event: response.completed\n", b"event: response.incomplete\n")
FAILED: Final = b"event: response.failed\n"


class ResponseTurn:
    """A request on its way to the core, and its place among the stored responses."""

    def __init__(
        self, data: ResponsesRequest, ignored: Ignored, serving: Serving, tenant: int, lane: str | None
    ) -> None:
        """Raises LmserveError (400, 404) for what cannot be honoured; hints that are not are added to `ignored`."""
        refuse_unsupported(data)
        ignored.hints_of(data)
        ignored.hints_of(data.text, "text.")
        for name in data.include or ():
            if name != LOGPROBS:
                ignored.add(f"include.{name}")
        self._lane = lane
        self._stores = given_or(data.store, True)
        _check_background(data, stores=self._stores)
        self._serving = serving
        self._tenant = tenant
        self._id = new_response_id()
        self._created = int(time.time())
        self._data = data
        text = serving.engine.text
        self._thinking = response_thinking(data, None if text is None else text.template, ignored)
        calling, functions = response_calling(data, ignored)
        self._tools, self._tool_choice = calling
        self._call_forms = functions.forms
        self._asked = _asked(data, functions, serving.engine.defaults, stores=self._stores)
        items = [InputItem(role="user", content=data.input)] if isinstance(data.input, str) else data.input
        items = known_items(items, ignored)
        messages = messages_of(items, functions)
        self._items = stored_items(items, self._id.removeprefix("resp_"))
        parent = data.previous_response_id
        self._parent = None if parent is None else session_of(parent, PREVIOUS)
        before = None if parent is None else serving.responses.get(tenant, parent)
        self._instructions = data.instructions
        if self._instructions is None and before is not None:
            self._instructions = before.instructions
        if data.instructions is not None and (before is None or before.instructions != data.instructions):
            messages.insert(0, {"role": "system", "content": data.instructions})
        if messages and messages[0]["role"] == "system":
            messages[0]["content"] = stable(messages[0]["content"], ignored)
        self._messages = messages

    def start(self) -> RecordedResponse:
        """Hand it to the core. Raises LmserveError if that refuses at once."""
        stream = self._submit(stream=bool(self._data.stream))
        if not self._stores:
            return RecordedResponse(stream, None, self._tenant, self._id)
        self._keep()
        return RecordedResponse(stream, self._serving.responses, self._tenant, self._id)

    def run_in_background(self) -> StoredResponse:
        """Begin to run it, whoever waits for it. Raises as `start`; a later refusal is the response's error.

        Where it is streamed, the response has events, which tell of a refusal.
        """
        stream = self._submit(stream=bool(self._data.stream))
        stored = self._keep(ResponseEvents() if self._data.stream else None)
        self._serving.responses.write_down(self._tenant, self._id)
        task = asyncio.create_task(self._run(stream, stored.events))
        self._serving.background.add(task)
        task.add_done_callback(self._serving.background.discard)
        return stored

    def count_tokens(self) -> int:
        """Tokens of the prompt, with what it goes on from. Blocks. Raises LmserveError (400, 404)."""
        with self._known_parent():
            return self._serving.engine.count_tokens(self._submission(stream=False))

    @property
    def size(self) -> int:
        """About how many characters the input is."""
        return len(msgspec.json.encode([self._messages, self._tools]))

    async def _run(self, stream: AsyncStream, events: ResponseEvents | None) -> None:
        responses = self._serving.responses
        body, last, refusal = None, b"", None
        try:
            if events is None:
                body = await stream.body()
            else:
                body, last = await _recorded(stream, events)
                if body is None:
                    body = self._failed(LmserveError.new(503, "draining", "the server stopped"))
        except LmserveError as error:
            if events is not None and not events.count:
                refusal = error
            else:
                body = self._failed(error)
        finally:
            stream.abort()
        responses.end(self._tenant, self._id, body)
        await responses.settled()
        if events is not None:
            # A reader hears of the end once the response is kept.
            events.add(last)
            events.end(refusal)

    def _failed(self, error: LmserveError) -> bytes:
        failure = ResponseFailure("server_error", str(error))
        return msgspec.json.encode(msgspec.structs.replace(self._reply(), status="failed", error=failure))

    def _keep(self, events: ResponseEvents | None = None) -> StoredResponse:
        stored = StoredResponse(
            instructions=self._instructions,
            items=self._items,
            body=msgspec.json.encode(self._reply()),
            events=events,
        )
        self._serving.responses.begin(self._tenant, self._id, stored)
        return stored

    def _reply(self) -> ResponseReply:
        return ResponseReply(
            id=self._id,
            created_at=self._created,
            status="in_progress",
            model=model_of(self._data),
            output=[],
            **msgspec.structs.asdict(self._asked),
        )

    def _submit(self, *, stream: bool) -> AsyncStream:
        with self._known_parent():
            return self._serving.engine.submit(self._submission(stream=stream))

    @contextmanager
    def _known_parent(self) -> Iterator[None]:
        try:
            yield
        except LmserveError as error:
            if error.status == 404 and self._data.previous_response_id is not None:
                raise no_response(self._data.previous_response_id, PREVIOUS) from error
            raise

    def _submission(self, *, stream: bool) -> Submission:
        data = self._data
        session = None
        if self._stores or self._parent is not None:
            session = SessionRef(
                id=session_of(self._id), start=self._parent is None, parent=self._parent, end=not self._stores
            )
        return Submission(
            route="responses",
            reply_id=self._id,
            model=model_of(self._data),
            created=self._created,
            envelope=msgspec.to_builtins(self._asked),
            input=Messages(self._messages, tools=self._tools, template_kwargs=self._thinking.variables),
            stream=stream,
            session=session,
            lane=self._lane,
            on_overflow="drop_oldest_then_truncate" if data.truncation == "auto" else "truncate_output",
            guide=_guide(data),
            guide_param="text.format",
            tool_choice=self._tool_choice,
            parallel_tool_calls=given_or(data.parallel_tool_calls, True),
            call_forms=self._call_forms,
            thinking_budget=self._thinking.budget,
            tenant=self._tenant,
            sampling=sampling_params(data, logprobs=_logprobs(data)),
            stopping=stop_params(data, max_tokens=output_limit("max_output_tokens", data.max_output_tokens)),
        )


async def _recorded(stream: AsyncStream, events: ResponseEvents) -> tuple[bytes | None, bytes]:
    """Read `stream` into `events` up to its last piece; the response that this one has, and the piece."""
    await stream.opened()
    async for chunk in stream.chunks():
        response = _response_at_end_of(chunk, (*ENDS, FAILED))
        if response is not None:
            return response, chunk
        events.add(chunk)
    return None, b""


class _LastEvent(msgspec.Struct):
    """The part of a stream's last event that is kept."""

    response: msgspec.Raw


class RecordedResponse:
    """The core's reply on its way to the client, kept at its end. One that does not get there is not kept."""

    def __init__(self, stream: AsyncStream, store: ResponseStore | None, tenant: int, response_id: str) -> None:
        """`store`: where it is kept; None: nowhere."""
        self._stream = stream
        self._store = store
        self._key = (tenant, response_id)

    @property
    def aborted(self) -> bool:
        """Whether `abort` came before the reply's end."""
        return self._stream.aborted

    async def opened(self) -> None:
        """As `AsyncStream.opened`."""
        await self._stream.opened()

    async def body(self) -> bytes:
        """As `AsyncStream.body`."""
        body = await self._stream.body()
        await self._keep(body)
        return body

    def chunks(self) -> Self:
        """As `AsyncStream.chunks`."""
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            events = await anext(self._stream)
        except StopAsyncIteration:
            self._end(None)
            raise
        if (response := _response_at_end_of(events)) is not None:
            # The client hears of the end once it is kept.
            await self._keep(response)
        return events

    def abort(self) -> None:
        """Stop the request. Does nothing after the reply's end. Idempotent."""
        self._stream.abort()
        # Nothing, where the outcome is there already.
        self._end(None)

    async def _keep(self, body: bytes) -> None:
        store = self._store
        self._end(body)
        if store is not None:
            await store.settled()

    def _end(self, body: bytes | None) -> None:
        if self._store is not None:
            self._store.end(*self._key, body)
            self._store = None


def _response_at_end_of(events: bytes, ends: tuple[bytes, ...] = ENDS) -> bytes | None:
    """The response where the last event is one of `ends`; after a failure there is no turn to go on from."""
    last = events[events.rfind(b"\nevent: ") + 1 :]
    if not last.startswith(ends):
        return None
    _, _, data = last.partition(b"\ndata: ")
    return bytes(msgspec.json.decode(data, type=_LastEvent).response)


def _check_background(data: ResponsesRequest, *, stores: bool) -> None:
    if not data.background:
        return
    if not stores:
        raise LmserveError.invalid("background", "background needs store true, but false was given")


def _logprobs(data: ResponsesRequest) -> int | None:
    if LOGPROBS in (data.include or ()):
        return given_or(data.top_logprobs, 0)
    if data.top_logprobs:
        message = f"top_logprobs {data.top_logprobs} needs {LOGPROBS!r} in include"
        raise LmserveError.invalid("top_logprobs", message)
    return None


def _asked(data: ResponsesRequest, functions: Functions, defaults: GenerationDefaults, *, stores: bool) -> Asked:
    choice = data.tool_choice or "auto"
    return Asked(
        background=bool(data.background),
        instructions=data.instructions,
        max_output_tokens=data.max_output_tokens,
        metadata=data.metadata or {},
        parallel_tool_calls=given_or(data.parallel_tool_calls, True),
        previous_response_id=data.previous_response_id,
        reasoning={"effort": None if data.reasoning is None else data.reasoning.effort, "summary": None},
        service_tier="default",
        store=stores,
        temperature=given_or(data.temperature, given_or(defaults.temperature, 1.0)),
        text={"format": msgspec.to_builtins(_format(data) or TextFormat())},
        tool_choice=choice if isinstance(choice, str) else _told(msgspec.to_builtins(choice)),
        tools=functions.told,
        top_logprobs=given_or(data.top_logprobs, 0),
        top_p=given_or(data.top_p, given_or(defaults.top_p, 1.0)),
        truncation=data.truncation or "disabled",
        user=data.user,
    )


def _told(choice: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choice.items() if value is not None}


def _format(data: ResponsesRequest) -> TextFormat | JsonObjectFormat | SchemaFormat | None:
    return None if data.text is None else data.text.format


def _guide(data: ResponsesRequest) -> Guide | None:
    match _format(data):
        case JsonObjectFormat(schema=schema):
            return JsonObject() if schema is None else JsonSchema({"type": "object"} | schema)
        case SchemaFormat(schema=schema, strict=strict):
            return JsonSchema(schema, bool(strict))
        case _:
            return None
