"""Runs models of transformers that have no family of their own: their layers, with our cache, batches and sampling.

It is the slower way: each layer is what transformers makes of it.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from lmserve.model import files
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.config import EncoderConfig
from lmserve.model.device import usable_cores
from lmserve.model.errors import CheckpointError
from lmserve.model.interface import F32, I32, LogitEdits, Runner, RunnerInfo, StepBuffers
from lmserve.model.options import MemoryPlan, RunnerOptions
from lmserve.model.runner import allocate_buffers, cache_config, runner_info
from lmserve.model.torch_attention import DTYPES
from lmserve.model.torch_ops import TorchOps
from lmserve.model.torch_runner import TorchRunner, allocate_pinned, planned_for_device
from lmserve.model.transformers_attention import NAME, as_wide, attending
from lmserve.model.transformers_model import hf_config
from lmserve.model.wrapped import TEXT_NAMES, text_config

TRIED: Final = 24  # tokens of the comparison at load
TOLERANCE: Final = 1e-3  # of the largest logit, in fp32
LEAST_COSINE: Final = 0.99  # of logits in types with fewer bits


class TransformersModel:
    """A loaded model; its attention is that of `ops`."""

    def __init__(self, model: Any, ops: TorchOps) -> None:
        self.model = model
        self._ops = ops
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def head(self) -> Any:
        """There is none beside the model: `logits` has it in."""
        raise TypeError("a model of transformers makes its logits itself")

    def forward(self, *, sampled_rows_only: bool) -> Tensor:
        """The final states of the step, or pass, that `ops` began: [R, hidden], or of all [T, hidden]."""
        with attending(self._attend):
            states: Tensor = self.model.base_model(**self._inputs()).last_hidden_state[0]
        return self._ops.rows(states) if sampled_rows_only else states

    def logits(self, rows: Tensor) -> Tensor:
        """Float32 logits [R, vocab] of these rows of the step that `ops` began."""
        keep = {"logits_to_keep": rows} if self._keeps_rows else {}
        with attending(self._attend):
            logits: Tensor = self.model(**self._inputs(), **keep).logits[0]
        return (logits if self._keeps_rows else logits.index_select(0, rows)).float()

    def _inputs(self) -> dict[str, Any]:
        ops = self._ops
        return {"input_ids": ops.token_ids.long()[None], "position_ids": ops.positions.long()[None], "use_cache": False}

    def _attend(
        self, number: int, _module: Any, query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any]
    ) -> Tensor:
        rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, as_wide(value, key))]
        attended = self._ops.cache_and_attend(number, *rows, sinks=asked.get("s_aux"))
        return attended.view(1, len(rows[0]), query.shape[1], -1)[..., : value.shape[-1]]


class TransformersRunner(TorchRunner):
    """A `Runner` of a model of transformers."""

    model: TransformersModel

    def __init__(self, info: RunnerInfo, buffers: StepBuffers, model: TransformersModel, ops: TorchOps) -> None:
        super().__init__(info, buffers, model, ops)
        self.torch_ops = ops
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        ops = self.torch_ops
        ops.begin(n_tokens, n_seqs, n_rows)
        if n_rows:
            self._logits = self.model.logits(ops.sample_rows)
            ops.sample_logits(self._logits, edits)
        else:
            self.model.forward(sampled_rows_only=True)

    def logits(self, n_rows: int) -> F32:
        """[n_rows, vocab] raw logits of the last step, for tests and evaluation."""
        values: F32 = self._logits[:n_rows].cpu().numpy()
        return values


def load(checkpoint: Checkpoint, options: RunnerOptions, plan: MemoryPlan) -> Runner:
    """Load a checkpoint as planned, and compare a step with what transformers computes alone.

    Raises CheckpointError if transformers cannot load it, or the two differ.
    """
    torch.set_num_threads(options.threads or usable_cores())
    plan = planned_for_device(checkpoint, options, plan)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    inner = text_config(files.read_object(checkpoint.path / "config.json"))
    parts: dict[str, Any] = {} if inner is None else {"config": hf_config(inner), "key_mapping": TEXT_NAMES}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            **parts,
            dtype=DTYPES[plan.dtype],
            attn_implementation=NAME,
            local_files_only=True,
            use_safetensors=True,
        )
    except Exception as error:
        raise CheckpointError(f"{checkpoint.path}: transformers cannot load it: {error}") from error
    model.train(False)
    model.to(plan.device)
    buffers = allocate_buffers(plan, allocate_pinned if plan.device != "cpu" else np.zeros)
    config = checkpoint.config
    if isinstance(config, EncoderConfig):
        raise TypeError(f"{checkpoint.name} is no decoder")
    ops = TorchOps(config, cache_config(plan, plan.dtype), buffers, device=plan.device, dtype=plan.dtype)
    weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    runner = TransformersRunner(
        runner_info(checkpoint, plan, weight_bytes), buffers, TransformersModel(model, ops), ops
    )
    _compare(checkpoint, runner, model)
    return runner


@torch.inference_mode()
def _compare(checkpoint: Checkpoint, runner: TransformersRunner, model: Any) -> None:
    """A prompt in pieces, over the cache, against the whole of it in transformers alone."""
    info = runner.info
    num_blocks = min(info.num_blocks, info.num_window_blocks or info.num_blocks)
    count = min(TRIED, info.max_model_len, num_blocks * info.block_size, info.max_batch_tokens)
    ids = np.random.default_rng(0).integers(0, info.vocab_size, count).astype(np.int32)
    cuts = sorted({0, count // 2, count - 1, count})
    for first, last in itertools.pairwise(cuts):
        _one_sequence(runner, ids, first, last)
        runner.launch(last - first, 1, 1, None)
        runner.collect()
    found = runner.logits(1)[0]
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")  # noqa: SLF001
    whole = model(input_ids=torch.from_numpy(ids).long()[None].to(info.device), use_cache=False).logits
    model.set_attn_implementation(NAME)
    expected = whole[0, -1].float().cpu().numpy()
    difference = float(np.abs(found - expected).max())
    cosine = float(found @ expected) / (float(np.linalg.norm(found) * np.linalg.norm(expected)) or 1.0)
    fits = difference <= TOLERANCE * float(np.abs(expected).max()) if info.dtype == "fp32" else cosine >= LEAST_COSINE
    # `not`, so that NaN is refused too.
    if not fits:
        raise CheckpointError(
            f"{checkpoint.path}: with the cache of this server its logits are not those of transformers alone"
            f" (largest difference {difference:.3g}, cosine {cosine:.4f})"
        )


def _one_sequence(runner: TransformersRunner, ids: I32, first: int, last: int) -> None:
    """The step that computes the tokens first .. last of one sequence, its blocks from the end of the cache on."""
    buffers, size, count = runner.buffers, runner.info.block_size, last - first
    positions = np.arange(first, last)
    num_blocks = min(runner.info.num_blocks, runner.info.num_window_blocks or runner.info.num_blocks)
    blocks = num_blocks - 1 - np.arange(-(-last // size))
    buffers.token_ids[:count] = ids[first:last]
    buffers.lay_sequence(0, slice(count), positions, blocks, size)
    buffers.query_start[:2] = 0, count
    buffers.context_lens[0] = last
    buffers.sample_rows[0] = count - 1
    buffers.temperature[0], buffers.logprobs[0] = 0.0, -1
