"""Models on the core's own CPU kernels; torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lmserve._core import CpuArrays, CpuModel, CpuProgram, CpuTexts
from lmserve.model.adapter_files import Adapter
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.cpu_ops import CpuOps
from lmserve.model.device import usable_cores
from lmserve.model.embedding import MEAN, Embedding, EmbeddingHead
from lmserve.model.families.family import Decoder, Drafting
from lmserve.model.interface import F32, I32, LogitEdits, Runner, RunnerInfo, StepBuffers
from lmserve.model.options import MemoryPlan, RunnerOptions
from lmserve.model.runner import allocate_buffers, cache_config, runner_info


class CpuRunner:
    """A `Runner` of a model that is recorded once and then run by the core."""

    def __init__(
        self,
        info: RunnerInfo,
        buffers: StepBuffers,
        model: Decoder[int, int],
        ops: CpuOps,
        embedding: Embedding = MEAN,
    ) -> None:
        self.info = info
        self.buffers = buffers
        self._core = ops.core
        self._arrays = ops.arrays
        self._linears = ops.linears
        self._embedding = embedding
        self._finish = EmbeddingHead(embedding)
        self._step, self._head = ops.program, -1
        if info.can_generate:
            ops.begin(0, 0, 0)
            if isinstance(model, Drafting) and ops.config.mtp:
                states = model.forward(sampled_rows_only=False)
                ops.begin_draft(ops.rows(states), model.head, None)
                model.draft(ops, states)
            else:
                ops.sample(model.forward(sampled_rows_only=True), model.head, None)
            self._step, self._head = ops.program, ops.head
        nothing = np.zeros(0, np.int32)
        ops.begin_embed(nothing, nothing)
        ops.end_embed(model.forward(sampled_rows_only=False))
        self._embed = ops.program

    @property
    def copy_sizes(self) -> tuple[int, int]:
        """Bytes of a block and of a state, which the engine may copy to tiers below the model's memory."""
        return self._core.copy_sizes

    @property
    def native(self) -> tuple[CpuModel, CpuProgram, int, CpuArrays] | None:
        """What `launch` runs, for the engine to run it without Python; None: the model generates nothing."""
        if not self.info.can_generate:
            return None
        return self._core, self._step, self._head, self._arrays

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """Take an adapter in; see `TakesAdapters`."""
        for change in self._linears.changes(adapter):
            up = np.ascontiguousarray(change.up.T)
            self._core.add_low_rank(
                number, change.weight, change.first, len(up), change.down.reshape(-1), up.reshape(-1)
            )

    def unload_adapter(self, number: int) -> None:
        """Forget an adapter; see `TakesAdapters`."""
        self._core.remove_adapter(number)

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        """Run one step over the buffers; see `Runner`."""
        if not self.info.can_generate:
            raise RuntimeError(f"{self.info.name} is an embedding model and cannot generate")
        self._core.run(self._step, self._head, self._arrays, n_tokens, n_seqs, n_rows, edits)

    def collect(self) -> None:
        """The launched step is done already."""

    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        """[n, embedding_size]; see `Runner`."""
        return next(found for found in self.embed_passes(token_ids, cu_seqlens) if found is not None)

    def embed_passes(self, token_ids: I32, cu_seqlens: I32) -> Iterator[F32 | None]:
        """What `embed` gives, after a None for each pass but the last. Steps may run between two passes."""
        tokens, bounds = (np.ascontiguousarray(array, np.int32) for array in (token_ids, cu_seqlens))
        pooling, segments = self._embedding.pooling or "mean", self._embedding.segments
        texts = CpuTexts(tokens, bounds, self.info.max_batch_tokens, pooling, segments)
        while (states := self._core.embed_pass(self._embed, texts)) is None:
            yield None
        yield self._finish(np.frombuffer(states, np.float32).reshape(len(bounds) - 1, self.info.hidden_size))

    def logits(self, n_rows: int) -> F32:
        """[n_rows, vocab] logits of the last step, for tests and evaluation.

        In a row with a temperature or edits they are changed.
        """
        return np.frombuffer(self._core.logits(n_rows), np.float32).reshape(n_rows, self.info.vocab_size)

    def draft_logits(self, n_rows: int) -> F32:
        """[n_rows, vocab] logits of the head that guesses a token ahead, of the last step."""
        return np.frombuffer(self._core.draft_logits(n_rows), np.float32).reshape(n_rows, self.info.vocab_size)


def load(checkpoint: Checkpoint, options: RunnerOptions, plan: MemoryPlan) -> Runner:
    """Load a model as planned."""
    buffers = allocate_buffers(plan)
    threads = options.threads or usable_cores()
    ops = CpuOps(checkpoint.config, cache_config(plan, plan.kv_dtype), buffers, threads=threads, quantize=plan.quantize)
    if plan.weights_cache is None:
        model = checkpoint.load(ops)
    else:
        with plan.weights_cache.used_by(ops.core, plan.weight_bytes) as progress:
            ops.kept = progress.kept
            model = checkpoint.load(ops)
    info = runner_info(checkpoint, plan, ops.weight_bytes)
    return CpuRunner(info, buffers, model, ops, checkpoint.embedding)
