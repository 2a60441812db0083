"""The core's offline interface: prompts in, texts out, without a server and without an event loop."""

from __future__ import annotations

import select
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, cast

import msgspec
from msgspec import Struct, structs

from lmserve.engine.core import ENDED, CoreEngine, CoreStream
from lmserve.engine.generation import FinishReason, Generation, read_generation
from lmserve.engine.submission import (
    Guide,
    Messages,
    SamplingParams,
    StopParams,
    Submission,
    Text,
    TokenIds,
    Tokens,
    encode,
    with_defaults,
)
from lmserve.errors import LmserveError
from lmserve.model.generation_defaults import NONE, GenerationDefaults

if TYPE_CHECKING:
    from lmserve._core import Tokenizer

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]
OnError = Literal["raise_if_all", "raise", "keep"]

# Settings that may be given as text, such as "2GiB".
SIZES: Final = ("kv_memory", "kv_host_memory", "state_memory", "state_disk", "max_body")


class _Frame(Struct, frozen=True):
    """A frame of `/generate`."""

    text: str
    tokens: int
    finish_reason: FinishReason | None
    error: dict[str, Any] | None = None


class LLM:
    """A model for scripts: every call blocks until all its answers are there. Not thread-safe.

    The engine batches the prompts of one call, so give it many at once. Use it as a context manager, or `close` it.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        """Load a model: a path, a hub id, a bundled model's name; None is the default model.

        `settings` are those of `lmserve.config.ServeConfig`; sizes may be text ("2GiB"). Raises SourceError where there
        is no such model, LmserveError if it cannot be served, ConfigError if a setting is out of its range.
        """
        core, defaults, tokenizer = _load(model, settings)
        self._core: CoreEngine = core
        self._defaults: GenerationDefaults = defaults
        self._tokenizer: Tokenizer | None = tokenizer

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> Self:
        """The same as `LLM(path, **settings)`."""
        return cls(path, **settings)

    @classmethod
    def over(cls, core: CoreEngine, defaults: GenerationDefaults = NONE, tokenizer: Tokenizer | None = None) -> Self:
        """Around an engine that runs already. `defaults`: what holds where `sampling` or `stopping` leaves it out."""
        llm = cls.__new__(cls)
        vars(llm).update(_core=core, _defaults=defaults, _tokenizer=tokenizer)
        return llm

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises AttributeError for an engine that was given without one."""
        if self._tokenizer is None:
            raise AttributeError("this LLM was made from an engine without a tokenizer")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        stopping: StopParams | None = None,
        *,
        n: int = 1,
        guide: Guide | None = None,
        on_error: OnError = "raise_if_all",
        progress: bool = False,
    ) -> list[Generation]:
        """Continue each prompt: plain text or token ids, no chat template. Answers in the order of the prompts.

        A string, or a list of token ids, is one prompt. `n`: answers to each; those after the first are its
        `alternatives`. `guide`: what each answer must be. `progress`: count the answers on stderr.

        A prompt that fails, because it is too long for example, fails alone: its Generation has the `finish_reason`
        "error" and an `error`, and the others go on. Where no prompt has an answer, the first LmserveError is raised:
        the fault of a setting, of the engine, or of the only prompt. `on_error="keep"` does not raise it even then;
        "raise" raises the first one at once and aborts the others.
        """
        inputs = [Text(p) if isinstance(p, str) else Tokens(list(p)) for p in _prompts(prompts)]
        return self._run(self._submissions(inputs, sampling, stopping, guide, n=n), on_error, progress)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling: SamplingParams | None = None,
        stopping: StopParams | None = None,
        *,
        n: int = 1,
        guide: Guide | None = None,
        on_error: OnError = "raise_if_all",
        progress: bool = False,
    ) -> list[Generation]:
        """Answer each conversation: `{role, content}` messages, put through the chat template.

        A list of messages is one conversation. The rest is as in `generate`.
        """
        inputs = [Messages(list(conversation)) for conversation in _conversations(conversations)]
        return self._run(self._submissions(inputs, sampling, stopping, guide, n=n), on_error, progress)

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling: SamplingParams | None = None,
        stopping: StopParams | None = None,
        *,
        guide: Guide | None = None,
    ) -> Iterator[str]:
        """The answer to one prompt or conversation as it is generated. Raises LmserveError.

        An iterator that is closed, or collected, before its end aborts the answer.
        """
        given: Text | Tokens | Messages
        if isinstance(prompt, str):
            given = Text(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            given = Messages(list(prompt))
        else:
            given = Tokens(list(cast("Sequence[int]", prompt)))
        (submission,) = self._submissions([given], sampling, stopping, guide, stream=True)
        stream = self._core.submit(submission)
        rest = b""
        try:
            state = None
            while state != ENDED:
                select.select([self._core.wake_fd()], [], [])
                self._core.drain()
                state, body = stream.poll()
                *frames, rest = (rest + body).split(b"\0")
                for frame in frames:
                    reply = msgspec.json.decode(frame, type=_Frame)
                    if reply.error is not None:
                        raise LmserveError(500, reply.error)
                    if reply.text:
                        yield reply.text
        finally:
            stream.abort()

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

    def _submissions(
        self,
        inputs: Sequence[Text | Tokens | Messages],
        sampling: SamplingParams | None,
        stopping: StopParams | None,
        guide: Guide | None,
        *,
        n: int = 1,
        stream: bool = False,
    ) -> list[bytes]:
        sampling, stopping = sampling or SamplingParams(), stopping or StopParams()
        # Of the core's forms, the one that has token ids and log-probabilities.
        whole = Submission(
            route="completions", input=Text(""), n=n, token_ids=TokenIds(beside_text=True, as_tokens=True)
        )
        common = Submission(route="generate", input=Text(""), stream=True) if stream else whole
        common = structs.replace(common, sampling=sampling, stopping=stopping, guide=guide)
        common = with_defaults(common, self._defaults)
        return [encode(structs.replace(common, input=each)) for each in inputs]

    def _run(self, submissions: Sequence[bytes], on_error: OnError, progress: bool) -> list[Generation]:
        waiting = deque(enumerate(submissions))
        running: dict[int, tuple[int, CoreStream]] = {}
        answers: dict[int, Generation] = {}
        try:
            while waiting or running:
                self._submit(waiting, running, answers, on_error)
                if progress:
                    _count(len(answers), len(submissions))
                if not running:
                    continue
                select.select([self._core.wake_fd()], [], [])
                for stream_id in self._core.drain():
                    if stream_id not in running:
                        continue
                    index, stream = running[stream_id]
                    answer = _poll(stream, on_error)
                    if answer is not None:
                        del running[stream_id]
                        answers[index] = answer
            if progress:
                _count(len(answers), len(submissions))
        finally:
            for _, stream in running.values():
                stream.abort()
        ordered = [answers[index] for index in range(len(submissions))]
        if on_error == "raise_if_all" and ordered and all(answer.error for answer in ordered):
            raise cast("LmserveError", ordered[0].error)
        return ordered

    def _submit(
        self,
        waiting: deque[tuple[int, bytes]],
        running: dict[int, tuple[int, CoreStream]],
        answers: dict[int, Generation],
        on_error: OnError,
    ) -> None:
        """Hand over what the core's queue takes."""
        while waiting:
            index, submission = waiting[0]
            try:
                stream = self._core.submit(submission)
            except LmserveError as error:
                if error.code == "queue_full" and running:
                    return
                if on_error == "raise":
                    raise
                answers[index] = Generation.failed(error)
                waiting.popleft()
                continue
            waiting.popleft()
            running[stream.id] = (index, stream)


def _load(model: str | Path | None, settings: dict[str, Any]) -> tuple[CoreEngine, GenerationDefaults, Tokenizer]:
    from lmserve.config import ConfigError, ServeConfig, parse_size
    from lmserve.engine.load import ModelPlan
    from lmserve.source import find_model

    if settings.get("session_store") is not None:
        raise ConfigError("session_store", "is for servers and AsyncEngine: an LLM has its sessions to itself")
    sizes = {name: parse_size(settings[name]) for name in SIZES if isinstance(settings.get(name), str)}
    source = find_model(None if model is None else str(model))
    plan = ModelPlan(source.path, ServeConfig(**settings | sizes), source.published)
    return plan.load_engine(), plan.defaults, plan.text.tokenizer


def _prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast("Sequence[int]", prompts)]
    return cast("Sequence[Prompt]", prompts)


def _conversations(conversations: Conversation | Sequence[Conversation]) -> Sequence[Conversation]:
    if conversations and isinstance(conversations[0], Mapping):
        return [cast("Conversation", conversations)]
    return cast("Sequence[Conversation]", conversations)


def _poll(stream: CoreStream, on_error: OnError) -> Generation | None:
    """The whole answer, once it is there."""
    try:
        state, body = stream.poll()
    except LmserveError as error:
        if on_error == "raise":
            raise
        return Generation.failed(error)
    if state != ENDED:
        return None
    return read_generation(body)


def _count(done: int, of: int) -> None:
    sys.stderr.write(f"\r{done} of {of} answers" + ("\n" if done == of else ""))
    sys.stderr.flush()
