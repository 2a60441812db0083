"""Checks what this machine has for a server, and advises what to change: for `lmserve doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from lmserve._core import VERSION, cpu_isa
from lmserve.assets import cache_dir
from lmserve.config import GIB, ServeConfig, format_size
from lmserve.errors import LmserveError
from lmserve.hub.cache import cache_folder
from lmserve.model.device import available_memory, cuda_memory, usable_cores
from lmserve.stored import stored_models

MAX_GPUS: Final = 16
LITTLE_MEMORY: Final = GIB
LITTLE_DISK: Final = 2 * GIB
MEASURED_TOKENS: Final = 32


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report. `advice`: what to change. `broken`: a server cannot run like this."""

    name: str
    text: str
    advice: str | None = None
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. Memory and disk in bytes."""

    processor: str
    architecture: str
    isa: str  # of the kernels, or why there is none
    isa_runs: bool
    cores: int  # of the machine
    usable_cores: int  # by this process
    load: float  # of the last minute: programs that compute, or would
    memory: int
    free_memory: int  # that this process may take
    torch: str | None  # its version
    gpus: tuple[int, ...]  # memory of each
    caches: tuple[CacheFolder, ...]
    models: int
    models_size: int
    port_taken: bool


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """A folder that models are kept in, or will be."""

    path: Path
    writable: bool
    free: int


def examine() -> Machine:
    """Look at this machine. Loads no model and asks no network."""
    try:
        isa, runs = cpu_isa(os.environ.get("LMSERVE_CPU_ISA")), True
    except LmserveError as error:
        isa, runs = str(error), False
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = None
    gpus: list[int] = []
    while len(gpus) < MAX_GPUS and (size := cuda_memory(len(gpus))) is not None:
        gpus.append(size)
    models = stored_models()
    return Machine(
        processor=_processor(),
        architecture=platform.machine(),
        isa=isa,
        isa_runs=runs,
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        load=os.getloadavg()[0],
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free_memory=available_memory(),
        torch=torch,
        gpus=tuple(gpus),
        caches=tuple(_cache_folder(path) for path in (cache_dir(), cache_folder())),
        models=len(models),
        models_size=sum(model.size for model in models),
        port_taken=_answers(ServeConfig().host, ServeConfig().port),
    )


def findings(machine: Machine) -> list[Finding]:
    """The report on a machine, in the order in which it is read."""
    return [
        Finding("lmserve", f"{VERSION}, Python {platform.python_version()}, {platform.system()} {platform.release()}"),
        _kernels(machine),
        _cores(machine),
        _memory(machine),
        _torch(machine),
        *(_cache(folder) for folder in machine.caches),
        Finding("Models", f"{machine.models} in the cache, {format_size(machine.models_size)}; lmserve list"),
        _port(machine),
    ]


def _kernels(machine: Machine) -> Finding:
    if not machine.isa_runs:
        return Finding("Processor", machine.processor, f"{machine.isa}: unset it", broken=True)
    text = f"{machine.processor}, kernels for {machine.isa}"
    if machine.isa != "portable":
        return Finding("Processor", text)
    wanted = "AVX2" if machine.architecture == "x86_64" else "the dot product instructions of ARMv8.2"
    return Finding(
        "Processor",
        text,
        f"The kernels do not find {wanted} and are many times slower. In a virtual machine, expose the "
        "host's processor (QEMU: -cpu host)",
    )


def _cores(machine: Machine) -> Finding:
    text = f"{machine.usable_cores} of {machine.cores} cores"
    if machine.load > machine.cores / 2:
        return Finding(
            "Threads",
            text,
            f"The load of the last minute is {machine.load:.1f}: other programs use the cores too, and a "
            "step waits for its slowest thread. Stop them, or serve with fewer --threads",
        )
    if machine.usable_cores < machine.cores:
        return Finding(
            "Threads",
            text,
            "A limit of the container or taskset allows no more. Raise the limit (docker run --cpus, "
            "resources.limits.cpu)",
        )
    return Finding("Threads", text)


def _memory(machine: Machine) -> Finding:
    text = f"{format_size(machine.free_memory)} free of {format_size(machine.memory)}"
    if machine.free_memory < LITTLE_MEMORY:
        return Finding(
            "Memory",
            text,
            f"Less than {format_size(LITTLE_MEMORY)} is free for this process. Raise the container's limit, "
            "stop other programs, or serve with less --kv-memory and a lower --max-model-len",
        )
    return Finding("Memory", text)


def _torch(machine: Machine) -> Finding:
    gpus = f"{len(machine.gpus)} GPU" + ("s" if len(machine.gpus) > 1 else "")
    sizes = ", ".join(format_size(size) for size in machine.gpus)
    where = f"{gpus} ({sizes})" if machine.gpus else "no GPU"
    if machine.torch is None:
        text = f"torch is not installed, {where}: models run on the CPU kernels"
        if machine.gpus:
            return Finding("torch", text, "To use the GPU: pip install 'lmserve[cuda]'")
        return Finding("torch", f"{text}; embedding models need pip install 'lmserve[torch]'")
    text = f"torch {machine.torch}, {where}"
    if machine.gpus and machine.torch.endswith("+cpu"):
        return Finding("torch", text, "This torch was built without CUDA: install a build with CUDA")
    return Finding("torch", text)


def _cache(folder: CacheFolder) -> Finding:
    text = f"{folder.path}, {format_size(folder.free)} free"
    if not folder.writable:
        return Finding(
            "Cache", text, f"{folder.path} cannot be written: change its owner, or set LMSERVE_CACHE and HF_HOME"
        )
    if folder.free < LITTLE_DISK:
        return Finding("Cache", text, "A model takes some gigabytes: free some space, or set LMSERVE_CACHE and HF_HOME")
    return Finding("Cache", text)


def _port(machine: Machine) -> Finding:
    default = ServeConfig()
    address = f"{default.host}:{default.port}"
    if machine.port_taken:
        return Finding("Port", f"a server answers at {address}; another one needs --port")
    return Finding("Port", f"{address} is free")


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a model answers one client here, in seconds."""

    model: str
    loading: float
    first_token: float
    token: float


def measure(model: str | None) -> Speed:
    """Load a model and let it generate. Raises SourceError or LmserveError if it cannot be served."""
    from lmserve.engine.llm import LLM
    from lmserve.engine.submission import SamplingParams, StopParams

    began = time.monotonic()
    with LLM(model, max_batch=1, max_model_len=None) as llm:
        loaded = time.monotonic()
        sampling, stopping = SamplingParams(temperature=0), StopParams(max_tokens=MEASURED_TOKENS, ignore_eos=True)
        # The first run touches memory that later ones find.
        llm.generate("Once", sampling, StopParams(max_tokens=1))
        start = time.monotonic()
        llm.generate("Once upon a time", sampling, StopParams(max_tokens=1))
        first = time.monotonic()
        llm.generate("There was a house", sampling, stopping)
        each = (time.monotonic() - first) / MEASURED_TOKENS
    return Speed(model or "the default model", loaded - began, first - start, each)


def speed_finding(speed: Speed) -> Finding:
    """The line about a measured speed."""
    return Finding(
        "Speed",
        f"{speed.model}: loaded in {speed.loading:.1f} s, first token after {1000 * speed.first_token:.0f} ms, then "
        f"{1 / speed.token:.0f} tokens a second for one client",
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _cache_folder(path: Path) -> CacheFolder:
    there = path
    while not there.exists():
        there = there.parent
    return CacheFolder(path, os.access(there, os.W_OK | os.X_OK), shutil.disk_usage(there).free)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
