"""Runners on torch, for CPU and CUDA."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.model.adapter_files import Adapter
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.device import usable_cores
from lmserve.model.embedding import MEAN, Embedding
from lmserve.model.errors import OptionError
from lmserve.model.families.family import Decoder, Drafting
from lmserve.model.graphs import DecodeGraphs
from lmserve.model.interface import F32, I32, LogitEdits, Runner, RunnerInfo, StepBuffers
from lmserve.model.options import MemoryPlan, RunnerOptions, formats_in, plan_memory
from lmserve.model.runner import DecoderRunner, allocate_buffers, cache_config, runner_info
from lmserve.model.shares import Place, parts_of, split_config
from lmserve.model.torch_attention import DTYPES
from lmserve.model.torch_draft import TorchDraftOps
from lmserve.model.torch_ops import TorchOps
from lmserve.model.torch_parallel import ParallelOps
from lmserve.model.torch_ranks import Ranks
from lmserve.model.torch_varlen import VarlenAttention
from lmserve.model.torch_weight import TorchWeight

logger = logging.getLogger("lmserve.model")


class TorchRunner(DecoderRunner[Tensor, TorchWeight]):
    """A decoder on torch. Its buffers are the inputs of the device, pinned on CUDA."""

    def __init__(
        self,
        info: RunnerInfo,
        buffers: StepBuffers,
        model: Decoder[Tensor, TorchWeight],
        ops: TorchOps,
        embedding: Embedding = MEAN,
    ) -> None:
        super().__init__(info, buffers, model, ops, embedding)
        self.torch_ops = ops

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """Take an adapter in; see `TakesAdapters`."""
        self.torch_ops.adapters.load(number, self.torch_ops.linears.changes(adapter))

    def unload_adapter(self, number: int) -> None:
        """Forget an adapter; see `TakesAdapters`."""
        self.torch_ops.adapters.unload(number)

    @torch.inference_mode()
    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        super().launch(n_tokens, n_seqs, n_rows, edits)

    @torch.inference_mode()
    def collect(self) -> None:
        super().collect()

    @torch.inference_mode()
    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        return super().embed(token_ids, cu_seqlens)


class DraftRunner(TorchRunner):
    """A `TorchRunner` of a model with a head that guesses a token ahead."""

    def __init__(
        self,
        info: RunnerInfo,
        buffers: StepBuffers,
        model: Drafting[Tensor, TorchWeight],
        ops: TorchDraftOps,
        embedding: Embedding = MEAN,
    ) -> None:
        super().__init__(info, buffers, model, ops, embedding)
        self.drafting = model
        self.draft_ops = ops

    @torch.inference_mode()
    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        ops = self.draft_ops
        ops.begin(n_tokens, n_seqs, n_rows)
        states = self.drafting.forward(sampled_rows_only=False)
        ops.begin_draft(ops.rows(states), self.drafting.head, edits)
        self.drafting.draft(ops, states)


class GraphRunner(TorchRunner):
    """A `TorchRunner` that replays captured graphs for steps in which every sequence has one token and samples it."""

    def __init__(
        self,
        info: RunnerInfo,
        buffers: StepBuffers,
        model: Decoder[Tensor, TorchWeight],
        ops: TorchOps,
        embedding: Embedding = MEAN,
        *,
        capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]],
    ) -> None:
        """`capture(step)` records what step does and gives its replay; `capture_cuda_graph` is one."""
        super().__init__(info, buffers, model, ops, embedding)
        self._capture = capture
        self.graphs = DecodeGraphs(info.max_batch, self._capture_decode)

    @torch.inference_mode()
    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        # What adapters add is no part of the captured graphs.
        if not n_tokens == n_seqs == n_rows or self.buffers.adapters[:n_seqs].any():
            super().launch(n_tokens, n_seqs, n_rows, edits)
            return
        size = self.graphs.size_for(n_seqs)
        self.torch_ops.upload(n_tokens, n_seqs, n_rows)
        self.torch_ops.pad(n_seqs, size)
        logits = self.graphs.replay(size)
        self.torch_ops.sample_logits(logits[:n_seqs], edits)

    @torch.inference_mode()
    def _capture_decode(self, size: int) -> Callable[[], Tensor]:
        def step() -> Tensor:
            self.torch_ops.begin_decode(size)
            states = self.model.forward(sampled_rows_only=True)
            return self.torch_ops.raw_logits(states, self.model.head)

        self.torch_ops.pad(0, size)
        return self._capture(step)


def capture_cuda_graph(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record step as a CUDA graph; its replay returns the same tensor each time, with new values.

    Has not run on a GPU yet.
    """
    # Libraries set themselves up in their first calls, which must not be captured.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_graph_pool()):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@cache
def _graph_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def load(checkpoint: Checkpoint, options: RunnerOptions, plan: MemoryPlan, place: Place | None = None) -> Runner:
    """Load a checkpoint as planned; on CUDA the KV cache is planned again from what is free.

    place: of this process, where the plan splits the model among several.
    """
    torch.set_num_threads(options.threads or max(1, usable_cores() // plan.ranks))
    if plan.ranks > 1:
        if place is None:
            raise OptionError("tensor_parallel", f"tensor_parallel is {plan.ranks}; this process is none of so many")
        return _load_part(checkpoint, options, plan, place)
    plan = planned_for_device(checkpoint, options, plan)
    buffers = allocate_buffers(plan, allocate_pinned if plan.device != "cpu" else np.zeros)
    kind = TorchDraftOps if plan.mtp else TorchOps
    ops = kind(
        checkpoint.config,
        cache_config(plan, plan.dtype),
        buffers,
        device=plan.device,
        dtype=plan.dtype,
        packed=plan.packed,
    )
    model = checkpoint.load(ops)
    info = runner_info(checkpoint, plan, ops.weight_bytes)
    if isinstance(ops, TorchDraftOps) and isinstance(model, Drafting):
        return DraftRunner(info, buffers, model, ops, checkpoint.embedding)
    graphs = options.graphs and info.can_generate and not checkpoint.config.recurrent
    if graphs and isinstance(ops.cache, VarlenAttention):
        return GraphRunner(info, buffers, model, ops, checkpoint.embedding, capture=capture_cuda_graph)
    return TorchRunner(info, buffers, model, ops, checkpoint.embedding)


def _load_part(checkpoint: Checkpoint, options: RunnerOptions, plan: MemoryPlan, place: Place) -> Runner:
    plan = planned_for_device(checkpoint, options, plan)
    ranks, share = Ranks.join(place, torch.device(plan.device)), place.share
    # Blocks and slots are the same on all ranks: as many as the one with the least memory has room for.
    slots = ranks.least(plan.state_slots) if plan.state_slots else None
    options = dataclasses.replace(options, kv_memory=ranks.least(plan.kv_memory), state_slots=slots)
    if checkpoint.kind == "generate":
        plan = planned_for_device(checkpoint, options, plan)
    buffers = allocate_buffers(plan, allocate_pinned if plan.device != "cpu" else np.zeros)
    config = split_config(checkpoint.config, share)
    ops = ParallelOps(
        config,
        cache_config(plan, plan.dtype),
        buffers,
        ranks=ranks,
        vocab_size=checkpoint.config.vocab_size,
        device=plan.device,
        dtype=plan.dtype,
    )
    family = checkpoint.family
    parts = parts_of(checkpoint.tensors, family.expected_tensors(config), share)
    model = family.load(config, parts, ops)
    return TorchRunner(runner_info(checkpoint, plan, ops.weight_bytes), buffers, model, ops, checkpoint.embedding)


def planned_for_device(checkpoint: Checkpoint, options: RunnerOptions, plan: MemoryPlan) -> MemoryPlan:
    """The plan, on CUDA made again from what is free there; the device is torch's then."""
    if plan.device != "cpu":
        plan = _plan_cuda(checkpoint, options, plan)
    if plan.device != "cpu":
        torch.cuda.set_device(plan.device)
    if plan.packed and (fault := _fault_of_kernels(checkpoint, plan)) is not None:
        logger.warning("weights are converted to %s, for the kernels of packed ones fail here: %s", plan.dtype, fault)
        options = dataclasses.replace(options, quantize="none")
        return planned_for_device(checkpoint, options, plan_memory(checkpoint, options))
    return plan


def _fault_of_kernels(checkpoint: Checkpoint, plan: MemoryPlan) -> str | None:
    # Imported late: it brings triton, which is not everywhere.
    from lmserve.model import packed_check

    return packed_check.fault(formats_in(checkpoint), torch.device(plan.device), DTYPES[plan.dtype])


def _plan_cuda(checkpoint: Checkpoint, options: RunnerOptions, plan: MemoryPlan) -> MemoryPlan:
    if not torch.cuda.is_available():
        if options.device == "auto":
            return plan_memory(checkpoint, dataclasses.replace(options, device="cpu"))
        raise OptionError("device", f"device is {options.device!r}; this torch ({torch.__version__}) cannot use CUDA")
    free, _ = torch.cuda.mem_get_info(plan.device)
    return plan_memory(checkpoint, options, gpu_memory=free)


def allocate_pinned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Zeros in memory that a GPU copies from by itself."""
    # The array keeps the tensor's memory alive.
    template = torch.from_numpy(np.empty(0, dtype))
    pinned: NDArray[Any] = torch.zeros(shape, dtype=template.dtype, pin_memory=True).numpy()
    return pinned
