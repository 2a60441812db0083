"""From a model on disk to a running engine, for the command line and the offline interface."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lmserve import _core
from lmserve.config import ServeConfig
from lmserve.engine.adapters import Adapters
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.session_store import SharedSessions
from lmserve.engine.sessions import SessionLog, log_report_of
from lmserve.engine.text import TextLayer
from lmserve.engine.tiers import TierPlan, plan_tiers, tiers_of
from lmserve.errors import LmserveError
from lmserve.loading import reading
from lmserve.model import Checkpoint, RunnerOptions, load_runner, open_checkpoint, plan_memory
from lmserve.model.adapter_files import Adapter
from lmserve.model.adapters import open_adapter
from lmserve.model.fingerprint import fingerprint
from lmserve.model.generation_defaults import NONE, GenerationDefaults
from lmserve.model.interface import Runner, TakesAdapters
from lmserve.model.options import MemoryPlan
from lmserve.model.recording import Header, Recorder
from lmserve.source import weights_file

if TYPE_CHECKING:
    from lmserve.worker.processes import Processes

logger = logging.getLogger("lmserve.engine")

MAX_LOSSES: Final = 50  # lines that say what a damaged session log lost


class ModelPlan:
    """A checkpoint, and what running it by `config` takes: known from headers alone, before a weight is read.

    Raises LmserveError if the checkpoint cannot be served, or not by these settings on this machine.
    """

    def __init__(self, path: Path, config: ServeConfig, published: GenerationDefaults = NONE) -> None:
        """`published`: the publisher's defaults, where they are known and the checkpoint says nothing of them."""
        self.checkpoint: Checkpoint = open_checkpoint(path, mtp=config.mtp)
        self._config = config
        # Read before the weights, so that what does not fit is known at once; given to the model after them.
        self.given: dict[str, Adapter] = {name: self._open_adapter(path) for name, path in config.loras}
        generation = self.checkpoint.generation
        own = generation if generation.given() else published
        self.defaults: GenerationDefaults = own if config.generation_config == "model" else NONE
        kept = weights_file(self.checkpoint.path, config.weights_cache, config.quantize)
        self.options = RunnerOptions(
            device=config.device,
            dtype=config.dtype,
            ops=config.ops,
            quantize=config.quantize,
            kv_dtype=config.kv_dtype,
            threads=config.threads,
            weights_cache=None if kept is None else str(kept),
            max_batch=config.max_batch,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=config.max_model_len,
            speculate=config.speculate,
            mtp=config.mtp,
            tensor_parallel=config.tensor_parallel,
            kv_memory=config.kv_memory,
            state_slots=config.state_slots,
            gpu_memory_fraction=config.gpu_memory_fraction,
            adapter_numbers=sum(adapter.size for adapter in self.given.values()),
        )
        self.memory: MemoryPlan = plan_memory(self.checkpoint, self.options)
        self.tiers: TierPlan = plan_tiers(config, self.checkpoint, self.memory)
        self.state_every: int = config.state_every  # tokens between two snapshots of a recurrent state
        self.processes: Processes | None = None  # that compute the model, once it is loaded
        self.shared: SharedSessions | None = None  # once it is loaded, with a store that others share
        self.adapters: Adapters | None = None  # once it is loaded, where it takes any

    @cached_property
    def text(self) -> TextLayer:
        """The checkpoint's tokenizer and chat template. Raises LmserveError if they cannot be read."""
        checkpoint, template = self.checkpoint, None
        with reading(f"the tokenizer of {checkpoint.path}"):
            tokenizer = checkpoint.tokenizer()
        if checkpoint.chat_template is not None:
            with reading(f"the chat template of {checkpoint.path}"):
                template = _core.ChatTemplate(
                    checkpoint.chat_template,
                    msgspec.json.encode(checkpoint.special_tokens),
                    tool_source=checkpoint.tool_template,
                    tool_parser=self._config.tool_parser,
                    reasoning_parser=self._config.reasoning_parser,
                    escaped=tokenizer if self._config.user_special_tokens == "escape" else None,
                )
        return TextLayer(
            tokenizer,
            template,
            template_source=checkpoint.chat_template,
            special_tokens=checkpoint.special_tokens,
        )

    def _open_adapter(self, path: str | Path) -> Adapter:
        return open_adapter(path, self.checkpoint, max_rank=self._config.max_lora_rank)

    def _load_adapters(self, runner: Runner, core: _core.Engine) -> None:
        if not isinstance(runner, TakesAdapters):
            return
        given = {str(adapter.path): adapter for adapter in self.given.values()}

        def opened(path: str | Path) -> Adapter:
            return given.pop(str(path), None) or self._open_adapter(path)

        self.adapters = Adapters(opened, runner, core, most=self._config.max_loras)
        for name, adapter in self.given.items():
            loaded = self.adapters.load(name, str(adapter.path))
            logger.info("the adapter %s of rank %d was loaded from %s", name, loaded.rank, loaded.path)
        self.given = {}

    def load_engine(self) -> _core.Engine:
        """Read the weights and start the engine's threads; `shutdown` ends them. Blocks for as long as that takes.

        Raises LmserveError before the weights are read for a session log that cannot be used.
        """
        checkpoint, config = self.checkpoint, self._config
        session_log = self._open_session_log()
        self.shared = self._open_session_store()
        runner: Runner
        if config.in_processes:
            # Few servers need it, and each start would pay for the import.
            from lmserve.worker.runner import ProcessRunner

            runner = ProcessRunner.start(checkpoint, replace(self.options, device=self.memory.device))
            self.processes = runner.processes
        else:
            runner = load_runner(checkpoint, self.options)
        if config.record is not None:
            header = Header.of(checkpoint, self.options, runner.info)
            runner = Recorder(runner, config.record, header)
            logger.warning("every step is recorded in %s, with the tokens of all clients", config.record)
        core = _core.Engine(
            runner,
            self.text.tokenizer,
            self.text.template,
            eos_token_ids=checkpoint.eos_token_ids,
            max_queue=config.max_queue,
            max_sessions=config.max_sessions,
            session_ttl=config.session_ttl,
            speculate=self.memory.speculate,
            policy=config.policy,
            prefix_cache=config.prefix_cache,
            share_prefix_cache=config.share_prefix_cache,
            session_log=session_log,
            session_store=self.shared,
            tenants=config.keyring.tenants(),
            state_every=config.state_every,
            tiers=tiers_of(self.tiers, config, checkpoint, self.memory),
        )
        try:
            self._load_adapters(runner, core)
        except BaseException:
            core.shutdown(0)
            raise
        return core

    def _open_session_log(self) -> _core.OpenSessionLog | None:
        config = self._config
        if config.session_dir is None:
            return None
        settings = SessionLog(
            folder=str(config.session_dir),
            fsync=config.session_fsync,
            fingerprint=fingerprint(self.checkpoint),
            model=self.checkpoint.name,
            tenants=config.keyring.durable_names(),
        )
        log = _core.OpenSessionLog(settings, max_sessions=config.max_sessions, session_ttl=config.session_ttl)
        report = log_report_of(log.restored)
        if report.torn:
            message = "the session log ended within a record: %d bytes were cut off its end, and kept in %s"
            logger.warning(message, report.torn, report.kept)
        if not report.is_whole:
            message = "the session log was damaged: %d bytes of it cannot be read, and are kept in %s"
            logger.error(message, report.damaged, report.kept)
            for loss in report.losses[:MAX_LOSSES]:
                logger.error("%s", loss)
            if further := len(report.losses[MAX_LOSSES:]):
                logger.error("%d more sessions lost turns; lmserve sessions check lists all of them", further)
            if report.unnamed:
                logger.error(
                    "%d records are missing, and it is not known which sessions they belonged to", report.unnamed
                )
        logger.info(
            "%d sessions of %d tokens were restored from %s", report.sessions, report.tokens, config.session_dir
        )
        return log

    def _open_session_store(self) -> SharedSessions | None:
        config = self._config
        if config.session_store is None:
            return None
        try:
            from lmserve.engine.postgres import PostgresStore
        except ImportError as error:
            message = f"--session-store needs psycopg: pip install 'lmserve[postgres]' ({error})"
            raise LmserveError.new(400, "session_store_unusable", message) from error
        store = PostgresStore(
            config.session_store,
            fingerprint=fingerprint(self.checkpoint),
            tenants=config.keyring.durable_names(),
            session_ttl=config.session_ttl,
        )
        return SharedSessions(store)

    def load_async_engine(self) -> AsyncEngine:
        """`load_engine`, with its asyncio face."""
        core = self.load_engine()
        return AsyncEngine(
            core,
            max_model_len=core.context_length,
            text=self.text,
            defaults=self.defaults,
            guided_whitespace=self._config.guided_whitespace,
            fingerprint=fingerprint(self.checkpoint),
            embedding=self.checkpoint.embedding,
            processes=self.processes,
            adapters=self.adapters,
            shared=self.shared,
        )
