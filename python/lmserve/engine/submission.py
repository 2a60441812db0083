"""A request as it crosses into Rust. It mirrors src/request.rs, which documents each field and checks its limits.

Defaults are those of the Rust side, so that only differing fields are written.
"""

from __future__ import annotations

from typing import Any, Final, Literal, Protocol

import msgspec
from msgspec import Struct

from lmserve.engine.sessions import SessionId

Route = Literal["generate", "chat", "completions", "responses", "messages", "interactive"]
UsageChunks = Literal["none", "last", "every"]
OnDisconnect = Literal["rollback", "keep"]
OnOverflow = Literal["error", "truncate_output", "drop_oldest_turns", "drop_oldest_then_truncate"]
GuidedWhitespace = Literal["compact", "free"]
CallMember = Literal["tool_calls", "function_call"]


class Turn(Struct, tag_field="type", tag="turn", frozen=True):
    """One user turn, put through the chat template."""

    text: str


class Messages(Struct, tag_field="type", tag="messages", frozen=True, omit_defaults=True):
    """`{role, content, ...}` objects, put through the chat template."""

    messages: list[Any]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None


class Text(Struct, tag_field="type", tag="text", frozen=True):
    """Plain text, no template."""

    text: str


class Tokens(Struct, tag_field="type", tag="tokens", frozen=True):
    """Token ids, taken as they are."""

    ids: list[int]


class Hold(Struct, tag_field="type", tag="hold", frozen=True):
    """For this time, a session and its KV are evicted only after those that are not held."""

    ms: int


class GiveUp(Struct, tag_field="type", tag="give_up", frozen=True):
    """A session's KV is given up; its tokens stay."""


class TokenIds(Struct, frozen=True, omit_defaults=True):
    """Where the reply has token ids."""

    beside_text: bool = False
    as_tokens: bool = False


class SessionRef(Struct, frozen=True, omit_defaults=True):
    """The session that a turn belongs to."""

    id: SessionId
    start: bool = False
    by_default: bool = False
    create: bool = False
    parent: SessionId | None = None
    end: bool = False
    on_disconnect: OnDisconnect = "rollback"
    retention: Hold | GiveUp | None = None


class SamplingParams(Struct, frozen=True, omit_defaults=True):
    """How a token is chosen from the logits. None: the model's own default, or else the core's."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = []
    seed: int | None = None
    logprobs: int | None = None


class StopParams(Struct, frozen=True, omit_defaults=True):
    """When generation ends."""

    max_tokens: int | None = None
    default_max_tokens: int | None = None
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True


class JsonObject(Struct, tag_field="type", tag="json_object", frozen=True):
    """One JSON object."""


class JsonSchema(Struct, tag_field="type", tag="json_schema", frozen=True, omit_defaults=True):
    """JSON that a schema allows; `strict`: keywords that cannot be enforced are an error."""

    schema: dict[str, Any] | bool
    strict: bool = False


class Regex(Struct, tag_field="type", tag="regex", frozen=True):
    """Text that a regular expression matches as a whole, in the syntax of Rust's `regex` crate."""

    pattern: str


class Choice(Struct, tag_field="type", tag="choice", frozen=True):
    """One of some texts."""

    choices: list[str]


class Lark(Struct, tag_field="type", tag="lark", frozen=True):
    """Text of a grammar in llguidance's variant of Lark's syntax."""

    grammar: str


Guide = JsonObject | JsonSchema | Regex | Choice | Lark


class AutoTools(Struct, tag_field="type", tag="auto", frozen=True):
    """Functions are called as the model likes."""


class RequiredTools(Struct, tag_field="type", tag="required", frozen=True):
    """The answer is one call or more."""


class NamedTool(Struct, tag_field="type", tag="function", frozen=True):
    """The answer is one call of one function."""

    name: str


class Defaults(Protocol):
    """What holds for a request that leaves it out; None: the core's own default."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def max_tokens(self) -> int | None:
        """Length of a reply, cut to what the context has room for."""


class CallForm(Struct, frozen=True, omit_defaults=True):
    """How the reply reports calls of a function, if not by the name that the model sees."""

    name: str
    namespace: str | None = None
    custom: bool = False


class Submission(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One request."""

    route: Route
    input: Turn | Messages | Text | Tokens
    reply_id: str = ""
    model: str = ""
    created: int = 0
    envelope: dict[str, Any] = {}
    stream: bool = False
    usage_chunks: UsageChunks = "none"
    first_choice: int = 0
    echo: bool = False
    token_ids: TokenIds | None = None
    prompt_logprobs: int | None = None
    session: SessionRef | None = None
    turn_key: str | None = None
    lane: str | None = None
    on_overflow: OnOverflow = "error"
    sampling: SamplingParams = SamplingParams()
    stopping: StopParams = StopParams()
    guide: Guide | None = None
    guide_param: str = "guide"
    guided_whitespace: GuidedWhitespace | None = None  # None: the engine's
    tool_choice: AutoTools | RequiredTools | NamedTool | None = None
    parallel_tool_calls: bool = True
    call_forms: dict[str, CallForm] = {}
    call_member: CallMember = "tool_calls"
    thinking_budget: int | None = None
    n: int = 1
    tenant: int = 0
    adapter: int | None = None  # 0: none; None: that of the session's turns
    priority: int = 0
    background: bool = False


class TextInput(Struct, frozen=True):
    """A text to embed."""

    text: str


class DocumentInput(Struct, frozen=True):
    """A document to embed, cut to `document_tokens`."""

    document: str


class TokensInput(Struct, frozen=True):
    """Token ids to embed."""

    ids: list[int]


class PairInput(Struct, frozen=True):
    """A query and a document to score."""

    pair: tuple[str, str]


class FramedInput(Struct, frozen=True):
    """What comes before a document, the document, and what comes after it."""

    framed: tuple[str, str, str]


class Truncation(Struct, frozen=True, omit_defaults=True):
    """How inputs that are too long are cut: to how many tokens (None: what the model takes), and which end of them."""

    to: int | None = None
    cut: Literal["end", "start"] = "end"


class FieldNames(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What errors call the fields of an embedding request, where its route has other names than `/v1/embeddings`.

    first: the field of the inputs that come first, which others are compared with, and how many there are.
    """

    input: str = "input"
    first: tuple[str, int] | None = None
    dimensions: str = "dimensions"
    truncation: str = "truncate_prompt_tokens"


class EmbedSubmission(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Texts to embed. document_tokens: of a document, of a pair's second text and of a framed one, to cut them to."""

    model: str
    inputs: (
        list[TextInput | TokensInput]
        | list[TextInput]
        | list[TokensInput]
        | list[TextInput | DocumentInput]
        | list[PairInput]
        | list[FramedInput]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    centered: bool = False
    truncation: Truncation | None = None
    document_tokens: int | None = None
    tenant: int = 0
    background: bool = False
    fields: FieldNames | None = None


def with_defaults(submission: Submission, defaults: Defaults) -> Submission:
    """The submission with what it leaves out from `defaults`, where they have it."""
    sampling, stopping = submission.sampling, submission.stopping
    values = {name: getattr(defaults, name) for name in _DEFAULTED if getattr(sampling, name) is None}
    values = {name: value for name, value in values.items() if value is not None}
    if values:
        submission = msgspec.structs.replace(submission, sampling=msgspec.structs.replace(sampling, **values))
    if defaults.max_tokens is not None and stopping.max_tokens is None:
        stopping = msgspec.structs.replace(stopping, default_max_tokens=defaults.max_tokens)
        submission = msgspec.structs.replace(submission, stopping=stopping)
    return submission


_DEFAULTED: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

encode = msgspec.json.Encoder().encode
