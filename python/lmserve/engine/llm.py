"""The offline face of the core: batches of prompts in, texts out, without a server and without an event loop."""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
from msgspec import Struct

from lmserve.engine.core import ENDED, CoreEngine, CoreStream
from lmserve.engine.submission import (
    Messages,
    SamplingParams,
    StopParams,
    Submission,
    Text,
    Tokens,
    encode,
    with_defaults,
)
from lmserve.errors import LmserveError
from lmserve.model.generation_defaults import NONE, GenerationDefaults


class Usage(Struct, frozen=True):
    """Tokens of one answer; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    history_tokens: int
    cached_tokens: int
    completion_tokens: int


class Generation(Struct, frozen=True):
    """One answer. `tokens`: how many were generated."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length", "abort"]
    usage: Usage


class LLM:
    """A core engine for scripts: every call blocks until all its answers are there. Not thread-safe.

    The engine batches the prompts of one call, so give it many at once. Use it as a context manager, or `close` it.
    """

    def __init__(self, core: CoreEngine, defaults: GenerationDefaults = NONE) -> None:
        """`defaults`: what holds where `sampling` or `stopping` leaves it out."""
        self._core = core
        self._defaults = defaults

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> Self:
        """Load a GGUF file or a Hugging Face folder; `settings` are those of `lmserve.config.ServeConfig`.

        Raises LmserveError if the model cannot be served, ConfigError if a setting is out of its range.
        """
        from lmserve.config import ServeConfig
        from lmserve.engine.load import ModelPlan

        plan = ModelPlan(Path(path), ServeConfig(**settings))
        return cls(plan.load_engine(), plan.defaults)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        stopping: StopParams | None = None,
    ) -> list[Generation]:
        """Continue each prompt: plain text or token ids, no chat template. Answers in the order of the prompts.

        Raises the first LmserveError that a prompt meets; the others are aborted.
        """
        inputs = [Text(prompt) if isinstance(prompt, str) else Tokens(list(prompt)) for prompt in prompts]
        return self._run(inputs, sampling, stopping)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        sampling: SamplingParams | None = None,
        stopping: StopParams | None = None,
    ) -> list[Generation]:
        """Answer each conversation: `{role, content}` messages, put through the chat template. Raises as `generate`."""
        inputs = [Messages(list(conversation)) for conversation in conversations]
        return self._run(inputs, sampling, stopping)

    def stats(self) -> dict[str, int | float]:
        """Counters since the start, and the state at the last step."""
        return self._core.stats()

    def close(self) -> None:
        """Stop the engine. Blocks until its threads have ended."""
        self._core.shutdown(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(
        self,
        inputs: Sequence[Text | Tokens | Messages],
        sampling: SamplingParams | None,
        stopping: StopParams | None,
    ) -> list[Generation]:
        sampling, stopping = sampling or SamplingParams(), stopping or StopParams()
        requests = [Submission(route="generate", input=i, sampling=sampling, stopping=stopping) for i in inputs]
        waiting = deque(
            (index, encode(with_defaults(request, self._defaults))) for index, request in enumerate(requests)
        )
        running: dict[int, tuple[int, CoreStream]] = {}
        answers: dict[int, Generation] = {}
        try:
            while waiting or running:
                self._submit(waiting, running)
                select.select([self._core.wake_fd()], [], [])
                for stream_id in self._core.drain():
                    if stream_id not in running:
                        continue
                    index, stream = running[stream_id]
                    state, body = stream.poll()
                    if state == ENDED:
                        del running[stream_id]
                        answers[index] = msgspec.json.decode(body, type=Generation)
        finally:
            for _, stream in running.values():
                stream.abort()
        return [answers[index] for index in range(len(inputs))]

    def _submit(self, waiting: deque[tuple[int, bytes]], running: dict[int, tuple[int, CoreStream]]) -> None:
        """Hand over what the core's queue takes."""
        while waiting:
            index, submission = waiting[0]
            try:
                stream = self._core.submit(submission)
            except LmserveError as error:
                if error.code == "queue_full" and running:
                    return
                raise
            waiting.popleft()
            running[stream.id] = (index, stream)
