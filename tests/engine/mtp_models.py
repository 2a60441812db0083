"""Tiny random models of `tiny_models` with a head that guesses a token ahead, and what that head must give."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_gguf
import tiny_models
import torch
from safetensors.torch import load_file, save_file

SHARPNESS = 0.15
HEAD_NAMES = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head_norm",
}
LAYER_NAMES = tiny_gguf.NAMES | {"post_attention_layernorm": "post_attention_norm"}
OUTPUTS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")


@dataclass
class Head:
    """The transformers model, a layer of its kind, and the head's own weights as they are stored."""

    model: Any
    layer: Any
    weights: dict[str, torch.Tensor]

    def norm(self, x, name: str):
        width, config = x.shape[-1:], self.model.config
        return torch.nn.functional.rms_norm(x, width, 1 + self.weights[name], config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, tokens: list[int]):
        """[len(tokens) - 1, vocab]: row p is of the state of token p and the embedding of token p + 1."""
        ids, inner = torch.tensor([tokens]), self.model.model
        states = inner(ids).last_hidden_state[:, :-1]
        embeddings = inner.embed_tokens(ids[:, 1:])
        joined = (self.norm(embeddings, "pre_fc_norm_embedding"), self.norm(states, "pre_fc_norm_hidden"))
        x = torch.cat(joined, dim=-1) @ self.weights["fc"].T
        places = torch.arange(len(tokens) - 1)[None]
        angles = inner.rotary_emb(x, places)
        x = self.layer(x, position_embeddings=angles, attention_mask=None, position_ids=places)
        x = x[0] if isinstance(x, tuple) else x
        return self.model.lm_head(self.norm(x, "norm"))[0].numpy()


def make(family: str, folder: Path, *, often: bool = False) -> Head:
    """Save a random model of a family with a random head.

    often: layers add little, and the head reads the next token's embedding alone, so that its guesses are often right.
    """
    torch.manual_seed(7)
    model = tiny_models.make(family, folder, tie_word_embeddings=False)
    index = model.config.layer_types.index("full_attention")
    layer = copy.deepcopy(model.model.layers[index])
    hidden = model.config.hidden_size
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=SHARPNESS)
        if often:
            for part in (model.model, layer):
                for name, parameter in part.named_parameters():
                    if name.endswith(OUTPUTS):
                        parameter.mul_(0.003)
            model.save_pretrained(folder)
        weights = {
            "fc": torch.randn(hidden, 2 * hidden) * SHARPNESS,
            "pre_fc_norm_embedding": torch.rand(hidden) - 0.5,
            "pre_fc_norm_hidden": torch.rand(hidden) - 0.5,
            "norm": torch.rand(hidden) - 0.5,
        }
        if often:
            weights["fc"] = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), dim=1)
            weights["pre_fc_norm_embedding"] = torch.zeros(hidden)
            weights["norm"] = model.model.norm.weight.detach().clone()
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"mtp.{name}.weight": tensor for name, tensor in weights.items()}
    tensors |= {f"mtp.layers.0.{name}": tensor.contiguous() for name, tensor in _stored(layer, family).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Head(model, layer, weights)


def _stored(layer, family: str) -> dict[str, torch.Tensor]:
    """The layer's tensors as a checkpoint has them: in Qwen3-Next each expert by itself."""
    stored = {}
    for name, tensor in layer.state_dict().items():
        stem, _, part = name.rpartition(".")
        if family != "qwen3_next" or not stem.endswith("mlp.experts"):
            stored[name] = tensor
            continue
        for index, expert in enumerate(tensor):
            parts = (
                zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True)
                if part == "gate_up_proj"
                else [(part, expert)]
            )
            stored |= {f"{stem}.{index}.{own}.weight": values.clone() for own, values in parts}
    return stored


def write_gguf(path: Path, head: Head) -> None:
    """Write a dense model with its head as the converter does."""
    block = f"blk.{head.model.config.num_hidden_layers}"
    own = {f"{block}.nextn.{HEAD_NAMES[name]}.weight": values for name, values in head.weights.items()}
    own |= {
        f"{block}.{LAYER_NAMES[name.removesuffix('.weight')]}.weight": values
        for name, values in head.layer.state_dict().items()
    }
    extra = {name: (values + ("norm" in name)).numpy().astype(np.float32) for name, values in own.items()}
    tiny_gguf.write(path, head.model, "qwen35", extra=extra)
