"""The adapters of a running engine: loaded and unloaded by name, while requests run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmserve.engine.core import CoreEngine
from lmserve.errors import LmserveError
from lmserve.model.adapter_files import Adapter
from lmserve.model.errors import AdapterError
from lmserve.model.interface import TakesAdapters


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that requests can name. `number`: what steps and caches know it by."""

    name: str
    path: Path
    number: int
    digest: bytes
    rank: int
    created: int  # seconds since 1970


class Adapters:
    """Adapters by their names. Its methods may be called on any thread; `load` and `unload` may take their time."""

    def __init__(
        self, open_adapter: Callable[[str | Path], Adapter], runner: TakesAdapters, core: CoreEngine, *, most: int
    ) -> None:
        """`open_adapter`: reads one and checks that it fits the model. `most`: of them, loaded at a time."""
        self._open = open_adapter
        self._runner = runner
        self._core = core
        self._most = most
        self._loaded: dict[str, LoadedAdapter] = {}
        # What an adapter computed stays in the prefix cache, and is right for as long as its number means its contents.
        self._numbers: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def loaded(self) -> list[LoadedAdapter]:
        """All of them, in the order in which they were loaded."""
        return list(self._loaded.values())

    def get(self, name: str) -> LoadedAdapter | None:
        """The adapter of a name; None: there is none."""
        return self._loaded.get(name)

    def load(self, name: str, path: str | Path) -> LoadedAdapter:
        """Read an adapter and let requests name it.

        Raises AdapterError where it cannot be used, LmserveError (409) where the name is taken or too many are loaded.
        """
        with self._lock:
            self._check_room(name)
            adapter = self._open(path)
            same = next((other for other in self._loaded.values() if other.digest == adapter.digest), None)
            if same is not None:
                raise AdapterError(f"{adapter.path} is loaded already, as {same.name}")
            number = self._numbers.setdefault(adapter.digest, len(self._numbers) + 1)
            try:
                self._runner.load_adapter(number, adapter)
                self._core.add_adapter(number, name, adapter.digest)
            except BaseException:
                self._runner.unload_adapter(number)
                raise
            loaded = LoadedAdapter(name, adapter.path, number, adapter.digest, adapter.rank, int(time.time()))
            self._loaded[name] = loaded
            return loaded

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises LmserveError: 404 if unknown, 409 `adapter_in_use` while requests use it."""
        with self._lock:
            loaded = self._loaded.get(name)
            if loaded is None:
                known = ", ".join(self._loaded) or "there are none"
                message = f"no adapter is loaded as {name!r}; the loaded ones: {known}"
                raise LmserveError.new(404, "model_not_found", message, param="lora_name")
            self._core.remove_adapter(loaded.number)
            del self._loaded[name]
            self._runner.unload_adapter(loaded.number)

    def _check_room(self, name: str) -> None:
        if name in self._loaded:
            message = f"an adapter is loaded as {name!r} already; unload it first"
            raise LmserveError.new(409, "adapter_exists", message, param="lora_name")
        if len(self._loaded) >= self._most:
            message = f"{len(self._loaded)} adapters are loaded, which is the limit (max_loras); unload one first"
            raise LmserveError.new(409, "too_many_adapters", message, param="lora_name")
