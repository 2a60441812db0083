"""Under which names and in which layouts checkpoints store experts, and how they become those that model files load.

Model files load `experts.gate_proj`, `.up_proj` and `.down_proj`, weights [experts, out, in] and biases [experts, out].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from lmserve.model.errors import CheckpointError
from lmserve.model.expert_tensors import rows_of, split, stack
from lmserve.model.families.family import Tensors
from lmserve.model.tensors import TensorSource

# Of GGUF, beside those of all families.
GGUF_NAMES: Final[Mapping[str, str]] = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b": "mlp.gate.e_score_correction",
}
# What Mixtral's experts, and those after it, call the three.
_SHORT: Final[Mapping[str, str]] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EACH: Final = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.(weight|bias)")
# GGUF's before experts were put into one tensor.
_OLD_GGUF: Final = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.(weight|bias)")
_FUSED: Final = re.compile(r"(.+\.experts)\.(gate_up_proj|up_proj|down_proj)(\.weight|\.bias|_bias)?")


def stacked(
    tensors: Tensors, experts: int, *, transposed: bool = False, interleaved: bool = False
) -> dict[str, TensorSource]:
    """The tensors with those of experts under the names and in the layouts that model files load.

    Of tensors for all experts, `transposed`: weights are [experts, in, out]; `interleaved`: gates and ups take turns,
    and do not stand one after the other. Raises CheckpointError where an expert is missing.
    """
    found: dict[str, TensorSource] = {}
    each: dict[str, dict[int, TensorSource]] = {}
    for name, tensor in tensors.items():
        old = _OLD_GGUF.fullmatch(name)
        known = name if old is None else f"model.layers.{old[1]}.mlp.experts.{old[3]}.{old[2]}_proj.{old[4]}"
        one, fused = _EACH.fullmatch(known), _FUSED.fullmatch(known)
        if one is not None:
            each.setdefault(f"{one[1]}.{_SHORT.get(one[3], one[3])}.{one[4]}", {})[int(one[2])] = tensor
        elif fused is not None:
            end = "bias" if (fused[3] or "").endswith("bias") else "weight"
            # A name with .weight is that of a linear layer, [out, in].
            turned = transposed and fused[3] is None
            found |= _separate(f"{fused[1]}.", fused[2], f".{end}", tensor, turned=turned, alternate=interleaved)
        else:
            found[name] = tensor
    for name, parts in each.items():
        missing = sorted(set(range(experts)) - parts.keys())
        if missing or len(parts) > experts:
            there = "are more" if not missing else f"is none of expert {missing[0]}"
            raise CheckpointError(f"tensor {name} of {experts} experts: there {there}")
        found[name] = stack(name, [parts[index] for index in range(experts)])
    return found


def _separate(
    prefix: str, kind: str, end: str, tensor: TensorSource, *, turned: bool, alternate: bool
) -> dict[str, TensorSource]:
    """The tensors that a tensor for all experts has."""
    if kind != "gate_up_proj":
        return {f"{prefix}{kind}{end}": rows_of(tensor, slice(None), transposed=True) if turned else tensor}
    shape = split(tensor)[0].shape
    rows = shape[-1] if turned else shape[0]
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if alternate else (slice(0, rows // 2), slice(rows // 2, None))
    return {
        f"{prefix}{part}_proj{end}": rows_of(tensor, chosen, transposed=turned)
        for part, chosen in (("gate", gate), ("up", up))
    }


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """The tensors with parts of their names, such as ".block_sparse_moe.", replaced."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        changed = name
        for part, other in names.items():
            changed = changed.replace(part, other)
        found[changed] = tensor
    return found
