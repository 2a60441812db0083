"""Chooses and creates the runner for a checkpoint. Importing this module does not import torch."""

from __future__ import annotations

from lmserve.model.checkpoint import Checkpoint
from lmserve.model.device import available_memory
from lmserve.model.errors import OptionError
from lmserve.model.interface import Runner
from lmserve.model.options import RunnerOptions, plan_memory
from lmserve.model.shares import Place


def load_runner(checkpoint: Checkpoint, options: RunnerOptions | None = None, place: Place | None = None) -> Runner:
    """Load a checkpoint's weights and allocate its KV cache and step buffers.

    place: of this process among those that `options` splits the model among.
    Raises OptionError where an option does not fit the checkpoint or this machine.
    """
    options = options or RunnerOptions()
    plan = plan_memory(checkpoint, options)
    kept = plan.kv_bytes + plan.states_bytes + plan.adapter_bytes
    weights = 0 if plan.weights_are_mapped else plan.weight_bytes
    if plan.device == "cpu" and weights + kept > (free := available_memory()):
        needs = f"weights of {weights >> 20} MiB and KV cache of {kept >> 20} MiB do not fit"
        raise OptionError("kv_memory", f"{needs}: this process may still take {free >> 20} MiB")
    if plan.ops == "cpu":
        from lmserve.model import cpu_runner

        return cpu_runner.load(checkpoint, options, plan)
    try:
        # Imported late: torch takes a second, and the cpu operations do without it.
        if checkpoint.family.by_transformers:
            from lmserve.model import transformers_runner

            return transformers_runner.load(checkpoint, options, plan)
        from lmserve.model import torch_runner
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        message = f"ops {plan.ops!r} on {plan.device} needs torch, which is not installed: pip install 'lmserve[torch]'"
        raise OptionError("ops", message) from error
    return torch_runner.load(checkpoint, options, plan, place)
