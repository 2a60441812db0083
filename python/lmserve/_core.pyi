"""The Rust core. Checked against the built module by stubtest."""

from os import PathLike
from typing import Any, Final, Self, final

__all__ = ["VERSION"]

VERSION: Final[str]

@final
class GgufFile:
    """The header of a GGUF file (versions 2 and 3).

    Raises LmserveError (400) if the file cannot be read or breaks the format.
    """

    def __new__(cls, path: str | PathLike[str]) -> Self: ...
    def metadata(self) -> dict[str, Any]:
        """All keys in the order of the file, without arrays of more than 64 values."""

    def get(self, key: str) -> Any:
        """The value of a key, whatever its size; None if there is none."""

    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        """Name, type such as "Q4_K", shape (slowest dimension first), offset from `data_offset`, and size in bytes."""

    @property
    def data_offset(self) -> int:
        """Where the tensors' data begins in the file, in bytes."""

@final
class Tokenizer:
    """A vocabulary and the rules that split text into its tokens."""

    @staticmethod
    def from_json(json: bytes) -> Tokenizer:
        """Read a Hugging Face tokenizer.json. Raises LmserveError (400)."""

    @staticmethod
    def from_gguf(file: GgufFile) -> Tokenizer:
        """Build what `tokenizer.ggml.*` describes. Raises LmserveError (400)."""

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Tokens of `text`; special tokens written out in it are recognised.

        `add_special` adds those that belong around a text; a chat template has written them already.
        """

    def encode_continued(self, text: str) -> list[int]:
        """Tokens of `text` that goes on after tokens that are there already: no space is put before its first word."""

    def decode(self, tokens: list[int], *, skip_special: bool = True) -> str:
        """Text of `tokens`. Bytes that are no UTF-8 become U+FFFD; unknown ids add nothing."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""

    def token_to_id(self, token: str) -> int | None: ...
    def is_special(self, token: int) -> bool: ...
    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that a token adds to a text; None if no token has this id."""

@final
class ChatTemplate:
    """A compiled chat template. JSON goes in as bytes; keys keep their order.

    Raises LmserveError (400) if the source does not compile, and with the template's own words if it refuses messages.
    """

    def __new__(cls, source: str, special_tokens: bytes | None = None) -> Self:
        """`special_tokens`: a JSON object of variables for the template, such as `bos_token`."""

    def render(
        self,
        messages: bytes,
        *,
        tools: bytes | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: bytes | None = None,
    ) -> str:
        """Text of a whole conversation; `continue_final_message` leaves its last message open."""

    def render_continued(
        self,
        messages: bytes,
        *,
        open_assistant: bool,
        tools: bytes | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: bytes | None = None,
    ) -> str:
        """Text that `messages` append to a live conversation.

        `open_assistant`: its last message was generated, and what closes it comes first.
        """

    def system_prefix(self, messages: bytes, *, tools: bytes | None = None, kwargs: bytes | None = None) -> str | None:
        """Text before the first user turn; None if the template does not keep it apart."""

@final
class StreamDecoder:
    """Decodes one sequence token by token and finds stop strings in it."""

    def __new__(
        cls,
        tokenizer: Tokenizer,
        *,
        stop: list[str] | None = None,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> Self: ...
    def push(self, token: int) -> tuple[str, bool]:
        """Text that the token completes, and whether a stop string was found."""

    def flush(self) -> tuple[str, bool]:
        """Text that was held back, and whether a stop string was found in it."""
