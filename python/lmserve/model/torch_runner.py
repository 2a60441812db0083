"""Runners on torch, for CPU and CUDA."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.model.arch.decoder import Decoder
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.config import EncoderConfig
from lmserve.model.encoder import EncoderRunner
from lmserve.model.errors import OptionError
from lmserve.model.interface import F32, I32, Extras, Runner
from lmserve.model.options import MemoryPlan, RunnerOptions, plan_memory, usable_cores
from lmserve.model.runner import DecoderRunner, allocate_buffers, cache_config, runner_info
from lmserve.model.torch_ops import TorchOps, TorchWeight


class TorchRunner(DecoderRunner[Tensor, TorchWeight]):
    """A decoder on torch. Its buffers are the inputs of the device, pinned on CUDA."""

    @torch.inference_mode()
    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, extras: Extras | None) -> None:
        super().launch(n_tokens, n_seqs, n_rows, extras)

    @torch.inference_mode()
    def collect(self) -> None:
        super().collect()

    @torch.inference_mode()
    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        return super().embed(token_ids, cu_seqlens)


def load(checkpoint: Checkpoint, options: RunnerOptions, plan: MemoryPlan) -> Runner:
    """Load a checkpoint as planned; on CUDA the KV cache is planned again from what is free."""
    torch.set_num_threads(options.threads or usable_cores())
    if plan.device != "cpu":
        plan = _plan_cuda(checkpoint, options, plan)
    if isinstance(checkpoint.config, EncoderConfig):
        return EncoderRunner(checkpoint.config, checkpoint, plan)
    buffers = allocate_buffers(plan, _pinned if plan.device != "cpu" else np.zeros)
    ops = TorchOps(checkpoint.config, cache_config(plan), buffers, device=plan.device, dtype=plan.dtype)
    model = Decoder(checkpoint.config, checkpoint.tensors, ops)
    return TorchRunner(runner_info(checkpoint, plan, ops.weight_bytes), buffers, model, ops)


def _plan_cuda(checkpoint: Checkpoint, options: RunnerOptions, plan: MemoryPlan) -> MemoryPlan:
    if not torch.cuda.is_available():
        if options.device == "auto":
            return plan_memory(checkpoint, dataclasses.replace(options, device="cpu"))
        raise OptionError("device", f"device is {options.device!r}; this torch ({torch.__version__}) cannot use CUDA")
    free, _ = torch.cuda.mem_get_info(plan.device)
    return plan_memory(checkpoint, options, gpu_memory=free)


def _pinned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    # The array keeps the tensor's memory alive.
    template = torch.from_numpy(np.empty(0, dtype))
    pinned: NDArray[Any] = torch.zeros(shape, dtype=template.dtype, pin_memory=True).numpy()
    return pinned
