"""The served model's text layer, for requests that need only the tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar

from lmserve.errors import LmserveError

if TYPE_CHECKING:
    from lmserve._core import ChatTemplate, Tokenizer

T = TypeVar("T")

# Characters or tokens up to which work is done on the event loop: a thread would take longer.
INLINE: Final = 2048
# Up to this, work has threads that do no longer work.
LONG: Final = 32768
MAX_THREADS: Final = 2
MAX_WAITING: Final = 64


class TextLayer:
    """A tokenizer and a chat template, and threads for long texts. For one event loop."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        template_source: str | None = None,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`template_source`: the template as it was read. `special_tokens`: texts by names such as `bos_token`."""
        self.tokenizer = tokenizer
        self.template = template
        self.template_source = template_source
        self.special_tokens = special_tokens
        self._short = _Lane()
        self._long = _Lane()

    def encode(
        self, text: str, *, context_length: int, param: str, add_special: bool = False, rendered: bool = False
    ) -> list[int]:
        """Token ids; `rendered`: of what the template wrote, with special tokens of its own.

        A text whose bytes are more than those of `context_length` of the longest tokens is not tokenized.

        Raises LmserveError: 400 `context_length_exceeded`, 503 `draining` after `close`.
        """
        least = self.tokenizer.least_tokens(text)
        if least > context_length:
            message = f"the context holds {context_length} tokens, but {param} has at least {least}"
            raise LmserveError.new(
                400,
                "context_length_exceeded",
                message,
                param=param,
                context_length=context_length,
                input_tokens=least,
            )
        if rendered and not add_special:
            return self.tokenizer.encode_rendered(text)
        return self.tokenizer.encode(text, add_special=add_special)

    def close(self) -> None:
        """End what is being tokenized: the server stops."""
        self.tokenizer.abandon()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """What `work` returns; on a thread, if `size`, in characters or tokens, is not small.

        Raises what `work` raises, and LmserveError `queue_full` (429) where too much waits already.
        """
        if size <= INLINE:
            return work()
        lane = self._long if size > LONG else self._short
        if lane.open >= MAX_WAITING:
            message = f"{MAX_WAITING} long texts are being tokenized, which is the limit, and one more was given"
            raise LmserveError.new(429, "queue_full", message, retry_after=1)
        lane.open += 1
        try:
            async with lane.threads:
                return await asyncio.to_thread(work)
        finally:
            lane.open -= 1


class _Lane:
    """Work that waits only for work of its kind."""

    def __init__(self) -> None:
        self.threads = asyncio.Semaphore(MAX_THREADS)
        self.open = 0
