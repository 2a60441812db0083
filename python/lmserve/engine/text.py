"""The served model's text layer, for requests that ask for tokens and not for the model."""

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
        self._threads = asyncio.Semaphore(MAX_THREADS)
        self._open = 0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """What `work` returns; on a thread, if `size`, in characters or tokens, is not small.

        Raises what `work` raises, and LmserveError `queue_full` (429) where too much waits already.
        """
        if size <= INLINE:
            return work()
        if self._open >= MAX_WAITING:
            message = f"{MAX_WAITING} long texts are being tokenized, which is the limit, and one more was given"
            raise LmserveError.new(429, "queue_full", message, retry_after=1)
        self._open += 1
        try:
            async with self._threads:
                return await asyncio.to_thread(work)
        finally:
            self._open -= 1
