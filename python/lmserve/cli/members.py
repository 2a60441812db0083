"""Several models in one server, or one that is loaded on demand: from the settings to what the server chooses from."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import quote

from lmserve import loading
from lmserve.api.http.members import Member, Members
from lmserve.api.responses.log import ResponseLog
from lmserve.api.responses.store import ResponseStore
from lmserve.api.state.database import Database
from lmserve.cli.models import tell
from lmserve.cli.plan_view import plan_lines
from lmserve.cli.progress import DownloadProgress
from lmserve.config import DiskTier, ServeConfig
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.load import ModelPlan
from lmserve.model.device import available_memory
from lmserve.model.options import CPU_KV_FRACTION
from lmserve.source import ModelSource, find_model

# Context that a model must have room for to be loaded.
USEFUL_CONTEXT: Final = 4096


@contextlib.contextmanager
def members_of(config: ServeConfig, say: Callable[[str], None]) -> Iterator[Members]:
    """The models of the settings, none of them loaded; `say` gets the plan of each in lines.

    Raises SourceError or LmserveError for one that is not there, or could not be served alone.
    """
    with contextlib.ExitStack() as stack:
        folder = config.session_dir
        if folder is None:
            # What clients have said outlives its model's being unloaded, and ends with the server.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lmserve-sessions-")))
            config = replace(config, session_fsync="never", state_disk=0)
        members = []
        for name, model in config.models or ((None, config.model),):
            source = find_model(model, DownloadProgress(name or "the model"), tell)
            names = (name,) if name else config.served_model_names or source.names
            own = replace(
                config,
                model=None,
                models=(),
                idle_unload=0,
                served_model_names=names,
                session_dir=folder / quote(names[0], safe=""),
                kv_disk=_kv_disk(config, names[0]),
            )
            plan = loading.load(partial(ModelPlan, source.path, own, source.published))
            for line in plan_lines(plan, names):
                say(line)
            members.append(_member(source, own, plan))
        yield Members(
            members,
            config.keyring,
            free_memory=available_memory,
            idle_unload=config.idle_unload,
            agent_sessions=config.agent_sessions == "on",
        )


def _kv_disk(config: ServeConfig, name: str) -> DiskTier | None:
    """A model's own part of the folder; each may take the whole size."""
    if config.kv_disk is None:
        return None
    return DiskTier(config.kv_disk.folder / quote(name, safe=""), config.kv_disk.size)


def _member(source: ModelSource, config: ServeConfig, plan: ModelPlan) -> Member:
    memory = plan.memory
    context = min(memory.max_model_len, USEFUL_CONTEXT)
    store: list[ResponseStore] = []
    opened: list[Database] = []

    def responses() -> ResponseStore:
        assert config.session_dir is not None
        store[:] = [
            ResponseStore(ResponseLog(config.session_dir, config.keyring.durable_names()), config.session_fsync)
        ]
        return store[0]

    def database() -> Database:
        opened[:] = [Database(config.session_dir, config.keyring.durable_names(), config.session_fsync)]
        return opened[0]

    def load() -> AsyncEngine:
        # Anew: the memory is that of now.
        plan = ModelPlan(source.path, config, source.published)
        engine = plan.load_async_engine()
        member.mapped = plan.memory.weight_bytes if plan.memory.weights_are_mapped else 0
        try:
            store[0].restore()
            opened[0].open()
        except BaseException:
            engine.stop()
            raise
        return engine

    member = Member(
        config.served_model_names,
        load,
        memory.weight_bytes + int(memory.kv_bytes_of(context) / CPU_KV_FRACTION),
        memory.max_model_len,
        plan.defaults.given(),
        responses,
        database,
    )
    return member
