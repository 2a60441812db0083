"""Runs a request of `/v1/responses`. A stored response is a session of the core, and a continuation is a fork of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from lmserve.api.convert.parameters import given_or, output_limit, sampling_params, stop_params
from lmserve.api.convert.preamble import stable
from lmserve.api.convert.response_items import known_items, messages_of, stored_items
from lmserve.api.convert.thinking import response_thinking
from lmserve.api.convert.tools import Functions, response_calling
from lmserve.api.convert.unsupported import Ignored, refuse_unsupported
from lmserve.api.http.serving import Serving, model_of
from lmserve.api.responses.events import ResponseEvents
from lmserve.api.responses.outcome import Outcome, RecordedResponse, Said, ends_well, recorded
from lmserve.api.responses.store import (
    StoredResponse,
    new_response_id,
    no_response,
    session_of,
)
from lmserve.api.state.conversations import OpenTurn, Standing
from lmserve.engine.async_engine import turn_key
from lmserve.engine.stream import AsyncStream
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
from lmserve.schemas.response_reply import Asked, ResponseEvent, ResponseFailure, ResponseReply
from lmserve.schemas.responses import ConversationRef, InputItem, ResponsesRequest, SchemaFormat

LOGPROBS: Final = "message.output_text.logprobs"
PREVIOUS: Final = "previous_response_id"
PAUSES: Final = (0.05, 0.2, 1.0)  # seconds between two tries of ending a session


class ResponseTurn:
    """A request on its way to the core, and its place among the stored responses."""

    def __init__(
        self,
        data: ResponsesRequest,
        ignored: Ignored,
        serving: Serving,
        tenant: int,
        lane: str | None,
        standing: Standing | None = None,
    ) -> None:
        """Raises LmserveError (400, 404) for what cannot be honoured; hints that are not are added to `ignored`.

        `standing`: of the conversation that it goes on in.
        """
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
        # In a conversation, what follows the same items again is another response.
        self._id = new_response_id(turn_key.get() if data.conversation is None else None)
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
        self._standing = standing
        if standing is not None and standing.pending:
            # An item that cannot be read was named by its place in the request.
            before = [msgspec.json.decode(body, type=InputItem) for body in standing.pending]
            messages = messages_of([*before, *items], functions)
        parent, in_force = self._going_on()
        self._parent = None if parent is None else session_of(parent, PREVIOUS)
        self._instructions = in_force if data.instructions is None else data.instructions
        if self._instructions is not None and (parent is None or in_force != self._instructions):
            messages.insert(0, {"role": "system", "content": self._instructions})
        if messages and messages[0]["role"] == "system":
            messages[0]["content"] = stable(messages[0]["content"], ignored)
        self._messages = messages

    def _going_on(self) -> tuple[str | None, str | None]:
        """The response whose session has what came before, and the instructions in force."""
        if self._standing is not None:
            tip = self._standing.tip
            return None if tip is None else tip.response_id, self._standing.instructions
        parent = self._data.previous_response_id
        before = None if parent is None else self._serving.responses.get(self._tenant, parent)
        return parent, None if before is None else before.instructions

    def start(self, open_turn: OpenTurn | None = None) -> RecordedResponse:
        """Hand it to the core. Raises LmserveError if that refuses at once.

        `open_turn`: of its conversation; it is ended with the response.
        """
        stream = self._submit(stream=bool(self._data.stream))
        if self._stores:
            self._keep()
        return RecordedResponse(stream, self._outcome(open_turn))

    def run_in_background(self, open_turn: OpenTurn | None = None) -> StoredResponse:
        """Begin to run it, whoever waits for it. Raises as `start`; a later refusal is the response's error.

        Where it is streamed, the response has events, which tell of a refusal.
        """
        stream = self._submit(stream=bool(self._data.stream))
        stored = self._keep(ResponseEvents() if self._data.stream else None)
        self._serving.responses.write_down(self._tenant, self._id)
        task = asyncio.create_task(self._run(stream, stored.events, self._outcome(open_turn)))
        self._serving.background.add(task)
        task.add_done_callback(self._serving.background.discard)
        return stored

    def _outcome(self, open_turn: OpenTurn | None) -> Outcome:
        said = None
        if open_turn is not None:
            said = Said(open_turn, self._serving.engine, self._instructions, self._items, stored=self._stores)
        store = self._serving.responses if self._stores else None
        return Outcome(store, self._tenant, self._id, said, self._give_up)

    def _give_up(self) -> None:
        """End the session of a response that is kept nowhere."""
        if self._has_session:
            task = asyncio.create_task(self._end_session())
            self._serving.background.add(task)
            task.add_done_callback(self._serving.background.discard)

    async def _end_session(self) -> None:
        # If it cannot be ended, it is one more for the server to evict.
        for pause in PAUSES:
            try:
                await self._serving.engine.end_session(self._tenant, session_of(self._id), cancel=True)
            except LmserveError:
                # Its turn has ended, and is about to be committed.
                await asyncio.sleep(pause)
            else:
                return

    @property
    def _has_session(self) -> bool:
        return self._stores or self._parent is not None or self._standing is not None

    @property
    def id(self) -> str:
        """The response's."""
        return self._id

    @property
    def instructions(self) -> str | None:
        """Those in force."""
        return self._instructions

    @property
    def stores(self) -> bool:
        """Whether the response is kept as one."""
        return self._stores

    def events_without_output(self) -> list[bytes]:
        """What a client reads of a response for which nothing is computed: the `data` of its events."""
        ended = msgspec.structs.replace(self._reply(), status="completed")
        told = [
            ResponseEvent(type="response.created", sequence_number=0, response=self._reply()),
            ResponseEvent(type="response.completed", sequence_number=1, response=ended),
        ]
        return [msgspec.json.encode(event) for event in told]

    def standing_without_output(self) -> Standing:
        """Where a conversation then stands: the input waits for the next request."""
        before = self._standing or Standing("", None, None, [])
        pending = [*before.pending, *(msgspec.json.encode(item) for item in self._items)]
        instructions = self._instructions if before.tip is None else before.instructions
        return Standing(self._id, instructions, before.tip, pending)

    def count_tokens(self) -> int:
        """Number of tokens of the prompt, with the conversation before it. Blocks. Raises LmserveError (400, 404)."""
        with self._known_parent():
            return self._serving.engine.count_tokens(self._submission(stream=False))

    @property
    def size(self) -> int:
        """About how many characters the input is."""
        return len(msgspec.json.encode([self._messages, self._tools]))

    async def _run(self, stream: AsyncStream, events: ResponseEvents | None, outcome: Outcome) -> None:
        last, refusal = b"", None
        try:
            if events is None:
                body: bytes | None = await stream.body()
            else:
                body, last = await recorded(stream, events)
            if body is None:
                outcome.fail(self._failed(LmserveError.new(503, "draining", "the server stopped")))
            elif last and not ends_well(last):
                outcome.fail(body)
            else:
                await outcome.keep(body)
        except LmserveError as error:
            refusal = error if events is not None and not events.count else None
            outcome.fail(None if refusal else self._failed(error))
        finally:
            stream.abort()
        await self._serving.responses.settled()
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
        if self._has_session:
            # The tip of its conversation is kept, whether or not the response is stored.
            ends = not self._stores and self._standing is None
            session = SessionRef(id=session_of(self._id), start=self._parent is None, parent=self._parent, end=ends)
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


def conversation_id(data: ResponsesRequest) -> str | None:
    """The conversation that a request names. Raises LmserveError (400) if it also names a previous response."""
    given = data.conversation
    if given is not None and data.previous_response_id is not None:
        message = "conversation and previous_response_id cannot be combined, but both were given"
        raise LmserveError.invalid("conversation", message)
    return given.id if isinstance(given, ConversationRef) else given


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
        conversation=None if data.conversation is None else ConversationRef(conversation_id(data) or ""),
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
