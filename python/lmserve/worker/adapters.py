"""Adapters for the processes that compute: a frame for each module, then one that names the adapter.

The server keeps what it has sent. So processes that are started again get the same adapters, whatever has become of
their files.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Self

import numpy as np
from msgspec import Struct

from lmserve.model.adapter_files import Adapter, LowRank
from lmserve.model.errors import AdapterError
from lmserve.model.interface import Runner, taking_adapters
from lmserve.worker.messages import decode, encode
from lmserve.worker.pipe import MAX_BODY, Kind
from lmserve.worker.processes import Group


class Module(Struct, frozen=True, kw_only=True):
    """What an adapter adds to a module; see `LowRank`. Matrices in 32-bit floats, row by row."""

    module: str
    tensor: str
    rank: int
    down: bytes
    up: bytes

    @classmethod
    def of(cls, module: str, own: LowRank) -> Self:
        """As a message."""
        return cls(module=module, tensor=own.tensor, rank=len(own.down), down=own.down.tobytes(), up=own.up.tobytes())

    def low_rank(self) -> LowRank:
        """The matrices."""
        # Copies, as torch takes none that must not be written.
        down, up = (np.frombuffer(data, np.float32).copy() for data in (self.down, self.up))
        return LowRank(down.reshape(self.rank, -1), up.reshape(-1, self.rank), self.tensor)


class AdapterName(Struct, frozen=True, kw_only=True):
    """An adapter by its number. `loaded`: its modules came before this; otherwise it is forgotten."""

    number: int
    loaded: bool
    path: str = ""
    digest: bytes = b""


class SentAdapters:
    """The adapters of steps, and which of them the processes have been sent."""

    def __init__(self) -> None:
        self._adapters: dict[int, Adapter] = {}
        self._group: Group | None = None
        self._sent: dict[int, Adapter] = {}

    def load(self, number: int, adapter: Adapter) -> None:
        """Keep an adapter for the steps that need it. Raises AdapterError for one that no frame can hold."""
        for module, own in adapter.modules.items():
            size = own.down.nbytes + own.up.nbytes
            # The names take the rest.
            if size > MAX_BODY // 2:
                raise AdapterError(f"{adapter.path}: {module} takes {size} bytes; the limit is {MAX_BODY // 2}")
        self._adapters[number] = adapter

    def unload(self, number: int) -> None:
        """Keep it no more. The processes forget it before the next step."""
        self._adapters.pop(number, None)

    def send(self, group: Group, needed: AbstractSet[int]) -> None:
        """Bring the processes up to date before a step of these adapters.

        Raises PipeError, and RuntimeError for an adapter that is not loaded or that the model cannot take.
        """
        if self._group is not group:
            self._group, self._sent = group, {}
        for number in [number for number, sent in self._sent.items() if self._adapters.get(number) is not sent]:
            del self._sent[number]
            self._name(group, AdapterName(number=number, loaded=False))
        for number in sorted(needed - self._sent.keys() - {0}):
            adapter = self._adapters.get(number)
            if adapter is None:
                raise RuntimeError(f"adapter {number} is not loaded")
            for module, own in adapter.modules.items():
                group.send(Kind.MODULE, encode(Module.of(module, own)))
            self._name(group, AdapterName(number=number, loaded=True, path=str(adapter.path), digest=adapter.digest))
            self._sent[number] = adapter

    @staticmethod
    def _name(group: Group, name: AdapterName) -> None:
        group.send(Kind.ADAPTER, encode(name))
        group.answer(Kind.DONE)


class ReceivedAdapters:
    """What frames bring a process of adapters."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._modules: dict[str, LowRank] = {}

    def add(self, body: bytes) -> None:
        """Take a module of the adapter that is named next."""
        module = decode(body, type=Module)
        self._modules[module.module] = module.low_rank()

    def name(self, body: bytes) -> None:
        """Load the adapter whose modules have come, or forget one. Raises AdapterError where it does not fit."""
        modules, self._modules = self._modules, {}
        name = decode(body, type=AdapterName)
        takes = taking_adapters(self._runner)
        if name.loaded:
            takes.load_adapter(name.number, Adapter(Path(name.path), name.digest, modules))
        else:
            takes.unload_adapter(name.number)
