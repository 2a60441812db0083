"""The scheduler for another model loop: it batches, and manages KV blocks, sessions and text; its caller computes.

`plan` says what to compute, and `commit` takes the sampled tokens and returns what happened to each request. It owns no
thread and no device, and needs neither torch nor litestar.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmserve import _core
from lmserve.engine.sessions import SessionId
from lmserve.engine.submission import (
    Guide,
    GuidedWhitespace,
    Messages,
    OnOverflow,
    SamplingParams,
    SessionRef,
    StopParams,
    Submission,
    Text,
    Tokens,
    encode,
)

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

_FLOATS = frozenset(
    {
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "uniform",
        "bias_value",
    }
)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes: T tokens of S sequences, of which R are sampled; a copy, yours to keep.

    Sequences lie one after another in the token arrays. Names and meanings are those of
    `lmserve.model.interface.StepBuffers` and `LogitEdits`.
    """

    sequences: list[tuple[int, int]]  # [S] (request, choice)
    token_ids: I32  # [T]
    positions: I32  # [T] absolute position of each token in its sequence
    slots: I32  # [T] block id * block_size + offset: where each token's K and V go
    query_start: I32  # [S + 1] sequence s owns tokens query_start[s] .. query_start[s + 1]
    context_lens: I32  # [S] tokens in the cache after this step, this step's included
    block_tables: I32  # [S, B] block ids; entries past the context are 0
    sample_rows: I32  # [R] index in the token arrays after which row r is sampled
    temperature: F32  # [R] 0: greedy
    top_k: I32  # [R] 0: all
    top_p: F32  # [R]
    min_p: F32  # [R]
    repetition_penalty: F32  # [R] 1: off
    presence_penalty: F32  # [R] 0: off
    frequency_penalty: F32  # [R] 0: off
    uniform: F32  # [R] in [0, 1), a function of seed and position
    bias_start: I32  # [R + 1] row r owns entries bias_start[r] .. bias_start[r + 1]
    bias_token: I32
    bias_value: F32  # added to the logit; -inf forbids the token
    seen_start: I32  # [R + 1]
    seen_token: I32  # distinct tokens of prompt and output, of rows with a penalty
    seen_count: I32  # occurrences in the output alone
    masks: _core.StepMasks | None  # of rows whose tokens follow a grammar


class Scheduler:
    """Continuous batching, prefix cache, sessions, stop strings, priorities and fair shares around any model.

    `num_blocks` KV blocks of `block_size` tokens each are the caller's memory: slot `block * block_size + offset` holds
    one token. Without a `tokenizer` prompts are token ids and events carry no text. `seed` makes the sampling of
    requests without a seed of their own repeatable; `clock` gives seconds, for the age of sessions alone.

    Raises LmserveError (400) for sizes that cannot work.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        max_model_len: int,
        max_batch: int = 64,
        max_batch_tokens: int = 2048,
        max_queue: int = 1024,
        tokenizer: _core.Tokenizer | None = None,
        template: _core.ChatTemplate | None = None,
        eos_token_ids: Sequence[int] = (),
        max_sessions: int = 100_000,
        session_ttl: float = 0.0,
        prefix_cache: bool = True,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = _core.Scheduler(
            tokenizer,
            template,
            num_blocks=num_blocks,
            block_size=block_size,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            max_queue=max_queue,
            eos_token_ids=list(eos_token_ids),
            max_sessions=max_sessions,
            session_ttl_ms=round(session_ttl * 1000),
            prefix_cache=prefix_cache,
        )
        self._random = random.Random(seed)  # noqa: S311 - it chooses tokens and keeps no secret
        self._clock = clock

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence, prompt and output."""
        return self._core.context_length

    def set_weight(self, tenant: int, weight: int) -> None:
        """Set a tenant's share of the tokens relative to the others', which have 1. Raises LmserveError (400) for 0."""
        self._core.set_weight(tenant, weight)

    def add(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, Any]],
        *,
        session: SessionRef | None = None,
        sampling: SamplingParams | None = None,
        stopping: StopParams | None = None,
        guide: Guide | None = None,
        guided_whitespace: GuidedWhitespace = "compact",
        on_overflow: OnOverflow = "error",
        n: int = 1,
        tenant: int = 0,
        priority: int = 0,
    ) -> int:
        """Queue a request and return its number. `prompt`: text, token ids, or messages for the chat template.

        With a `session` the prompt is only what is new. Tenants share neither sessions nor cached prefixes, and get
        shares by weight; of two priorities the smaller runs first. A `guide` (`lmserve.engine.submission`) is a grammar
        for the text: the step's `masks` then say which tokens are allowed; its JSON has no white space between its
        tokens, unless `guided_whitespace` is free.

        Raises LmserveError: 400 for what can never run, 404 `session_not_found`, 409 `session_busy`, 429 `queue_full`.
        """
        submission = Submission(
            route="generate",
            input=_input(prompt),
            session=session,
            sampling=sampling or SamplingParams(),
            stopping=stopping or StopParams(),
            guide=guide,
            guided_whitespace=guided_whitespace,
            on_overflow=on_overflow,
            n=n,
            tenant=tenant,
            priority=priority,
        )
        return self._core.add(encode(submission), self._random.getrandbits(64), self._now())

    def plan(self) -> Step | None:
        """Decide what the next step computes; None if there is nothing to do. `commit` or `fail` must follow."""
        planned = self._core.plan()
        if planned is None:
            return None
        sequences, buffers, masks = planned
        arrays: dict[str, Any] = {
            name: np.frombuffer(data, np.float32 if name in _FLOATS else np.int32) for name, data in buffers.items()
        }
        arrays["masks"] = masks
        arrays["block_tables"] = arrays["block_tables"].reshape(len(sequences), -1)
        return Step(sequences=sequences, **arrays)

    def commit(self, tokens: ArrayLike) -> list[_core.Event]:
        """Book the planned step: `tokens` [R] are the sampled token ids. One event for each choice that changed.

        A turn whose event has a finish reason is in its session. Raises LmserveError (400) if the tokens do not fit the
        step; nothing is booked then.
        """
        return self._core.commit(np.asarray(tokens).ravel().tolist(), self._now())

    def fail(self, reason: str) -> list[_core.Event]:
        """Book that the planned step could not be computed.

        `plan` gives it again in halves, until one of a single sequence fails: the request at fault ends with `reason`,
        and its session rolls back.
        """
        return self._core.fail(reason)

    def abort(self, request: int, *, keep: bool = False) -> list[_core.Event]:
        """End a request before its time; nothing happens if it has ended.

        `keep` commits its session's turn with what was generated; otherwise the session's `on_disconnect` decides.
        """
        return self._core.abort(request, keep, self._now())

    def end_session(self, session_id: SessionId, *, tenant: int = 0) -> bool:
        """Drop a session; False if there was none. Raises LmserveError `session_busy` (409) while a turn runs."""
        return self._core.end_session(tenant, session_id)

    def session_tokens(self, session_id: SessionId, *, tenant: int = 0) -> list[int]:
        """Committed token ids of a session. Raises LmserveError `session_not_found` (404)."""
        return self._core.session_tokens(tenant, session_id)

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what runs, waits and is cached now."""
        return self._core.stats()

    def _now(self) -> int:
        return int(self._clock() * 1000)


def _input(prompt: str | Sequence[int] | Sequence[dict[str, Any]]) -> Text | Tokens | Messages:
    if isinstance(prompt, str):
        return Text(prompt)
    items: list[Any] = list(prompt)
    if items and isinstance(items[0], dict):
        return Messages(items)
    return Tokens([int(token) for token in items])
