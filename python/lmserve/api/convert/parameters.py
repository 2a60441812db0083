"""Parameters that several routes pass to the core."""

from __future__ import annotations

from typing import Final, TypeVar

from msgspec import structs

from lmserve.api.convert.session_state import retention_of
from lmserve.engine.sessions import SessionId
from lmserve.engine.submission import OnDisconnect, SamplingParams, SessionRef, StopParams, TokenIds, UsageChunks
from lmserve.errors import LmserveError
from lmserve.schemas.bounds import ANONYMOUS, MAX_TOKENS
from lmserve.schemas.completion_sampling import CompletionSampling
from lmserve.schemas.retention import Retention
from lmserve.schemas.sampling import UNLIMITED, SamplingRequest

T = TypeVar("T")

_U64: Final = 2**64


def given_or(value: T | None, default: T) -> T:
    return default if value is None else value


def top_k(value: int | None) -> int | None:
    """0 for the two ways to ask for all tokens; None is left to the model's default."""
    return None if value is None else max(value, 0)


def seed_bits(seed: int | None) -> int | None:
    """The seed as the unsigned number with the same 64 bits."""
    return None if seed is None else seed % _U64


def session_ref(
    session_id: SessionId,
    *,
    start: bool,
    create: bool,
    end: bool,
    on_disconnect: OnDisconnect,
    by_default: bool = False,
    retention: Retention | None = None,
) -> SessionRef | None:
    """The turn's session; None for an anonymous one. `by_default`: the client has not said whether it starts.

    Raises LmserveError (400) for a retention of none.
    """
    kept = retention_of(retention)
    if session_id != ANONYMOUS:
        return SessionRef(
            id=session_id,
            start=start,
            by_default=by_default,
            create=create,
            end=end,
            on_disconnect=on_disconnect,
            retention=kept,
        )
    if kept is not None:
        raise LmserveError.invalid("retention", "retention needs a session, but the request names none")
    return None


def usage_chunks(data: CompletionSampling) -> UsageChunks:
    """Which chunks have the usage.

    Raises LmserveError (400) for options without a stream, and for the usage in every chunk but not at the end.
    """
    options = data.stream_options
    if options is None:
        return "none"
    if not data.stream:
        raise LmserveError.invalid("stream_options", "stream_options needs stream true")
    if not options.continuous_usage_stats:
        return "last" if options.include_usage else "none"
    if not options.include_usage:
        param = "stream_options.continuous_usage_stats"
        raise LmserveError.invalid(param, "continuous_usage_stats needs include_usage true")
    return "every"


def token_ids(data: CompletionSampling) -> TokenIds | None:
    """Where the reply has token ids; None: nowhere."""
    told = TokenIds(beside_text=bool(data.return_token_ids), as_tokens=bool(data.return_tokens_as_token_ids))
    return told if told.beside_text or told.as_tokens else None


def check_prompt_logprobs(data: CompletionSampling) -> None:
    """Raises LmserveError (400) where the prompt's log-probabilities would have to be streamed."""
    if data.stream and data.prompt_logprobs is not None:
        message = f"prompt_logprobs {data.prompt_logprobs} needs stream false, but stream is true"
        raise LmserveError.invalid("prompt_logprobs", message, "unsupported_parameter")


def output_limit(name: str, given: int | None) -> int | None:
    """Most tokens to generate; None: the default, or what there is room for. Raises LmserveError (400) for 0."""
    if given == 0:
        raise LmserveError.invalid(
            name, f"{name} must be at least 1, or {UNLIMITED} for as many as fit into the context, but 0 was given"
        )
    return unlimited(given)


def unlimited(given: int | None) -> int | None:
    """The limit, which is to be clamped: -1 is above what any context has left."""
    return MAX_TOKENS if given == UNLIMITED else given


def sampling_params(data: SamplingRequest, *, logprobs: int | None) -> SamplingParams:
    """How tokens are chosen; `logprobs`: alternatives to report for each, None: not even its own."""
    params = SamplingParams(
        temperature=data.temperature,
        top_k=top_k(data.top_k),
        top_p=data.top_p,
        min_p=data.min_p,
        repetition_penalty=data.repetition_penalty,
        seed=seed_bits(data.seed),
        logprobs=logprobs,
    )
    if not isinstance(data, CompletionSampling):
        return params
    return structs.replace(
        params,
        presence_penalty=given_or(data.presence_penalty, 0.0),
        frequency_penalty=given_or(data.frequency_penalty, 0.0),
        logit_bias=list(data.logit_bias.items()) if data.logit_bias else [],
    )


def stop_params(data: SamplingRequest, *, max_tokens: int | None) -> StopParams:
    """When generation ends. Raises LmserveError (400) where it could not end before `max_tokens`."""
    params = StopParams(max_tokens=max_tokens, stop=stop_strings(data.stop), ignore_eos=bool(data.ignore_eos))
    if not isinstance(data, CompletionSampling):
        return params
    min_tokens = given_or(data.min_tokens, 0)
    if max_tokens is not None and min_tokens > max_tokens:
        message = f"min_tokens must be at most max_tokens, {max_tokens}, but {min_tokens} was given"
        raise LmserveError.invalid("min_tokens", message)
    return structs.replace(
        params,
        min_tokens=min_tokens,
        stop_token_ids=data.stop_token_ids or [],
        include_stop=bool(data.include_stop_str_in_output),
        skip_special_tokens=given_or(data.skip_special_tokens, True),
    )


def stop_strings(given: bool | str | list[str] | None) -> list[str]:
    """LMDeploy's false stands for none. Raises LmserveError (400) for its true."""
    if given is True:
        message = "stop true cancels the running turn of a session, but this route has no sessions: give strings"
        raise LmserveError.invalid("stop", message)
    if isinstance(given, str):
        return [given]
    return given if isinstance(given, list) else []
