"""One streamed reply: when its parts arrived, and whether it is what the request asked for."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct

DATA: Final = b"data:"
DONE: Final = b"[DONE]"
MAX_ERROR_TEXT: Final = 160  # characters of a server's error that are reported


class Usage(Struct, frozen=True):
    """Tokens that the server says it read and wrote."""

    prompt_tokens: int
    completion_tokens: int = 0


class _Delta(Struct):
    content: str | None = None


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Outcome:
    """What became of one request. Times are seconds of `time.perf_counter`.

    `error` says in a line what was wrong; then nothing of the request counts.
    """

    __slots__ = ("_finish", "_partial", "arrivals", "done", "error", "started", "text", "usage")

    def __init__(self, started: float) -> None:
        self.started = started
        self.arrivals: list[float] = []  # of each chunk that has text
        self.text: list[str] = []
        self.usage: Usage | None = None
        self.error: str | None = None
        self.done = False
        self._finish: str | None = None
        self._partial = b""

    def feed(self, data: bytes, now: float) -> None:
        """The next bytes of the body, which came at `now`."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            if line.startswith(DATA):
                self._take(line[len(DATA) :].strip(), now)

    def _take(self, event: bytes, now: float) -> None:
        if event == DONE:
            self.done = True
            return
        try:
            chunk = _decode(event)
        except msgspec.DecodeError as error:
            self.error = f"a chunk is not OpenAI's: {error}"
            return
        if chunk.error is not None:
            self.error = f"the stream ended in an error: {shorten(chunk.error)}"
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            text = choice.text if choice.delta is None else choice.delta.content
            if text:
                self.arrivals.append(now)
                self.text.append(text)
            self._finish = choice.finish_reason or self._finish

    def check(self, output_tokens: int) -> None:
        """Set `error` unless the reply is whole and has exactly `output_tokens` tokens."""
        if self.error is not None:
            return
        if not self.done:
            self.error = "the stream ended without [DONE]"
        elif self.usage is None:
            self.error = "the stream has no usage"
        elif self.usage.completion_tokens != output_tokens:
            given = self.usage.completion_tokens
            self.error = f"{output_tokens} tokens were asked for, but usage says {given}"
        # ik_llama.cpp says "stop" of its limit too; the count was checked.
        elif self._finish not in ("length", "stop"):
            self.error = f"finish_reason should be 'length', but is {self._finish!r}"
        elif not self.arrivals or len(self.arrivals) > output_tokens:
            self.error = f"{output_tokens} tokens came in {len(self.arrivals)} chunks of text"

    @property
    def time_to_first_token(self) -> float:
        """Seconds; of a checked outcome without an error."""
        return self.arrivals[0] - self.started


def shorten(error: Any) -> str:
    """A server's error in one line."""
    message = error.get("message", error) if isinstance(error, dict) else error
    line = " ".join(str(message).split())
    return line if len(line) <= MAX_ERROR_TEXT else line[: MAX_ERROR_TEXT - 3] + "..."
