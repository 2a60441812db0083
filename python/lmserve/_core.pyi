"""The Rust core. Checked against the built module by stubtest."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final, Literal, Self, final

from lmserve.engine.sessions import SessionId, SessionLog, SessionWriter
from lmserve.engine.tiers import Tiers
from lmserve.model.interface import Runner

__all__ = [
    "END_OF_TURN",
    "ENTRY_TOKENS",
    "VERSION",
    "ChatTemplate",
    "CpuArrays",
    "CpuModel",
    "CpuProgram",
    "CpuTexts",
    "Engine",
    "Event",
    "GgufFile",
    "OpenSessionLog",
    "Scheduler",
    "StepMasks",
    "Stream",
    "StreamDecoder",
    "TokenUsage",
    "Tokenizer",
    "capacity",
    "check_session_log",
    "cpu_isa",
    "cpu_kv_bytes_per_token",
    "cpu_linear_bytes",
    "encode_blocks",
    "explain_bus_errors",
    "packed_made_of",
    "repair_session_log",
    "simulate",
]

VERSION: Final[str]
END_OF_TURN: Final[list[str]]
"""Texts of the tokens that chat models end a turn or a document with."""
ENTRY_TOKENS: Final[int]
"""Tokens of a step beyond one for each sequence of a batch: a step has at least so many, for one that is admitted."""

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

    def encode(self, text: str, *, add_special: bool = False, piece_bytes: int = ...) -> list[int]:
        """Tokens of `text`; special tokens written out in it are recognised.

        `add_special` adds those that belong around a text; a chat template has written them already. A text of more
        than `piece_bytes` is tokenized in pieces where that gives the same tokens, which takes less memory. Raises
        LmserveError `draining` (503) after `abandon`.
        """

    def encode_rendered(self, text: str, *, piece_bytes: int = ...) -> list[int]:
        """Tokens of what a `ChatTemplate` rendered; special tokens in texts that it escaped are plain text."""

    def encode_continued(self, text: str, *, piece_bytes: int = ...) -> list[int]:
        """Tokens of `text` that goes on after tokens that are there already: no space is put before its first word."""

    def least_tokens(self, text: str) -> int:
        """Fewest tokens that `text` can have, by its bytes and the longest token; 0 where that sets no bound."""

    @property
    def works_in_pieces(self) -> bool:
        """Whether long texts are tokenized in pieces."""

    def abandon(self) -> None:
        """End what is being tokenized, and refuse what comes: the server stops."""

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

    def __new__(
        cls,
        source: str,
        special_tokens: bytes | None = None,
        *,
        tool_source: str | None = None,
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
        escaped: Tokenizer | None = None,
    ) -> Self:
        """`special_tokens`: a JSON object of variables for the template, such as `bos_token`.

        `tool_parser`: how answers call functions, `auto` (by the template) or the name of a format;
        `reasoning_parser`: how they write thoughts, `auto`, `none` or the name of a format. `escaped`: the special
        tokens of this tokenizer are plain text where users and tools write them; what is rendered goes through
        `Tokenizer.encode_rendered` then.
        """

    @property
    def tool_format(self) -> str:
        """The format in which its model calls functions."""

    @property
    def thought_format(self) -> str | None:
        """The format in which its model writes thoughts; None: it does not think."""

    @property
    def source(self) -> str:
        """The template's text."""

    @property
    def variables(self) -> list[str]:
        """The variables that it reads, such as `enable_thinking`."""

    @property
    def thinks(self) -> bool:
        """Whether its model may think before it answers."""

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

    def render_prompt(
        self,
        messages: bytes,
        *,
        tools: bytes | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: bytes | None = None,
    ) -> str:
        """As the engine renders: tools that the template does not show are described in the system's words."""

    def render_continued(
        self,
        messages: bytes,
        *,
        open_assistant: bool,
        called: list[str] | None = None,
        tools: bytes | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: bytes | None = None,
    ) -> str:
        """Text that `messages` append to a live conversation.

        `open_assistant`: its last message was generated, and what closes it comes first. `called`: the functions that
        it calls, where `messages` begin with their results.
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

def check_session_log(folder: str | PathLike[str]) -> bytes:
    """What a session log has and what it has lost, as JSON of `lmserve.engine.sessions.LogReport`. Nothing is changed.

    Raises LmserveError: 404 where there is none, 400 for one that a server has or that is no log, 500.
    """

def repair_session_log(folder: str | PathLike[str]) -> bytes:
    """Keep what is damaged in a session log beside it, and write it anew where something is missing.

    Returns what was found, and raises, as `check_session_log`.
    """

@final
class OpenSessionLog:
    """An open session log with what it has, for one engine."""

    def __new__(cls, settings: SessionLog, *, max_sessions: int = 100_000, session_ttl: float = 0.0) -> OpenSessionLog:
        """`session_ttl`: as `Engine`. Raises LmserveError for a log that another server has or another model wrote."""

    @property
    def restored(self) -> bytes:
        """What the log brought back, as JSON of `lmserve.engine.sessions.LogReport`."""

@final
class Engine:
    """The continuous-batching engine over one model. Its threads start with it; `shutdown` ends them."""

    def __new__(
        cls,
        runner: Runner,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        *,
        eos_token_ids: Sequence[int],
        max_queue: int = 1024,
        max_sessions: int = 100_000,
        session_ttl: float = 0.0,
        speculate: int = 0,
        policy: str = "fair",
        prefix_cache: bool = True,
        share_prefix_cache: bool = False,
        session_log: OpenSessionLog | None = None,
        session_store: SessionWriter | None = None,
        tenants: bytes | None = None,
        stall_seconds: float = 5.0,
        state_every: int = 2048,
        tiers: Tiers | None = None,
    ) -> Engine:
        """`session_ttl`: seconds an idle session is kept, 0: for ever. Sessions of a `session_log` have its limits;
        without one they end with the engine, or are in a `session_store`, which is called on a thread of the engine.
        `speculate`: most tokens drafted for a sequence in a step, as far as the runner's buffers have rows.
        `policy`: who goes first; "fair": by priority, then the tenant that was served least for its weight, then
        arrival; "fcfs": by arrival alone.

        `state_every`: tokens between two snapshots of a recurrent state, where the runner has slots for some.

        `tiers`: what lies below the runner's memory, which must be one that can be copied (`copy_sizes`).

        `tenants`: a JSON list of what src/tenant/limits.rs describes; others have no limit.

        Raises LmserveError for impossible sizes.
        """

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence, prompt and output."""

    def submit(self, submission: bytes) -> Stream:
        """Take one JSON-encoded submission (`lmserve.engine.submission`) in and return at once.

        Raises LmserveError: 400 invalid_value, 404 session_not_found, 409 session_busy, 429 queue_full, 503.
        """

    def embed(self, submission: bytes) -> Stream:
        """Take one JSON-encoded embedding request in and return at once; the stream carries the whole reply."""

    def cancel_session(self, tenant: int, session_id: SessionId) -> bool:
        """End the running turn of a session with what it has; False if none runs."""

    def end_session(self, tenant: int, session_id: SessionId, cancel: bool = False) -> bool:
        """Drop a session; False if there was none. Raises LmserveError session_busy (409) while a turn runs.

        `cancel`: cancel a turn that runs and wait for its end, which may take a step of the model.
        """

    def fork_session(self, tenant: int, session_id: SessionId, new_id: SessionId, turns: int | None = None) -> None:
        """Make `new_id` a session of its own that stands where the other one stood after its first `turns` turns.

        `turns` None: all. It shares what is cached of them and takes no KV block before its first turn. Ids below -1
        are the server's own: no client can name them. Raises LmserveError: 400 invalid_value, 404 session_not_found or
        session_expired, 409 session_exists or session_busy.
        """

    def rewind_session(self, tenant: int, session_id: SessionId, turns: int) -> None:
        """Take a session back to where it stood after its first `turns` turns. Raises as `fork_session`."""

    def session_info(self, tenant: int, session_id: SessionId) -> dict[str, Any]:
        """id, turns, tokens, cached_tokens, busy, created_ms and used_ms (since 1970). 404 if unknown."""

    def list_sessions(self, tenant: int, after: SessionId | None, limit: int) -> list[dict[str, Any]]:
        """At most `limit` sessions behind id `after`, in order of their ids, without `cached_tokens`."""

    def session_tokens(self, tenant: int, session_id: SessionId) -> list[int]:
        """Committed token ids of a session. 404 if unknown."""

    def count_tokens(self, submission: bytes) -> int:
        """Tokens of the prompt that a submission would be computed for; nothing is. Raises LmserveError (400, 404)."""

    def session_transcript(self, tenant: int, session_id: SessionId) -> list[tuple[str, str, list[int], list[int]]]:
        """(input text, output text, input token ids, output token ids) of each turn, special tokens written out."""

    def export_session(
        self, tenant: int, session_id: SessionId
    ) -> tuple[bytes, list[tuple[int, int, bool, bytes | None]], int, int, bytes | None]:
        """The members of a `lmserve.engine.sessions.SessionState`, and of its turns.

        Raises LmserveError: 404, 409 session_busy while the first turn runs.
        """

    def import_session(
        self,
        tenant: int,
        session_id: SessionId,
        tokens: bytes,
        turns: Sequence[tuple[int, int, bool, bytes | None]],
        seed: int,
        system_tokens: int,
        adapter: bytes | None = None,
    ) -> None:
        """Make a session of what `export_session` gave. Raises LmserveError: 400, 409 session_exists."""

    def restore_session(self, tenant: int, session_id: SessionId, records: Sequence[bytes]) -> None:
        """Make a session of the records that a `SessionWriter` was given, the oldest first, whatever it was before.

        Raises LmserveError: 400, 409 session_busy, 409 session_damaged.
        """

    def add_adapter(self, number: int, name: str, digest: bytes) -> None:
        """Let requests use an adapter that the model has loaded, with contents of this SHA-256. Raises LmserveError."""

    def remove_adapter(self, number: int) -> None:
        """Let no further request use an adapter. Raises LmserveError: 404, 409 adapter_in_use while requests do."""

    def hold_session(self, tenant: int, session_id: SessionId, hold_ms: int) -> None:
        """Keep an idle session and its KV for so many milliseconds, where others can make room; 0: no longer. 404."""

    def give_up_session(self, tenant: int, session_id: SessionId) -> int:
        """Give up what is cached of a session alone; return how many of its tokens are cached then. 404."""

    def wake_fd(self) -> int:
        """A file descriptor that is readable while some stream has news."""

    def drain(self) -> list[int]:
        """Take the ids of the streams with news."""

    def session_log_fault(self) -> tuple[str, str] | None:
        """(code, message) of why nothing can be written to the session log now; None: it is well, or there is none."""

    def stats(self) -> dict[str, int | float]:
        """Counters and the state at the last step."""

    def usage(self, tenant: int) -> dict[str, Any]:
        """What a tenant has used since the start, its `limits` (None: none), and what is `remaining` of them."""

    def quota(self, tenant: int) -> dict[str, int]:
        """What a tenant may still do, of what is limited.

        `limit_requests`, `remaining_requests`, `limit_tokens`, `remaining_tokens`, `reset_tokens_ms`.
        """

    def check_health(self) -> None:
        """Raises LmserveError (503) while the engine does not do its work: `engine_unavailable`, `engine_stalled`."""

    def metrics(self) -> str:
        """Counters, gauges and latencies in Prometheus' text format."""

    def shutdown(self, grace_seconds: float) -> None:
        """Refuse new requests, wait up to `grace_seconds` for open ones, give up the rest and end the threads."""

@final
class Stream:
    """One request's finished wire bytes. Dropping it before the end aborts the request."""

    @property
    def id(self) -> int:
        """As `Engine.drain` names it."""

    def poll(self) -> tuple[int, bytes]:
        """(0 waiting | 1 accepted | 2 ended, bytes since the last call).

        Raises LmserveError where the request was refused, or failed before its first byte.
        """

    def record(self) -> tuple[int, int, int, float | None, float | None]:
        """What became of the request so far, each complete once it has ended.

        Prompt tokens, of these cached, completion tokens; seconds from its arrival to its first step and first token.
        """

    def abort(self) -> None:
        """The reader left. May be called again."""

@final
class StepMasks:
    """The masks of the rows of one step whose tokens follow a grammar, as they are computed."""

    def __new__(cls, rows: Sequence[int], masks: bytes) -> Self:
        """Masks that were computed elsewhere: those of `rows`, ascending, as `wait` gives them.

        Raises ValueError if they do not divide evenly among the rows.
        """

    @property
    def rows(self) -> list[int]:
        """The step's sampled rows that have masks, ascending."""

    def wait(self) -> bytearray:
        """Wait until the masks are there: row after row, the allowed tokens as bits, 32 in a native word."""

@final
class TokenUsage:
    """Tokens of one choice; `cached_tokens` of the prompt were not computed again."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def history_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...

@final
class Event:
    """What one step, or the end of a request, did to one choice of a request."""

    @property
    def request(self) -> int: ...
    @property
    def choice(self) -> int: ...
    @property
    def token(self) -> int | None:
        """The sampled token, if the step sampled one."""

    @property
    def text(self) -> str:
        """New text; empty while characters or stop strings are incomplete."""

    @property
    def tokens(self) -> int:
        """Tokens generated so far."""

    @property
    def finish_reason(self) -> Literal["stop", "length", "abort", "error"] | None:
        """Set in the choice's last event; an "error" ends the whole request."""

    @property
    def usage(self) -> TokenUsage | None:
        """Set with a finish reason that is no error."""

    @property
    def error(self) -> str | None: ...

@final
class Scheduler:
    """Scheduler, KV books, sessions and text of one model, without a thread, a clock or a model.

    `lmserve.Scheduler` is its face. Times are in milliseconds of the caller's clock.
    """

    def __new__(
        cls,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        max_model_len: int,
        max_batch: int,
        max_batch_tokens: int,
        max_queue: int,
        eos_token_ids: Sequence[int],
        max_sessions: int,
        session_ttl_ms: int,
        prefix_cache: bool,
    ) -> Self:
        """Raises LmserveError (400) for sizes that cannot work."""

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence, prompt and output."""

    def set_weight(self, tenant: int, weight: int) -> None: ...
    def add(self, submission: bytes, random: int, now_ms: int) -> int:
        """Take one JSON-encoded submission in; `random` (64 bits) seeds what has no seed of its own."""

    def plan(self) -> tuple[list[tuple[int, int]], dict[str, bytearray], StepMasks | None] | None:
        """(request, choice) of each sequence of the next step, its arrays of 32-bit numbers by name, and its masks."""

    def commit(self, tokens: Sequence[int], now_ms: int) -> list[Event]:
        """Book the planned step."""

    def fail(self, message: str) -> list[Event]:
        """Book that the planned step could not be computed: it is planned again in halves, and who fails alone ends."""

    def abort(self, request: int, keep: bool, now_ms: int) -> list[Event]:
        """End a request before its time."""

    def end_session(self, tenant: int, session_id: SessionId) -> bool: ...
    def session_tokens(self, tenant: int, session_id: SessionId) -> list[int]: ...
    def stats(self) -> dict[str, int]: ...

def simulate(seed: int, steps: int) -> dict[str, Any]:
    """Run the simulator for at least `steps` steps.

    Its `worlds`; how often what happened (`counters`) and what was made to go wrong (`faults`), by name; the `digest`
    of what clients read.

    Raises LmserveError (500) that names the broken promise.
    """

def capacity(trace: bytes, setup: bytes) -> bytes:
    """What a trace (JSON lines) comes to on the servers of a setup (JSON), as JSON; see src/sim/capacity.rs.

    Raises `LmserveError` that names the line or the size that cannot be.
    """

def explain_bus_errors() -> None:
    """Let a bus error of this process say on standard error what it means, before it ends the process."""

def cpu_isa(isa: str | None = None) -> str:
    """The instruction set that the CPU kernels use here, such as "avx512"; `isa` asks for one.

    Raises LmserveError for one that this processor does not have.
    """

def cpu_linear_bytes(stored: str, quantize: str | None, rows: int, columns: int) -> int:
    """Bytes of a packed linear layer of this shape, stored as a GGUF type, "F32", "F16" or "BF16".

    Raises LmserveError for a type that is not one of these.
    """

def encode_blocks(dtype: str, weights: Any, threads: int) -> bytes:
    """Weights as blocks of a GGUF type: "Q8_0", "Q4_1", "Q5_1", "Q4_K", "Q5_K" or "Q6_K".

    weights: a contiguous array of float32, of any shape whose rows are whole blocks; nobody may write it meanwhile.
    threads: that compute. Raises LmserveError for another type, another number of weights, and one that is not finite
    or beyond half precision.
    """

def packed_made_of(path: Path) -> str | None:
    """What the file of packed weights at this path was made of, by its table; None: there is no whole one."""

def cpu_kv_bytes_per_token(kv_dtype: str, layers: Sequence[tuple[int, int]]) -> int:
    """Bytes that a token takes in the KV cache of layers, each (kv_heads, head_dim).

    kv_dtype: "fp32", "fp16" or "int8".
    """

@final
class CpuProgram:
    """A list of operations on the weights of one model; see `lmserve.model.cpu_ops`.

    Its methods take and give numbers of values and raise LmserveError for what does not fit.
    """

    def __new__(cls, model: CpuModel) -> CpuProgram: ...
    def embed(self, weight: int, scale: float) -> int:
        """Record the look-up of the step's tokens, times `scale`."""

    def embed_places(self, weight: int) -> int:
        """Record the look-up of rows by where tokens stand in the texts that are embedded."""

    def begin_draft(self, x: int) -> None:
        """Begin what is computed after the rows of x were sampled from."""

    def embed_next(self, weight: int, scale: float) -> int:
        """Record the look-up of the tokens that follow the step's ones, times `scale`."""

    def join(self, first: int, second: int) -> int:
        """Record the columns of two values side by side."""

    def draft(self, x: int, head: int) -> None:
        """End the recording of a program that guesses, for each row of x the largest logit that `head` gives."""

    def norm(self, x: int, weight: int) -> int:
        """Record a norm."""

    def add_and_norm(self, x: int, residual: int, weight: int, scale: float) -> tuple[int, int]:
        """Record the norm of residual + x * scale; gives it and the sum, which consumes `residual`."""

    def add(self, x: int, residual: int, scale: float) -> int:
        """Record residual + x * scale, which consumes `residual`."""

    def scale(self, x: int, factor: float) -> int:
        """Record x * factor, which consumes x."""

    def linear(self, x: int, weight: int) -> int:
        """Record a linear layer."""

    def rope_and_cache(self, qkv: int, layer: int, norms: tuple[int | None, int | None, int | None]) -> int:
        """Record the norms of q, k and v, rotation and KV write; gives the queries. Consumes `qkv`."""

    def attention(self, queries: int, layer: int, sinks: int | None = None, distances: int | None = None) -> int:
        """Record causal attention."""

    def activate(
        self,
        x: int,
        name: str,
        parameters: Sequence[float],
        *,
        gated: bool = False,
        factor: int | None = None,
        start: int = 0,
    ) -> int:
        """Record an activation: `gated`, of x's first half times the second; or of x, times columns of `factor`."""

    def heads(self, x: int, weight: int, passed: int) -> int:
        """Record a linear layer for each head, of its first columns; the `passed` ones after them stay as they are."""

    def latent_cache(self, q: int, kv: int, layer: int, norm: int) -> int:
        """Record the norm of latents, rotation, and their write to the cache; gives the queries. Consumes q and kv."""

    def route(self, x: int, weight: int) -> int:
        """Record the choice of experts for each row."""

    def experts(self, x: int, routing: int, weight: int) -> int:
        """Record what the experts of a choice make of each row."""

    def conv(self, x: int, layer: int, weight: int, gate: str) -> int:
        """Record a causal convolution; gate is "none", "silu" or "inputs"."""

    def scan(self, x: int, gates: int, layer: int, weight: int, rule: str) -> int:
        """Record a recurrence; rule is "delta", "delta_tiled" or "mamba"."""

    def gate_rows(self, x: int, gates: int) -> int:
        """Record each row of x times the sigmoid of its gate, which consumes x."""

    def rows(self, x: int) -> int:
        """Record the choice of the sampled rows."""

    def finish(self, x: int) -> None:
        """End the recording: x is what the program leaves."""

@final
class CpuArrays:
    """The arrays of a `StepBuffers`, taken once."""

    def __new__(cls, buffers: Any) -> CpuArrays: ...

@final
class CpuTexts:
    """Texts on their way to embeddings; between two passes, the model may compute something else."""

    def __new__(
        cls,
        token_ids: Any,
        cu_seqlens: Any,
        max_tokens: int,
        pooling: str,
        separator: tuple[int, int] | None = None,
    ) -> CpuTexts:
        """A pass computes max_tokens tokens at most; texts whose tokens see what follows them are computed whole.

        separator: the token that ends the first of a text's two segments, and the rows of tables for each segment.
        """

@final
class CpuModel:
    """A decoder with its weights and KV cache, computed by the core's own kernels."""

    def __new__(
        cls,
        *,
        vocab_size: int,
        layers: Sequence[Any],
        recurrent: Sequence[Any],
        state_slots: int,
        positions: int,
        ropes: Sequence[tuple[Any, Any]],
        query_scales: Sequence[Any],
        places: Sequence[tuple[int | None, int | None]],
        logits_scale: float | None,
        logits_softcap: float | None,
        kv_dtype: str,
        block_size: int,
        num_blocks: int,
        num_window_blocks: int,
        threads: int,
        isa: str | None,
    ) -> CpuModel:
        """Allocate the cache of layers like `lmserve.model.config.AttentionLayer`, for sequences of `positions`.

        ropes: tables of cos and sin, each float32 [positions * head_dim / 2]; query_scales: float32 [positions].
        places: for each layer which of both it takes, if any. recurrent: layers like
        `lmserve.model.config.RecurrentLayer`, of which there is room for `state_slots` states. num_window_blocks: of
        layers with a window; 0: they have the blocks of the others.
        """
    @property
    def copy_sizes(self) -> tuple[int, int]:
        """Bytes of a block with its keys and values, and of a recurrent state."""

    @property
    def isa(self) -> str:
        """The instructions it computes with, such as "avx512"."""

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights loaded so far."""

    def add_linear(self, parts: Sequence[tuple[str, Any, int, int, Any | None]], quantize: str | None = None) -> int:
        """Pack stored weights side by side, each (type, bytes, rows, columns, float32 bias); gives the layer's number.

        Without the GIL, on all threads. Raises LmserveError where the bytes are not those of the shape.
        """

    def add_low_rank(self, number: int, weight: int, first: int, rank: int, down: Any, up: Any) -> None:
        """Take what adapter `number` adds to a linear layer's outputs from `first` on.

        float32 `down` [rank, inputs], and `up` [rank, outputs] times its scale.
        """

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter."""

    def add_norm(
        self, weight: Any, eps: float, *, bias: Any | None = None, centered: bool = False, parts: int = 1
    ) -> int:
        """Take the float32 weight of an RMS norm, or of a layer norm (`centered`); gives its number.

        Each of `parts` of a row is normed by itself.
        """

    def add_sinks(self, sinks: Any) -> int:
        """Take the float32 sinks of a layer's attention, one for each query head; gives their number."""

    def add_distances(self, distances: Any, heads: int) -> int:
        """Take what attention adds to scores by distance, for each head an odd number of float32; gives its number."""

    def add_heads(self, parts: Sequence[tuple[str, Any, int, int, Any | None]], quantize: str | None = None) -> int:
        """Pack matrices of one shape, one for each head, as parts of `add_linear`; gives their number."""

    def add_router(
        self, part: tuple[str, Any, int, int, Any | None], router: Any, correction: Any | None, scale: Any | None
    ) -> int:
        """Take a layer's router, an `lmserve.model.router.Router`, and its matrix, a part of `add_linear`.

        correction, scale: float32, one for each expert. Gives its number; raises LmserveError for what does not fit.
        """

    def add_experts(self, name: str, parameters: Sequence[float], *, scaled_inputs: bool) -> int:
        """Make room for a layer's experts with this activation; gives their number."""

    def read_packed(self, path: Path, key: str, check: bool) -> str | None:
        """Take weights from this file of packed weights from now on. Gives why not, where it must not be used.

        key: what it must be made of. check: all its bytes are compared with their checksums, and not its table alone.
        """

    def write_packed(self, path: Path, maps: bool) -> None:
        """Write what is kept from now on to this file, which is there, is empty and is nobody else's.

        maps: what was written is mapped from it, and takes no other memory. Raises OSError.
        """

    def end_packed(self, key: str) -> int | None:
        """End reading or writing; gives the size of the file that was written, complete now. Raises OSError."""

    @property
    def packed_bytes(self) -> int:
        """Bytes written so far."""

    def map_linear(self, label: str) -> int | None:
        """Give the number of a linear layer that the file has under this label; None: it must be packed."""

    def map_heads(self, label: str) -> int | None:
        """Give the number of matrices of heads that the file has under this label; None: they must be packed."""

    def map_experts(self, number: int, label: str, gated: bool) -> bool:
        """Take all experts of a layer from the file; False: it has none under this label. gated: each has a gate."""

    def keep(self, number: int, label: str) -> None:
        """Write a packed weight to the file under a label, if one is written. A failure is told by `end_packed`."""

    def extend_experts(self, number: int, experts: Sequence[Any], quantize: str | None = None) -> None:
        """Pack further experts of a layer, each (gate or None, up, down) as parts of `add_linear`.

        Without the GIL, on all threads. Raises LmserveError for what does not fit.
        """

    def add_conv(self, weight: Any, kernel: int, bias: Any | None = None) -> int:
        """Take the float32 weight [channels, kernel] of a causal convolution; gives its number."""

    def add_scan(self, decay: Any, bias: Any, skip: Any | None, limits: tuple[float, float]) -> int:
        """Take the float32 numbers of each head of a recurrence, and the limits of its step; gives their number."""

    def run(
        self,
        program: CpuProgram,
        head: int,
        arrays: CpuArrays,
        n_tokens: int,
        n_seqs: int,
        n_rows: int,
        edits: Any = None,
    ) -> None:
        """Run a step over the arrays, without the GIL, and sample its rows from the logits that `head` gives.

        Raises LmserveError (500) for a step that does not fit the model.
        """

    def logits(self, n_rows: int) -> bytes:
        """Float32 logits of the last step's rows; changed where a row had a temperature or edits."""

    def draft_logits(self, n_rows: int) -> bytes:
        """Float32 logits that the guesses of the last step's rows were made from."""

    def embed_pass(self, program: CpuProgram, texts: CpuTexts) -> bytes | None:
        """Compute one pass of some texts, without the GIL: their float32 pooled states once it was the last."""
