"""`POST /v1/completions`: OpenAI's text completions, without a chat template."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.body import StrictJson
from lmserve.api.openapi import responses, streams
from lmserve.api.parameters import given_or, sampling_params, stop_params, wants_usage
from lmserve.api.reply import EngineReply, GatheredReply
from lmserve.api.serving import serving_of, tenant_of
from lmserve.api.unsupported import refuse_unsupported
from lmserve.engine.async_engine import AsyncEngine, AsyncStream
from lmserve.engine.submission import Submission, Text, Tokens
from lmserve.errors import LmserveError
from lmserve.schemas.chat import ChatUsage, PromptTokensDetails
from lmserve.schemas.completions import (
    DEFAULT_MAX_TOKENS,
    MAX_CHOICES,
    MAX_PROMPTS,
    CompletionChoice,
    CompletionChunk,
    CompletionReply,
    CompletionRequest,
)


@post(
    "/v1/completions",
    dto=StrictJson[CompletionRequest],
    return_dto=None,
    status_code=200,
    operation_id="create_completion",
    summary="Continue texts",
    description="OpenAI's text completions: each prompt is continued as it stands. Several prompts share one reply.",
    tags=["OpenAI"],
    operation_class=streams("text/event-stream", CompletionChunk, "Server-sent events, the last one `[DONE]`."),
    responses=responses(CompletionReply, 400, 401, 404, 408, 413, 429, 503),
)
async def completions(data: JSONBody[CompletionRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """A text for each prompt, or `n`."""
    serving = serving_of(request)
    engine = serving.engine
    serving.check_model(data.model)
    requests = submissions(data, tenant=tenant_of(request))
    if data.stream:
        return EngineReply(engine.submit(requests[0]), media_type="text/event-stream; charset=utf-8", stream=True)
    echoed = [_text_of(submission) for submission in requests] if data.echo else None
    if len(requests) == 1 and echoed is None:
        return EngineReply(engine.submit(requests[0]))
    return GatheredReply(GatheredCompletion(submit_all(engine, requests), echoed))


def submissions(data: CompletionRequest, *, tenant: int) -> list[Submission]:
    """The request as the core takes it, one for each prompt. Raises LmserveError (400) for what cannot be honoured."""
    refuse_unsupported(data)
    inputs = _inputs(data)
    n = given_or(data.n, 1)
    _check_choices(data, prompts=len(inputs), n=n)
    first = Submission(
        route="completions",
        reply_id=f"cmpl-{uuid.uuid4().hex}",
        model=data.model,
        created=int(time.time()),
        input=inputs[0],
        stream=bool(data.stream),
        include_usage=wants_usage(data),
        n=n,
        tenant=tenant,
        priority=given_or(data.priority, 0),
        sampling=sampling_params(data, logprobs=data.logprobs),
        stopping=stop_params(data, max_tokens=given_or(data.max_tokens, DEFAULT_MAX_TOKENS)),
    )
    return [first, *(msgspec.structs.replace(first, input=prompt) for prompt in inputs[1:])]


def submit_all(engine: AsyncEngine, requests: Sequence[Submission]) -> list[AsyncStream]:
    """Hand all to the core, or none. Raises the LmserveError of the first that the core refuses."""
    opened: list[AsyncStream] = []
    try:
        for submission in requests:
            stream = engine.submit(submission)
            opened.append(stream)
    except LmserveError:
        for stream in opened:
            stream.abort()
        raise
    return opened


class GatheredCompletion:
    """The replies to several prompts as one, with each prompt's text before its choices where it is `echoed`."""

    def __init__(self, requests: Sequence[AsyncStream], echoed: Sequence[str] | None) -> None:
        self._requests = requests
        self._echoed = echoed

    async def body(self) -> bytes:
        """The reply's JSON. Raises the LmserveError of the first request that fails, or 499 after `abort`."""
        bodies = await asyncio.gather(*(stream.body() for stream in self._requests))
        replies = [msgspec.json.decode(body, type=CompletionReply) for body in bodies]
        choices: list[CompletionChoice] = []
        for at, reply in enumerate(replies):
            echo = self._echoed[at] if self._echoed else ""
            for choice in reply.choices:
                choices.append(msgspec.structs.replace(choice, index=len(choices), text=echo + choice.text))
        merged = msgspec.structs.replace(replies[0], choices=choices, usage=_total([reply.usage for reply in replies]))
        return msgspec.json.encode(merged)

    def abort(self) -> None:
        """Stop all requests. Idempotent."""
        for stream in self._requests:
            stream.abort()


def _total(usages: Sequence[ChatUsage]) -> ChatUsage:
    return ChatUsage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
        ),
    )


def _inputs(data: CompletionRequest) -> list[Text] | list[Tokens]:
    if isinstance(data.prompt, str):
        return [Text(data.prompt)]
    ids = [item for item in data.prompt if isinstance(item, int)]
    if len(ids) == len(data.prompt):
        return [Tokens(ids)]
    if len(data.prompt) > MAX_PROMPTS:
        message = f"prompt may hold {MAX_PROMPTS} prompts, but {len(data.prompt)} were given"
        raise LmserveError.invalid("prompt", message)
    texts = [Text(item) for item in data.prompt if isinstance(item, str)]
    tokens = [Tokens(item) for item in data.prompt if isinstance(item, list)]
    for inputs in (texts, tokens):
        if len(inputs) == len(data.prompt):
            return inputs
    message = "prompt must be a text or a list of texts, of token ids or of lists of these, but a mixed list was given"
    raise LmserveError.invalid("prompt", message)


def _check_choices(data: CompletionRequest, *, prompts: int, n: int) -> None:
    if data.best_of not in (None, n):
        message = (
            f"best_of must be equal to n, {n}, for nothing is generated and thrown away, but {data.best_of} was given"
        )
        raise LmserveError.invalid("best_of", message, "unsupported_parameter")
    if prompts * n > MAX_CHOICES:
        message = f"a request may have {MAX_CHOICES} choices, but {prompts} prompts with n {n} were given"
        raise LmserveError.invalid("n", message)
    if data.stream and prompts > 1:
        message = f"a stream answers one prompt, but {prompts} were given; send a request for each, or stream false"
        raise LmserveError.invalid("stream", message, "unsupported_parameter")
    if data.echo and (data.stream or data.logprobs is not None):
        other = "stream" if data.stream else "logprobs"
        message = f"echo is not supported together with {other}; leave one of them out"
        raise LmserveError.invalid("echo", message, "unsupported_parameter")


def _text_of(submission: Submission) -> str:
    if isinstance(submission.input, Text):
        return submission.input.text
    message = "echo needs prompts of text, but token ids were given"
    raise LmserveError.invalid("echo", message, "unsupported_parameter")
