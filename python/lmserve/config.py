"""The settings of `lmserve serve`: one frozen object, whose limits are checked when it is created."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

from lmserve.keys import ApiKey, Keyring, KeysError

Device = str
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Ops = Literal["auto", "torch", "cpu"]
Quantize = Literal["auto", "none", "q8", "q4"]
KvDtype = Literal["auto", "fp32", "fp16", "int8"]
LogLevel = Literal["debug", "info", "warning", "error"]
RequestLog = Literal["text", "json", "off"]
Policy = Literal["fair", "fcfs"]
Worker = Literal["thread", "process"]
UserSpecialTokens = Literal["escape", "allow"]
SessionFsync = Literal["always", "interval", "never"]
AgentSessions = Literal["on", "off"]
# The formats of src/text/formats/.
ToolParser = Literal[
    "auto",
    "command",
    "deepseek_v3",
    "deepseek_v31",
    "deepseek_v32",
    "deepseek_v4",
    "functionary_v31",
    "functionary_v32",
    "gemma4",
    "glm",
    "glm47",
    "granite",
    "harmony",
    "hermes",
    "kimi_k2",
    "lfm2",
    "llama3",
    "minimax_m1",
    "minimax_m2",
    "mistral",
    "mistral_args",
    "phi4",
    "pythonic",
    "qwen3_coder",
]
ReasoningParser = Literal["auto", "none", "command", "gemma4", "harmony", "mistral", "seed", "think"]
GenerationConfig = Literal["model", "none"]
GuidedWhitespace = Literal["compact", "free"]

DTYPES: Final[tuple[str, ...]] = get_args(Dtype)
OPS: Final[tuple[str, ...]] = get_args(Ops)
QUANTIZE: Final[tuple[str, ...]] = get_args(Quantize)
KV_DTYPES: Final[tuple[str, ...]] = get_args(KvDtype)
LOG_LEVELS: Final[tuple[str, ...]] = get_args(LogLevel)
REQUEST_LOGS: Final[tuple[str, ...]] = get_args(RequestLog)
POLICIES: Final[tuple[str, ...]] = get_args(Policy)
WORKERS: Final[tuple[str, ...]] = get_args(Worker)
USER_SPECIAL_TOKENS: Final[tuple[str, ...]] = get_args(UserSpecialTokens)
SESSION_FSYNCS: Final[tuple[str, ...]] = get_args(SessionFsync)
AGENT_SESSIONS: Final[tuple[str, ...]] = get_args(AgentSessions)
TOOL_PARSERS: Final[tuple[str, ...]] = get_args(ToolParser)
REASONING_PARSERS: Final[tuple[str, ...]] = get_args(ReasoningParser)
GENERATION_CONFIGS: Final[tuple[str, ...]] = get_args(GenerationConfig)
GUIDED_WHITESPACES: Final[tuple[str, ...]] = get_args(GuidedWhitespace)
DEVICE: Final = re.compile(r"auto|cpu|cuda(:\d{1,3})?")

# What a browser sends as Origin: a scheme, a host in lower case, and a port; RFC 6454, section 6.2.
ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]A-Z]+)(:\d{1,5})?")
HOST: Final = re.compile(r"\*|[^\s/?#@:\[\]]+|[0-9a-fA-F:.]+")

MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][\w.:/-]*")
URL: Final = re.compile(r"https?://[^\s/?#]+(/[^\s?#]*)?", re.IGNORECASE)

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
UNITS: Final = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4} | {
    "ki": KIB,
    "mi": MIB,
    "gi": GIB,
    "ti": 1024 * GIB,
}
SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


class ConfigError(ValueError):
    """A wrong setting: `setting` is the field of `ServeConfig`, the message says the limit and what was given."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


def parse_size(text: str) -> int:
    """Bytes of a size such as `2GiB`, `512M` (powers of 1000), `1.5g` or `4096`.

    Raises ValueError if the text is no size.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a size is a number and a unit, such as 2GiB or 512MiB, but {text!r} was given")
    return int(float(match[1]) * UNITS[(match[2] or "").lower()])


class DiskTier(NamedTuple):
    """A folder, and how many bytes it may take."""

    folder: Path
    size: int


def parse_disk_tier(text: str) -> DiskTier:
    """The folder and size of `DIR,SIZE`. Raises ValueError if the text is something else."""
    folder, comma, size = text.rpartition(",")
    if not comma or not folder:
        raise ValueError(f"a folder, a comma and a size, such as /var/kv,100GiB, but {text!r} was given")
    return DiskTier(Path(folder), parse_size(size))


def parse_named_path(text: str) -> tuple[str, str]:
    """The name and path of `NAME=PATH`. Raises ValueError if the text is something else."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ValueError(f"a name, = and a path, but {text!r} was given")
    return name, path


def format_size(size: int) -> str:
    """`size` bytes for a person: `1.5 GiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{size} B"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of one server. Lengths in tokens, memory in bytes, times in seconds; None: by model and device.

    Raises ConfigError if a value is out of its range.
    """

    model: str | None = None  # None: the default model
    models: tuple[
        tuple[str, str], ...
    ] = ()  # several in place of one: name and model of each, the first is the default
    idle_unload: float = 0.0  # unload a model after so long without a request; 0: never by time
    host: str = "127.0.0.1"
    port: int = 23333  # 0: any free port
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # each is a tenant of its own, without limits
    keys: tuple[ApiKey, ...] = ()  # further ones; none at all: no key is asked for
    loras: tuple[tuple[str, str], ...] = ()  # name and folder of each adapter that is loaded at the start
    max_loras: int = 8  # adapters that may be loaded at a time
    max_lora_rank: int = 64
    lora_dir: Path | None = None  # clients may load adapters of this folder; None: they may load none
    served_model_names: tuple[str, ...] = ()  # the first is the one that replies carry; none: from the model
    device: Device = "auto"
    dtype: Dtype = "auto"
    ops: Ops = "auto"
    quantize: Quantize = "auto"
    kv_dtype: KvDtype = "auto"
    threads: int | None = None
    weights_cache: str = "auto"  # where packed weights are kept: "auto", "off", or a folder
    max_model_len: int | None = None
    max_batch: int = 64
    max_batch_tokens: int | None = None
    speculate: int | None = None  # most tokens drafted for a sequence in one step; None: see docs/speculation.md
    mtp: bool = False  # draft with the model's own head that guesses a token ahead
    policy: Policy = "fair"  # who goes first
    kv_memory: int | None = None
    state_slots: int | None = None  # recurrent states that there is room for, of models that have some
    state_every: int = 2048  # tokens between two snapshots of a state
    state_memory: int = 0  # host memory for states that leave the model's memory
    state_disk: int = 4 * GIB  # of the session_dir, for states and KV of models that have states; 0: none
    kv_host_memory: int = 0  # host memory for KV blocks that leave the model's memory
    kv_disk: DiskTier | None = None  # a folder for KV blocks and states, which outlive the server
    gpu_memory_fraction: float = 0.9  # of the memory that is free on the GPU
    max_queue: int = 1024
    prefix_cache: bool = True
    share_prefix_cache: bool = False
    max_sessions: int = 100_000
    session_ttl: float = 0.0  # 0: for ever
    session_dir: Path | None = None  # None: sessions end with the server
    session_store: str | None = field(default=None, repr=False)  # a database that several servers share
    session_fsync: SessionFsync = "interval"
    agent_sessions: AgentSessions = "on"  # the headers of agents name conversations
    tool_parser: ToolParser = "auto"
    reasoning_parser: ReasoningParser = "auto"
    generation_config: GenerationConfig = "model"  # whose sampling holds for what a request leaves out
    guided_whitespace: GuidedWhitespace = "compact"
    max_body: int = 32 * MIB
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()  # besides localhost; none: any, but localhost alone where nobody else is served
    tls_cert: Path | None = None  # None: HTTP
    tls_key: Path | None = None
    request_log: RequestLog = "text"
    user_special_tokens: UserSpecialTokens = "escape"  # in messages of users and tools
    worker: Worker = "thread"  # where the model is computed: in this process, or in one of its own
    tensor_parallel: int = 1  # processes that the model is split among
    record: Path | None = None  # write every step of the model there
    otlp_endpoint: str | None = None  # None: by the environment's OTEL_ variables; without them, no traces
    grace: float = 1.0  # for running turns, once the server is told to stop
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        self._check_range("port", 0, 65535)
        self._check_range("max_model_len", 1, 16_777_216)
        self._check_range("max_batch", 1, 4096)
        self._check_range("max_batch_tokens", 1, 1_048_576)
        self._check_range("speculate", 0, 32)
        self._check_range("tensor_parallel", 1, 64)
        self._check_range("kv_memory", MIB, 1024 * 1024 * GIB)
        self._check_range("state_slots", 1, 1_000_000)
        self._check_range("state_every", 1, 16_777_216)
        self._check_range("state_memory", 0, 1024 * 1024 * GIB)
        self._check_range("state_disk", 0, 1024 * 1024 * GIB)
        self._check_range("kv_host_memory", 0, 1024 * 1024 * GIB)
        self._check_tiers()
        self._check_range("gpu_memory_fraction", 0.01, 1)
        self._check_range("max_queue", 1, 1_000_000)
        self._check_range("max_sessions", 1, 10_000_000)
        self._check_range("session_ttl", 0, 1_000_000_000)
        self._check_range("max_body", KIB, GIB)
        self._check_range("grace", 0, 3600)
        self._check_range("idle_unload", 0, 1_000_000_000)
        self._check_models()
        self._check_session_store()
        self._check_loras()
        if not self.host or any(c.isspace() for c in self.host):
            raise ConfigError("host", f"must be a host name or an address, but {self.host!r} was given")
        if not self.weights_cache:
            raise ConfigError("weights_cache", "must be auto, off or a folder, but nothing was given")
        if DEVICE.fullmatch(self.device) is None:
            raise ConfigError("device", f"must be auto, cpu, cuda or cuda:N, but {self.device!r} was given")
        self._check_range("threads", 1, 1024)
        self._check_choice("dtype", DTYPES)
        self._check_choice("ops", OPS)
        self._check_choice("quantize", QUANTIZE)
        self._check_choice("kv_dtype", KV_DTYPES)
        self._check_choice("policy", POLICIES)
        self._check_choice("worker", WORKERS)
        self._check_choice("user_special_tokens", USER_SPECIAL_TOKENS)
        self._check_choice("log_level", LOG_LEVELS)
        self._check_choice("request_log", REQUEST_LOGS)
        self._check_choice("session_fsync", SESSION_FSYNCS)
        self._check_choice("agent_sessions", AGENT_SESSIONS)
        self._check_choice("tool_parser", TOOL_PARSERS)
        self._check_choice("reasoning_parser", REASONING_PARSERS)
        self._check_choice("generation_config", GENERATION_CONFIGS)
        self._check_choice("guided_whitespace", GUIDED_WHITESPACES)
        for setting, words in (("api_keys", self.api_keys), ("served_model_names", self.served_model_names)):
            if len(set(words)) != len(words):
                raise ConfigError(setting, "contains the same entry twice")
        for number, key in enumerate(self.api_keys, 1):
            # The key itself stays out of the message: messages reach logs.
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("api_keys", f"key {number} must be printable ASCII without spaces, and not empty")
        for setting, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
            if getattr(self, setting) is not None and getattr(self, other) is None:
                raise ConfigError(
                    setting, f"needs --{other.replace('_', '-')} as well: HTTPS needs a certificate and its key"
                )
        for origin in self.cors_origins:
            if origin != "*" and ORIGIN.fullmatch(origin) is None:
                message = f"must be * or an origin such as https://example.org:8000, but {origin!r} was given"
                raise ConfigError("cors_origins", message)
        if self.otlp_endpoint is not None and URL.fullmatch(self.otlp_endpoint) is None:
            message = "must be a URL such as http://127.0.0.1:4318 (OTLP over HTTP), but "
            raise ConfigError("otlp_endpoint", f"{message}{self.otlp_endpoint!r} was given")
        for name in self.allowed_hosts:
            if HOST.fullmatch(name) is None:
                message = f"must be * or a host name without scheme and port, but {name!r} was given"
                raise ConfigError("allowed_hosts", message)
        try:
            _ = self.keyring
        except KeysError as error:
            raise ConfigError("keys", str(error)) from error
        for name in self.served_model_names:
            if not name or name != name.strip() or not name.isprintable():
                raise ConfigError("served_model_names", f"must be printable and not empty, but {name!r} was given")

    @property
    def keyring(self) -> Keyring:
        """All keys."""
        return Keyring((*Keyring.of(*self.api_keys).keys, *self.keys))

    @property
    def in_processes(self) -> bool:
        """Whether other processes compute the model."""
        return self.worker == "process" or self.tensor_parallel > 1

    def _check_models(self) -> None:
        names = [name for name, _ in self.models]
        if len(set(names)) < len(names):
            raise ConfigError(
                "model", f"must name each model once, but {max(names, key=names.count)!r} was given twice"
            )
        for name, model in self.models:
            if MODEL_NAME.fullmatch(name) is None or not model:
                form = "NAME=MODEL, with letters, digits and ._:/- in NAME"
                raise ConfigError("model", f"must be {form}, but {f'{name}={model}'!r} was given")
        for setting in ("served_model_names", "record"):
            if self.models and getattr(self, setting):
                raise ConfigError(setting, "applies to a single model, but several were given")

    def _check_session_store(self) -> None:
        if self.session_store is None:
            return
        if not self.session_store.startswith(("postgresql://", "postgres://")):
            # What was given may have a password in it.
            raise ConfigError("session_store", "must be a URL that begins with postgresql://")
        for setting, flag in (
            ("session_dir", "--session-dir: sessions are kept in one place"),
            ("models", "several models"),
            ("idle_unload", "--idle-unload"),
        ):
            if getattr(self, setting):
                raise ConfigError("session_store", f"cannot go with {flag}")

    def _check_loras(self) -> None:
        self._check_range("max_loras", 1, 1000)
        self._check_range("max_lora_rank", 1, 4096)
        names = [name for name, _ in self.loras]
        for name, path in self.loras:
            if MODEL_NAME.fullmatch(name) is None or not path:
                form = "NAME=PATH, with letters, digits and ._:/- in NAME"
                raise ConfigError("loras", f"must be {form}, but {f'{name}={path}'!r} was given")
            if names.count(name) > 1 or name in self.served_model_names:
                raise ConfigError("loras", f"must name each adapter otherwise, but {name!r} is taken")
        if len(names) > self.max_loras:
            raise ConfigError("loras", f"{len(names)} adapters were given; the limit is {self.max_loras} (max_loras)")
        for setting, flag in (
            ("models", "several models"),
            ("idle_unload", "--idle-unload"),
        ):
            for given in ("loras", "lora_dir"):
                if getattr(self, given) and getattr(self, setting):
                    raise ConfigError(given, f"cannot go with {flag}: adapters are not supported there")

    def _check_tiers(self) -> None:
        if self.kv_disk is not None and not MIB <= self.kv_disk.size <= 1024 * 1024 * GIB:
            message = f"needs a size of {MIB} to {1024 * 1024 * GIB} bytes, but {self.kv_disk.size} was given"
            raise ConfigError("kv_disk", message)
        for setting in ("kv_host_memory", "kv_disk", "state_memory"):
            if not getattr(self, setting):
                continue
            if not self.prefix_cache:
                raise ConfigError(setting, "needs the prefix cache, but --no-prefix-cache was given")
            if self.record is not None:
                message = "cannot go with --record: a recorded step must not depend on what lies elsewhere"
                raise ConfigError(setting, message)
            if self.in_processes:
                message = "cannot go with --worker process or --tensor-parallel: their memory is not copied"
                raise ConfigError(setting, message)

    def _check_range(self, setting: str, low: float, high: float) -> None:
        value = getattr(self, setting)
        # `not` around the comparison, so that NaN is refused too.
        if value is not None and not low <= value <= high:
            raise ConfigError(setting, f"must lie in [{low}, {high}], but {value} was given")

    def _check_choice(self, setting: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, setting)
        if value not in choices:
            raise ConfigError(setting, f"must be one of {', '.join(choices)}, but {value!r} was given")
