"""How a checkpoint is run, and how much memory that needs: arithmetic on the configuration, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from lmserve._core import ENTRY_TOKENS, cpu_kv_bytes_per_token, cpu_linear_bytes
from lmserve.model.cache_sizes import CacheSizes
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.checkpoint_share import own_share, rank_device
from lmserve.model.config import AttentionLayer, ModelConfig
from lmserve.model.device import available_memory, cuda_memory, usable_cores
from lmserve.model.errors import OptionError
from lmserve.model.expert_tensors import StackedTensor
from lmserve.model.packed_formats import PackedFormat, format_of, unscaled
from lmserve.model.tensors import REPACKED_TYPES, TensorSource
from lmserve.model.weights_cache import WeightsCache, find_cache

ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
OPS = ("auto", "torch", "cpu")
QUANTIZE = ("auto", "none", "q8", "q4")
KV_DTYPES = ("auto", "fp32", "fp16", "int8")
HEADS = ("model.embed_tokens.weight", "lm_head.weight")
# Of mixtures of experts; they are kept in fp32.
# What attention adds to scores by distance; the kernels read so many numbers at once, also at the end of a row.
DISTANCES, DISTANCES_READ = "encoder.distances.weight", 64
ROUTERS = ("mlp.gate.weight", "router.weight", "router.proj.weight")
CPU_KV_BYTES = 2 << 30
CPU_KV_FRACTION = 0.25
# Blocks at most, in multiples of what max_batch sequences of max_model_len fill: the rest keeps prefixes and sessions.
SPARE_FACTOR = 4
# States at most, in multiples of max_batch: those that run, and snapshots where conversations can be taken up again.
SLOT_FACTOR = 16
# Sampled rows of a step with drafts, which get what the batch leaves. A batch of that many gains nothing by them.
DRAFT_ROWS = 64
# Tokens drafted for a sequence at most on the CPU kernels, where nothing else is asked for.
CPU_DRAFTS = 8


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How to run a checkpoint. None: chosen for the checkpoint and the machine. Lengths in tokens, memory in bytes."""

    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: str = "auto"  # "auto" (fp32 on the CPU, bf16 on CUDA), "fp32", "bf16", "fp16"
    ops: str = "auto"  # "auto" ("cpu" on the CPU), "torch", "cpu"
    quantize: str = "auto"  # weights: "auto" (as stored, where there are kernels), "none" (floats); of "cpu" "q8", "q4"
    kv_dtype: str = "auto"  # KV cache of "cpu": "auto" (fp16; fp32 with quantize "none"), "fp32", "fp16", "int8"
    max_batch: int = 64  # sequences in one step
    max_batch_tokens: int | None = None  # new tokens in one step; None: see `_default_batch_tokens`
    max_model_len: int | None = None
    kv_memory: int | None = None
    state_slots: int | None = None  # recurrent states, of models that have some
    block_size: int | None = None  # None: 16 on the CPU, 256 on CUDA
    gpu_memory_fraction: float = 0.9  # of what is free on the GPU before the weights are loaded
    graphs: bool = True  # CUDA graphs for decode steps
    speculate: int | None = 0  # most tokens drafted for a sequence in one step; None: what usually pays
    mtp: bool = False  # the checkpoint was opened with its head that guesses a token ahead
    threads: int | None = None  # None: the cores that this process may use
    tensor_parallel: int = 1  # processes that the model is split among
    weights_cache: str | None = None  # path of the file that packed weights of "cpu" are kept in; None: they are not
    adapter_numbers: int = 0  # of the matrices of adapters, for which memory is left beside the KV cache


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a runner will allocate, and why. Memory in bytes, lengths in tokens."""

    device: str
    dtype: str
    ops: str
    weight_bytes: int
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_batch: int
    max_batch_tokens: int
    max_rows: int  # sampled in one step
    speculate: int  # most tokens drafted for a sequence in one step
    kv_dtype: str
    quantize: str | None  # None keeps weights as they are stored; "none": as floats
    state_slots: int = 0  # recurrent states that there is room for; 0: the model has none
    state_bytes: int = 0  # of one of them
    window: int = 0  # tokens that layers with blocks of their own see; 0: all layers have the same blocks
    window_bytes_per_token: int = 0  # of these layers, beside kv_bytes_per_token
    num_window_blocks: int = 0
    kv_memory: int = 0  # that the KV cache was planned for
    weights_cache: WeightsCache | None = None  # the file of packed weights that is read or written
    mtp: bool = False  # a head guesses a token ahead
    ranks: int = 1  # processes that the model is split among; memory is that of each
    adapter_bytes: int = 0  # of the adapters that are loaded at the start; of all ranks together

    @property
    def weights_are_mapped(self) -> bool:
        """Whether weights lie in pages of a file, which processes share and the system may drop and read again."""
        return self.weights_cache is not None and (self.weights_cache.is_there or self.weights_cache.maps)

    @property
    def packed(self) -> bool:
        """Whether torch's operations keep weights as they are stored, of types that there is a kernel for."""
        return self.ops == "torch" and self.quantize is None

    @property
    def kv_bytes(self) -> int:
        """Memory of the KV cache."""
        per_block = self.kv_bytes_per_token * self.num_blocks + self.window_bytes_per_token * self.num_window_blocks
        return self.block_size * per_block

    @property
    def sequence_window_blocks(self) -> int:
        """Blocks of layers with a window that a long sequence has between two steps: its window and one more."""
        return -(-self.window // self.block_size) + 1

    def kv_bytes_of(self, length: int) -> int:
        """Memory that a sequence of that many tokens takes in the KV cache."""
        blocks = -(-length // self.block_size)
        windows = min(blocks, self.sequence_window_blocks) if self.num_window_blocks else 0
        return self.block_size * (blocks * self.kv_bytes_per_token + windows * self.window_bytes_per_token)

    def sequences_that_fit(self, length: int) -> int:
        """How many sequences of that many tokens the KV cache holds."""
        blocks = -(-length // self.block_size)
        held = self.num_blocks // blocks
        if self.num_window_blocks:
            held = min(held, self.num_window_blocks // min(blocks, self.sequence_window_blocks))
        return held

    @property
    def states_bytes(self) -> int:
        """Memory of all recurrent states."""
        return self.state_bytes * self.state_slots


def plan_memory(checkpoint: Checkpoint, options: RunnerOptions, *, gpu_memory: int | None = None) -> MemoryPlan:
    """Decide device, dtype, lengths and the size of the KV cache, from the checkpoint's headers alone.

    If the memory cannot hold one sequence of the model's own length, max_model_len is what it can hold.

    gpu_memory: bytes to reckon with on a GPU, where known better than all of its memory. Raises OptionError where an
    option is out of range, or where one sequence of the max_model_len that was asked for does not fit.
    """
    device = _device(options)
    on_cpu = device == "cpu"
    dtype = options.dtype if options.dtype != "auto" else "fp32" if on_cpu or checkpoint.kind == "embed" else "bf16"
    _check(dtype in ITEM_BYTES, "dtype", f"dtype is {dtype!r}; it must be one of auto, {', '.join(ITEM_BYTES)}")
    _check(1 <= options.max_batch <= 4096, "max_batch", f"max_batch is {options.max_batch}; it must be 1 to 4096")
    _check(
        0 < options.gpu_memory_fraction <= 1,
        "gpu_memory_fraction",
        f"gpu_memory_fraction is {options.gpu_memory_fraction}; it must be above 0 and at most 1",
    )
    ops = _ops(checkpoint, options, device)
    quantize, kv_dtype = _formats(options, ops, dtype)
    if ops == "torch" and not _packs(checkpoint, options, device, dtype):
        quantize = "none"
    if ops == "cpu" and checkpoint.kind == "embed" and options.kv_dtype == "auto":
        # Keys and values live for one pass: nothing is gained by rounding them.
        kv_dtype = "fp32"
    if not on_cpu and options.tensor_parallel > 1:
        _gpu_memory(rank_device(device, options.tensor_parallel - 1))
    config, shapes = own_share(checkpoint, options.tensor_parallel)
    weight_bytes = _weight_bytes(checkpoint, shapes, ops, dtype, quantize)
    cache = find_cache(checkpoint, options.weights_cache, quantize, weight_bytes) if ops == "cpu" else None
    max_batch_tokens = options.max_batch_tokens or _default_batch_tokens(ops, device, options)
    least = _least_batch_tokens(options)
    _check(
        max_batch_tokens >= least,
        "max_batch_tokens",
        f"max_batch_tokens is {max_batch_tokens}; it must be at least {least}: max_batch, {options.max_batch}, and"
        f" {ENTRY_TOKENS} for a sequence that is admitted",
    )
    speculate = options.speculate
    if speculate is None:
        # Where a model has states, a right guess is computed twice.
        pays = ops == "cpu" and checkpoint.kind == "generate" and not config.state_bytes
        speculate = CPU_DRAFTS if pays else 0
    _check(speculate >= 0, "speculate", f"speculate is {speculate}; it must be at least 0")
    _check(
        speculate == 0 or checkpoint.kind == "generate",
        "speculate",
        f"speculate is {speculate}; a model of kind {checkpoint.kind!r} generates no tokens to guess",
    )
    _check(
        not config.mtp or options.tensor_parallel == 1,
        "mtp",
        f"mtp is given; a model that is split among {options.tensor_parallel} processes guesses no tokens ahead",
    )
    drafts = max(speculate, int(config.mtp))
    max_rows = max(options.max_batch, min(options.max_batch * (1 + drafts), DRAFT_ROWS, max_batch_tokens))
    longest = checkpoint.max_model_len if options.max_model_len is None else options.max_model_len
    _check(
        1 <= longest <= checkpoint.max_model_len,
        "max_model_len",
        f"max_model_len is {longest}; this model takes 1 to {checkpoint.max_model_len} tokens",
    )
    adapter_bytes = options.adapter_numbers * ITEM_BYTES[dtype]
    block_size = options.block_size or (16 if on_cpu else 256)
    per_token, num_blocks, state_slots = 0, 0, 0
    window, window_per_token, num_window_blocks, memory = 0, 0, 0, 0
    if checkpoint.kind == "generate":
        window = _window(config, longest, block_size)
        per_token, window_per_token = _kv_bytes_per_token(config, ops, kv_dtype, windows=window > 0)
        activations = _activation_bytes(config, max_rows, max_batch_tokens, ITEM_BYTES[dtype])
        free = _free_memory(device, options, gpu_memory) - activations
        # Mapped weights may be more than the memory: what they leave is half of it, then.
        free -= weight_bytes if cache is None or not (cache.is_there or cache.maps) else min(weight_bytes, free // 2)
        free -= adapter_bytes
        state_slots = _state_slots(config, options, free, on_cpu=on_cpu)
        free -= state_slots * config.state_bytes
        if options.kv_memory is not None:
            memory = options.kv_memory
            _check_kv_memory(memory, device, options, gpu_memory)
        else:
            memory = max(0, min(int(free * CPU_KV_FRACTION), CPU_KV_BYTES) if on_cpu else free)
            # A tiny model could fill all memory with blocks that will never be needed.
            most = SPARE_FACTOR * options.max_batch * (longest + block_size)
            memory = min(memory, most * (per_token + window_per_token))
        sizes = CacheSizes(memory, block_size, longest, per_token, window_per_token, window)
        num_blocks, num_window_blocks = sizes.blocks(options.max_batch, max_batch_tokens)
        if num_blocks * block_size < longest:
            _check(
                options.max_model_len is None and num_blocks > 0,
                "kv_memory",
                f"kv_memory is {memory} bytes, which holds {num_blocks * block_size} tokens of"
                f" {per_token + window_per_token} bytes each, but one sequence of max_model_len needs {longest}",
            )
            longest = num_blocks * block_size
    return MemoryPlan(
        device=device,
        dtype=dtype,
        ops=ops,
        weight_bytes=weight_bytes,
        adapter_bytes=adapter_bytes,
        kv_bytes_per_token=per_token,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=longest,
        max_batch=options.max_batch,
        max_batch_tokens=max_batch_tokens,
        max_rows=max_rows,
        speculate=speculate,
        kv_dtype=kv_dtype,
        quantize=quantize,
        state_slots=state_slots,
        state_bytes=config.state_bytes if state_slots else 0,
        window=window if num_window_blocks else 0,
        window_bytes_per_token=window_per_token,
        num_window_blocks=num_window_blocks,
        kv_memory=memory,
        weights_cache=cache,
        mtp=config.mtp,
        ranks=options.tensor_parallel,
    )


def _default_batch_tokens(ops: str, device: str, options: RunnerOptions) -> int:
    """8,192 on CUDA, 512 with torch on the CPU, and 64 for each thread of the "cpu" ops, at most 512.

    Those are as fast with small pieces of a prompt as with large ones, and everyone waits for less of it.
    """
    if ops == "cpu":
        threads = options.threads or usable_cores()
        return max(min(64 * threads, 512), 128, options.max_batch + 64)
    return max(512 if device == "cpu" else 8192, _least_batch_tokens(options))


def _least_batch_tokens(options: RunnerOptions) -> int:
    """The scheduler's rule: a step holds a token of every running sequence, and a few of one that is admitted."""
    return options.max_batch + ENTRY_TOKENS


def _check(holds: bool, option: str, message: str) -> None:
    if not holds:
        raise OptionError(option, message)


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total


def _device(options: RunnerOptions) -> str:
    kind = options.device.partition(":")[0]
    _check(kind in ("auto", "cpu", "cuda"), "device", f"device is {options.device!r}; it must be auto, cpu or cuda[:N]")
    if kind == "cpu" or (kind == "auto" and cuda_memory(0) is None):
        return "cpu"
    device = "cuda:0" if options.device in ("auto", "cuda") else options.device
    _check(device[5:].isdecimal(), "device", f"device is {options.device!r}; it must be auto, cpu or cuda[:N]")
    _gpu_memory(device)
    return device


def _ops(checkpoint: Checkpoint, options: RunnerOptions, device: str) -> str:
    _check(options.ops in OPS, "ops", f"ops is {options.ops!r}; it must be one of {', '.join(OPS)}")
    # The cpu kernels compute in fp32: a user who wants another type gets torch's.
    fits = device == "cpu" and options.dtype in ("auto", "fp32")
    ranks = options.tensor_parallel
    if checkpoint.family.by_transformers:
        _check(
            options.ops != "cpu", "ops", f"ops is 'cpu'; {checkpoint.name} runs through transformers, on torch alone"
        )
        _check(
            ranks == 1, "tensor_parallel", f"tensor_parallel is {ranks}; transformers runs this model, in one process"
        )
        return "torch"
    if ranks > 1:
        message = f"tensor_parallel is {ranks}; the cpu kernels run a model in one process, but ops is 'cpu'"
        _check(options.ops != "cpu", "tensor_parallel", message)
        return "torch"
    if options.ops == "auto":
        return "cpu" if fits else "torch"
    _check(
        options.ops == "torch" or fits,
        "ops",
        f"ops is 'cpu'; that computes on the CPU in fp32, but {device} and {options.dtype} were asked for",
    )
    return options.ops


def _formats(options: RunnerOptions, ops: str, dtype: str) -> tuple[str | None, str]:
    """How weights and KV cache are kept: `MemoryPlan.quantize` and `kv_dtype`."""
    for name, choices in (("quantize", QUANTIZE), ("kv_dtype", KV_DTYPES)):
        given = getattr(options, name)
        _check(given in choices, name, f"{name} is {given!r}; it must be one of {', '.join(choices)}")
        default = ("auto", "none") if name == "quantize" else ("auto", dtype)
        _check(
            ops == "cpu" or given in default,
            name,
            f"{name} is {given!r}; with torch's operations it can only be {' or '.join(default)}",
        )
    quantize = None if options.quantize == "auto" else options.quantize
    if ops != "cpu":
        return quantize, dtype
    if options.kv_dtype != "auto":
        return quantize, options.kv_dtype
    return quantize, "fp32" if quantize == "none" else "fp16"


def _packs(checkpoint: Checkpoint, options: RunnerOptions, device: str, dtype: str) -> bool:
    """Whether torch's operations keep weights as they are stored: on CUDA; on the CPU, where Triton interprets."""
    if options.quantize != "auto" or checkpoint.kind != "generate" or checkpoint.family.by_transformers:
        return False
    if options.tensor_parallel > 1 or find_spec("triton") is None:
        return False
    # The interpreter multiplies no bf16.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype != "bf16"
    if device == "cpu" and not interpreted:
        return False
    return bool(formats_in(checkpoint))


def formats_in(checkpoint: Checkpoint) -> set[PackedFormat]:
    """The formats of a checkpoint's matrices that can stay packed on a GPU."""
    found = (_packed_format(checkpoint, name) for name in checkpoint.tensors)
    return {form for form in found if form is not None}


def _packed_format(checkpoint: Checkpoint, name: str) -> PackedFormat | None:
    source, _ = unscaled(checkpoint.tensors[name])
    return None if name.endswith(ROUTERS) else format_of(source.dtype, source.shape)


def _weight_bytes(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], ops: str, dtype: str, quantize: str | None
) -> int:
    if ops != "cpu":
        return sum(
            _elements(shape) * ITEM_BYTES[dtype] if form is None or quantize == "none" else form.nbytes(*shape)
            for shape, form in ((shape, _packed_format(checkpoint, name)) for name, shape in shapes.items())
        )
    total = 0
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(ROUTERS):
            total += cpu_linear_bytes("F32", None, *tensor.shape)
        elif len(tensor.shape) < 2 or name.endswith(".bias"):
            total += _elements(tensor.shape) * ITEM_BYTES["fp32"]
        elif name == DISTANCES:
            heads, columns = tensor.shape
            total += heads * (columns + DISTANCES_READ) * ITEM_BYTES["fp32"]
        elif len(tensor.shape) == 2:
            total += _linear_bytes(tensor, head_format(quantize) if name in HEADS else quantize)
        elif isinstance(tensor, StackedTensor):
            total += sum(_linear_bytes(expert, quantize) for expert in tensor.parts)
        else:
            total += tensor.shape[0] * _linear_bytes(tensor, quantize)
    return total


def _linear_bytes(tensor: TensorSource, kept: str | None) -> int:
    stored = "F32" if kept is not None else REPACKED_TYPES.get(tensor.dtype, tensor.dtype)
    return cpu_linear_bytes(stored, kept, *tensor.shape[-2:])


def _kv_bytes_per_token(config: ModelConfig, ops: str, kv_dtype: str, *, windows: bool) -> tuple[int, int]:
    """Bytes of a token's keys and values, and of those in the layers whose blocks are given back."""
    groups: tuple[list[AttentionLayer], list[AttentionLayer]] = ([], [])
    for layer, window in zip(config.cached_layers, config.cache_windows, strict=True):
        groups[windows and window is not None].append(layer)

    def size(layers: list[AttentionLayer]) -> int:
        if ops == "cpu":
            return cpu_kv_bytes_per_token(kv_dtype, [(layer.num_kv_heads, layer.head_dim) for layer in layers])
        return 2 * sum(layer.kv_size for layer in layers) * ITEM_BYTES[kv_dtype]

    return size(groups[0]), size(groups[1])


def _window(config: ModelConfig, longest: int, block_size: int) -> int:
    """The widest window of layers that give blocks back; 0: none does, or there are no sequences that long."""
    window = max((window for window in config.cache_windows if window is not None), default=0)
    # A recurrent state is known at its snapshots alone, which are not taken where windows end.
    return 0 if config.recurrent or window + 2 * block_size > longest else window


def _state_slots(config: ModelConfig, options: RunnerOptions, free: int, *, on_cpu: bool) -> int:
    """How many recurrent states there is room for in `free` bytes: a quarter of them, unless a number was asked for."""
    each, given = config.state_bytes, options.state_slots
    if not each:
        _check(given is None, "state_slots", f"state_slots is {given}; this model has no recurrent state")
        return 0
    if given is not None:
        _check(given >= 1, "state_slots", f"state_slots is {given}; it must be at least 1")
        fits = f"each takes {each >> 10} KiB, and {free >> 20} MiB are free"
        _check(given * each <= free, "state_slots", f"state_slots is {given}; {fits}")
        return given
    memory = max(0, int(free * CPU_KV_FRACTION))
    memory = min(memory, CPU_KV_BYTES) if on_cpu else memory
    return max(1, min(memory // each, SLOT_FACTOR * options.max_batch))


def head_format(quantize: str | None) -> str | None:
    """How the "cpu" operations keep the embedding and the head: with 4 bits they would cost most of the accuracy."""
    return "q8" if quantize == "q4" else quantize


def _free_memory(device: str, options: RunnerOptions, gpu_memory: int | None) -> int:
    if device == "cpu":
        return available_memory() // options.tensor_parallel
    return int((gpu_memory or _gpu_memory(device)) * options.gpu_memory_fraction)


def _check_kv_memory(memory: int, device: str, options: RunnerOptions, gpu_memory: int | None) -> None:
    free = _free_memory(device, options, gpu_memory)
    left = f"this process can take only {free >> 20} MiB more" if device == "cpu" else f"{device} has {free >> 20} MiB"
    _check(memory <= free, "kv_memory", f"kv_memory is {memory >> 20} MiB, but {left}")


def _gpu_memory(device: str) -> int:
    total = cuda_memory(int(device.partition(":")[2]))
    if total is None:
        raise OptionError("device", f"the CUDA driver shows no GPU for {device}")
    return total


def _activation_bytes(config: ModelConfig, max_rows: int, max_batch_tokens: int, item_bytes: int) -> int:
    """An upper estimate of what a step allocates: one layer's activations, and the sampler's copies of the logits."""
    attention = max((layer.q_size + 2 * layer.kv_size for layer in config.attention), default=0)
    recurrent = max((4 * layer.channels for layer in config.recurrent), default=0)
    widest = 4 * config.hidden_size + 2 * max(attention, recurrent) + 3 * config.intermediate_size
    # A head that guesses ahead has logits of its own, and reads states and embeddings side by side.
    head = 4 * (max_rows * config.vocab_size + 3 * max_batch_tokens * config.hidden_size) * config.mtp
    return max_batch_tokens * widest * item_bytes + 8 * max_rows * config.vocab_size * 4 + head
