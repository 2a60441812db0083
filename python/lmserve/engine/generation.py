"""The answers of `LLM`, read from the core's wire format of completions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import msgspec
from msgspec import Struct

from lmserve.errors import LmserveError

FinishReason = Literal["stop", "length", "abort", "error"]
# How the core names a token that is asked for by its id.
ID_PREFIX: Final = "token_id:"


class Usage(Struct, frozen=True):
    """Tokens of all answers to one prompt; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a sampled token, and those of the likeliest ones by token id, the likeliest first."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `tokens`: how many were generated. `error`: why there is none, with the reason "error"."""

    text: str
    tokens: int
    finish_reason: FinishReason
    usage: Usage | None
    error: LmserveError | None = None
    token_ids: tuple[int, ...] = ()  # as they were sampled, the end token among them
    prompt_token_ids: tuple[int, ...] = ()  # with what the chat template wrote
    logprobs: tuple[TokenLogprob, ...] | None = None  # of each of token_ids, where `SamplingParams.logprobs` asks
    alternatives: tuple[Generation, ...] = ()  # with n > 1: the other answers to the same prompt

    @classmethod
    def failed(cls, error: LmserveError) -> Generation:
        """What stands for an answer that there is not."""
        return cls("", 0, "error", None, error)


class _Logprobs(Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Choice(Struct, frozen=True):
    text: str
    finish_reason: FinishReason | None
    logprobs: _Logprobs | None = None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class _Details(Struct, frozen=True):
    cached_tokens: int = 0


class _Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details = _Details()


class _Reply(Struct, frozen=True):
    choices: list[_Choice]
    usage: _Usage


def read_generation(body: bytes) -> Generation:
    """The answers in the whole reply to one prompt: the first, with the others as its alternatives."""
    reply = msgspec.json.decode(body, type=_Reply)
    counts = reply.usage
    usage = Usage(counts.prompt_tokens, counts.prompt_tokens_details.cached_tokens, counts.completion_tokens)
    prompt = tuple(reply.choices[0].prompt_token_ids)
    first, *others = (_answer(choice, usage, prompt) for choice in reply.choices)
    return replace(first, alternatives=tuple(others))


def _answer(choice: _Choice, usage: Usage, prompt: tuple[int, ...]) -> Generation:
    ids = tuple(choice.token_ids)
    reason = choice.finish_reason or "stop"
    logprobs = None if choice.logprobs is None else _logprobs(choice.logprobs)
    return Generation(choice.text, len(ids), reason, usage, None, ids, prompt, logprobs)


def _logprobs(given: _Logprobs) -> tuple[TokenLogprob, ...]:
    rows = zip(given.tokens, given.token_logprobs, given.top_logprobs, strict=True)
    return tuple(
        TokenLogprob(_id(token), logprob, {_id(other): value for other, value in (top or {}).items()})
        for token, logprob, top in rows
        if logprob is not None
    )


def _id(token: str) -> int:
    return int(token.removeprefix(ID_PREFIX))
