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

from lmserve.api.convert.guided import guide_of
from lmserve.api.convert.parameters import (
    check_prompt_logprobs,
    given_or,
    sampling_params,
    stop_params,
    token_ids,
    unlimited,
    usage_chunks,
)
from lmserve.api.convert.session_ids import session_id_of
from lmserve.api.convert.unsupported import Ignored, refuse_unsupported
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses, streams
from lmserve.api.http.reply import EngineReply, rewritten, sse_reply
from lmserve.api.http.serving import model_of, serving_of, tenant_of
from lmserve.api.http.shared_stream import SharedStream, total_usage
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.stream import AsyncStream
from lmserve.engine.submission import Submission, Text, Tokens
from lmserve.errors import LmserveError
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
    description="OpenAI's text completions. Each prompt is continued without a chat template. One reply "
    "answers all prompts.",
    tags=["OpenAI"],
    operation_class=streams("events", CompletionChunk, "Server-sent events. The last one is `[DONE]`."),
    responses=responses(CompletionReply, 400, 401, 404, 408, 413, 429, 503),
)
async def completions(data: JSONBody[CompletionRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """A text for each prompt, or `n`."""
    serving = serving_of(request)
    engine = serving.engine
    data = serving.with_model(data)
    if data.session_id is not None:
        session_id_of(data.session_id, "session_id")
    requests = submissions(data, tenant=tenant_of(request), fingerprint=serving.fingerprint)
    ignored = Ignored("/v1/completions")
    ignored.hints_of(data)
    headers = ignored.headers()
    if data.stream:
        return sse_reply(
            engine.submit(requests[0]) if len(requests) == 1 else SharedStream(submit_all(engine, requests)), headers
        )
    kept = given_or(data.n, 1)
    if len(requests) == 1 and requests[0].n == kept:
        return EngineReply(engine.submit(requests[0]), headers=headers)
    streams = submit_all(engine, requests)
    return EngineReply(GatheredCompletion(streams, kept, with_logprobs=data.logprobs is not None), headers=headers)


def submissions(data: CompletionRequest, *, tenant: int, fingerprint: str) -> list[Submission]:
    """The request as the core takes it, one for each prompt. Raises LmserveError (400) for what cannot be honoured."""
    refuse_unsupported(data)
    inputs = _inputs(data)
    n = given_or(data.n, 1)
    candidates = given_or(data.best_of, n)
    _check_choices(data, prompts=len(inputs), n=n, candidates=candidates)
    check_prompt_logprobs(data)
    guide, guide_param = guide_of(data)
    # The best are found by their log-probabilities.
    logprobs = data.logprobs if candidates == n else given_or(data.logprobs, 0)
    first = Submission(
        route="completions",
        reply_id=f"cmpl-{uuid.uuid4().hex}",
        model=model_of(data),
        created=int(time.time()),
        envelope={"system_fingerprint": fingerprint},
        input=inputs[0],
        stream=bool(data.stream),
        usage_chunks=usage_chunks(data),
        echo=bool(data.echo),
        prompt_logprobs=data.prompt_logprobs,
        token_ids=token_ids(data),
        n=candidates,
        tenant=tenant,
        priority=given_or(data.priority, 0),
        sampling=sampling_params(data, logprobs=logprobs),
        on_overflow="truncate_output",
        stopping=stop_params(data, max_tokens=_max_tokens(data)),
        guide=guide,
        guide_param=guide_param,
        guided_whitespace=data.guided_whitespace,
    )
    others = enumerate(inputs[1:], start=1)
    return [first, *(msgspec.structs.replace(first, input=prompt, first_choice=at * n) for at, prompt in others)]


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
    """The replies to several prompts as one, each with the best of its choices."""

    def __init__(self, requests: Sequence[AsyncStream], kept: int, *, with_logprobs: bool) -> None:
        """`kept`: choices of each reply that the client gets; `with_logprobs`: with their log-probabilities."""
        self._requests = requests
        self._kept = kept
        self._with_logprobs = with_logprobs

    async def body(self) -> bytes:
        """The reply's JSON. Raises the LmserveError of the first request that fails, or 499 after `abort`."""
        bodies = await asyncio.gather(*(stream.body() for stream in self._requests))
        return await rewritten(bodies, lambda: self._merged(bodies))

    def _merged(self, bodies: Sequence[bytes]) -> bytes:
        replies = [msgspec.json.decode(body, type=CompletionReply) for body in bodies]
        choices: list[CompletionChoice] = []
        for reply in replies:
            for choice in self._best(reply):
                logprobs = choice.logprobs if self._with_logprobs else None
                choices.append(msgspec.structs.replace(choice, index=len(choices), logprobs=logprobs))
        usage = total_usage([reply.usage for reply in replies])
        return msgspec.json.encode(msgspec.structs.replace(replies[0], choices=choices, usage=usage))

    def _best(self, reply: CompletionReply) -> list[CompletionChoice]:
        if len(reply.choices) == self._kept:
            return reply.choices

        def mean_logprob(choice: CompletionChoice) -> float:
            # An echoed prompt adds the same to all, and its first token nothing.
            logprobs = choice.logprobs.token_logprobs if choice.logprobs else []
            return sum(value or 0.0 for value in logprobs) / max(len(logprobs), 1)

        return sorted(reply.choices, key=mean_logprob, reverse=True)[: self._kept]

    def abort(self) -> None:
        """Stop all requests. Idempotent."""
        for stream in self._requests:
            stream.abort()


def _max_tokens(data: CompletionRequest) -> int | None:
    return unlimited(given_or(data.max_tokens, DEFAULT_MAX_TOKENS))


def _inputs(data: CompletionRequest) -> list[Text] | list[Tokens]:
    if isinstance(data.prompt, str):
        return [Text(data.prompt)]
    ids = [item for item in data.prompt if isinstance(item, int)]
    if len(ids) == len(data.prompt):
        return [Tokens(ids)]
    if len(data.prompt) > MAX_PROMPTS:
        message = f"prompt may have at most {MAX_PROMPTS} prompts, but {len(data.prompt)} were given"
        raise LmserveError.invalid("prompt", message)
    texts = [Text(item) for item in data.prompt if isinstance(item, str)]
    tokens = [Tokens(item) for item in data.prompt if isinstance(item, list)]
    for inputs in (texts, tokens):
        if len(inputs) == len(data.prompt):
            return inputs
    message = (
        "prompt must be a text, a list of texts, a list of token ids, or a list of such lists, but a "
        "mixed list was given"
    )
    raise LmserveError.invalid("prompt", message)


def _check_choices(data: CompletionRequest, *, prompts: int, n: int, candidates: int) -> None:
    if candidates < n:
        raise LmserveError.invalid("best_of", f"best_of must be at least n, {n}, but {candidates} was given")
    if candidates > n and data.stream:
        message = f"best_of {candidates} with n {n} cannot be streamed: the best are known only at the end"
        raise LmserveError.invalid("best_of", message, "unsupported_parameter")
    if prompts * candidates > MAX_CHOICES:
        each = f"n {n}" if candidates == n else f"best_of {candidates}"
        message = f"a request may have at most {MAX_CHOICES} choices, but {prompts} prompts with {each} were given"
        raise LmserveError.invalid("n" if candidates == n else "best_of", message)
