"""Random adapters in PEFT's files, and the transformers models with their weights merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from lmserve.model import open_checkpoint
from lmserve.model.adapters import _Noting
from safetensors.torch import save_file


def changeable(model: torch.nn.Module, folder: Path) -> list[str]:
    """The names of the linear layers of a model that an adapter can change here."""
    noting = _Noting()
    open_checkpoint(folder).load(noting)
    known = noting.linears.modules
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in linear if "layers." in name and name[name.index("layers.") :] in known]


def write(
    folder: Path,
    model: torch.nn.Module,
    modules: list[str],
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 6.0,
    suffix: str = "",
    dtype: torch.dtype = torch.float32,
    **config,
) -> torch.nn.Module:
    """Write an adapter of the named modules; returns the model with its weights merged."""
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(model), {}
    for name in modules:
        layer = merged.get_submodule(name)
        down = torch.randn(rank, layer.in_features, generator=generator).mul(0.1).to(dtype)
        up = torch.randn(layer.out_features, rank, generator=generator).mul(0.1).to(dtype)
        tensors[f"base_model.model.{name}.lora_A{suffix}.weight"] = down
        tensors[f"base_model.model.{name}.lora_B{suffix}.weight"] = up
        scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        with torch.no_grad():
            layer.weight += scale * (up.float() @ down.float())
    write_files(folder, tensors, r=rank, lora_alpha=alpha, **config)
    return merged


def write_files(folder: Path, tensors: dict[str, torch.Tensor], **config) -> None:
    """Write the two files of an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"peft_type": "LORA", "bias": "none", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(given))
    save_file(tensors, folder / "adapter_model.safetensors")
