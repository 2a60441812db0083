"""Writes a transformers model as a GGUF file, the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.e_score_correction": "exp_probs_b",
    "mlp.gate.e_score_correction": "exp_probs_b",
}
# The architecture's name of a row of `tiny_models.CONFIGS`, where it is another.
ARCHITECTURES = {
    "llama3": "llama",
    "gemma4_31b": "gemma4",
    "gemma4_moe": "gemma4",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "minimax_m2": "minimax-m2",
    "granitemoeshared": "granitemoe",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "ministral3": "mistral3",
    "olmo3": "olmo2",
    "cohere": "command-r",
    "lfm2_tied": "lfm2",
    "lfm2_moe": "lfm2moe",
    "qwen3_5": "qwen35",
    "qwen3_5_small": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_next": "qwen3next",
    "granitemoehybrid": "granitehybrid",
    "nemotron_h_biased": "nemotron_h",
    "nemotron_h_latent": "nemotron_h_moe",
    "falcon_h1": "falcon-h1",
    "falcon_h1_normed": "falcon-h1",
    "granitemoehybrid_dense": "granitehybrid",
    "granitemoehybrid_attention": "granite",
}
# Those with latent attention.
LATENT = ("deepseek2", "mistral4")
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OLMO_NAMES = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
GEMMA4_NAMES = GEMMA_NAMES | {
    "layer_scalar": "layer_output_scale",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "router.proj": "ffn_gate_inp",
    "router": "ffn_gate_inp",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    "experts.down_proj": "ffn_down_exps",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "post_per_layer_input_norm": "post_norm",
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
}
QWEN_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.dt": "ssm_dt",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
OTHER_NAMES = {
    "falcon-h1": {
        "model.final_layernorm": "output_norm",
        "pre_ff_layernorm": "ffn_norm",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
        "mamba.in_proj": "ssm_in",
        "mamba.conv1d": "ssm_conv1d",
        "mamba.dt": "ssm_dt",
        "mamba.norm": "ssm_norm",
        "mamba.out_proj": "ssm_out",
    },
    "nemotron_h": {
        "model.embeddings": "token_embd",
        "model.norm_f": "output_norm",
        "norm": "attn_norm",
        "mixer.q_proj": "attn_q",
        "mixer.k_proj": "attn_k",
        "mixer.v_proj": "attn_v",
        "mixer.o_proj": "attn_output",
        "mixer.up_proj": "ffn_up",
        "mixer.down_proj": "ffn_down",
        "mixer.in_proj": "ssm_in",
        "mixer.conv1d": "ssm_conv1d",
        "mixer.dt": "ssm_dt",
        "mixer.norm": "ssm_norm",
        "mixer.out_proj": "ssm_out",
    },
    "granite": {
        "shared_mlp.gate_proj": "ffn_gate",
        "shared_mlp.up_proj": "ffn_up",
        "shared_mlp.output_linear": "ffn_down",
    },
    "granitehybrid": {
        "mamba.in_proj": "ssm_in",
        "mamba.conv1d": "ssm_conv1d",
        "mamba.dt": "ssm_dt",
        "mamba.norm": "ssm_norm",
        "mamba.out_proj": "ssm_out",
        "block_sparse_moe.router": "ffn_gate_inp",
        "block_sparse_moe.experts.gate_proj": "ffn_gate_exps",
        "block_sparse_moe.experts.up_proj": "ffn_up_exps",
        "block_sparse_moe.experts.down_proj": "ffn_down_exps",
        "shared_mlp.gate_proj": "ffn_gate_shexp",
        "shared_mlp.up_proj": "ffn_up_shexp",
        "shared_mlp.output_linear": "ffn_down_shexp",
    },
    "qwen35": QWEN_NAMES,
    "qwen35moe": QWEN_NAMES,
    "qwen3next": QWEN_NAMES,
    "gemma4": GEMMA4_NAMES,
    "gemma2": GEMMA_NAMES,
    "gemma3": GEMMA_NAMES,
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "olmo2": OLMO_NAMES,
    "exaone4": OLMO_NAMES,
    "gpt-oss": {
        "post_attention_layernorm": "post_attention_norm",
        "self_attn.sinks": "attn_sinks",
        "mlp.router": "ffn_gate_inp",
    },
    "deepseek2": {
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.k_b_proj": "attn_k_b",
        "self_attn.v_b_proj": "attn_v_b",
    },
    "glm4moe": {"post_attention_layernorm": "post_attention_norm"},
    "granitemoe": {
        "block_sparse_moe.router": "ffn_gate_inp",
        "block_sparse_moe.experts.gate_proj": "ffn_gate_exps",
        "block_sparse_moe.experts.up_proj": "ffn_up_exps",
        "block_sparse_moe.experts.down_proj": "ffn_down_exps",
        "shared_mlp.gate_proj": "ffn_gate_shexp",
        "shared_mlp.up_proj": "ffn_up_shexp",
        "shared_mlp.output_linear": "ffn_down_shexp",
    },
    "llama4": {
        "feed_forward.router": "ffn_gate_inp",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
        "feed_forward.experts.gate_proj": "ffn_gate_exps",
        "feed_forward.experts.up_proj": "ffn_up_exps",
        "feed_forward.experts.down_proj": "ffn_down_exps",
        "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
        "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
        "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    },
    "phimoe": {"mlp.router": "ffn_gate_inp"},
    "seed_oss": {"post_attention_layernorm": "post_attention_norm"},
    "starcoder2": {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    "lfm2": {
        "model.embedding_norm": "token_embd_norm",
        "operator_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
        "conv.conv": "shortconv.conv",
        "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj",
    },
    "lfm2moe": {
        "feed_forward.gate": "ffn_gate_inp",
        "feed_forward.experts.gate_proj": "ffn_gate_exps",
        "feed_forward.experts.up_proj": "ffn_up_exps",
        "feed_forward.experts.down_proj": "ffn_down_exps",
        "feed_forward.expert_bias": "exp_probs_b",
    },
    "nemotron_h_moe": {
        "mixer.gate": "ffn_gate_inp",
        "mixer.gate.e_score_correction": "exp_probs_b",
        "mixer.experts.up_proj": "ffn_up_exps",
        "mixer.experts.down_proj": "ffn_down_exps",
        "mixer.shared_experts.up_proj": "ffn_up_shexp",
        "mixer.shared_experts.down_proj": "ffn_down_shexp",
        "mixer.fc1_latent_proj": "ffn_latent_down",
        "mixer.fc2_latent_proj": "ffn_latent_up",
    },
    "apertus": {"attention_layernorm": "attn_norm", "feedforward_layernorm": "ffn_norm"},
}
OTHER_NAMES["mistral4"] = OTHER_NAMES["deepseek2"]
OTHER_NAMES["lfm2moe"] |= OTHER_NAMES["lfm2"]
OTHER_NAMES["nemotron_h_moe"] |= OTHER_NAMES["nemotron_h"]
# Architectures whose q and k are stored with the rotated pairs in adjacent rows.
PERMUTED = ("llama", "internlm2", "mistral3", "granite", "granitemoe", "granitehybrid", "smollm3")
# Architectures whose norms are stored as what is multiplied by, not as what is added to 1.
SHIFTED = ("gemma2", "gemma3", "qwen35", "qwen35moe", "qwen3next")
# Architectures whose files have so many layers behind the others, which guess tokens ahead.
DRAFTS = {"qwen35": 1, "qwen35moe": 1, "nemotron_h_moe": 1}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def write(
    path: Path,
    model,
    architecture: str,
    dtype: str = "F32",
    extra: dict | None = None,
    pooling: int | None = None,
    texts: dict[str, list[str]] | None = None,
) -> None:
    """Write the model with its matrices stored as dtype, and give the model the values that were stored.

    extra: further tensors. pooling: the value of pooling_type. texts: further keys.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType(pooling))
    for key, values in (texts or {}).items():
        writer.add_array(key, values)
    drafts = DRAFTS.get(architecture, 0)
    writer.add_block_count(config.num_hidden_layers + drafts)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gemma4":
        # Layers differ in these.
        layers = list(model.model.layers)
        writer.add_feed_forward_length([layer.mlp.gate_proj.out_features for layer in layers])
        writer.add_head_count_kv(
            [config.num_attention_heads // layer.self_attn.num_key_value_groups for layer in layers]
        )
    elif architecture in ("lfm2", "lfm2moe"):
        writer.add_feed_forward_length(model.model.layers[0].feed_forward.w1.out_features)
        heads = [0 if kind == "conv" else config.num_key_value_heads for kind in config.layer_types]
        writer.add_head_count_kv(heads)
    elif architecture in ("nemotron_h", "nemotron_h_moe"):
        kinds = config.layers_block_type
        widths = {"mlp": config.intermediate_size, "moe": config.moe_intermediate_size}
        # The one that guesses ahead has both.
        inner = [widths.get(kind, 0) for kind in kinds] + [config.moe_intermediate_size] * drafts
        heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds]
        writer.add_feed_forward_length(inner)
        writer.add_head_count_kv(heads + [config.num_key_value_heads] * drafts)
    elif architecture == "granitehybrid":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(
            [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
        )
    else:
        if (inner := getattr(config, "intermediate_size_mlp", getattr(config, "intermediate_size", None))) is not None:
            writer.add_feed_forward_length(inner)
        # One latent is what all heads have in common.
        writer.add_head_count_kv(1 if architecture in LATENT else config.num_key_value_heads)
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts = next((count for count in counts if count), None)
    if experts and architecture != "nemotron_h":
        writer.add_expert_count(experts)
        writer.add_expert_used_count(getattr(config, "top_k_experts", None) or config.num_experts_per_tok)
        if getattr(config, "moe_intermediate_size", None):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "rms_norm_eps", None):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    attention = [layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn")]
    head_dim = max(getattr(layer, "head_dim", 0) for layer in attention) if attention else config.head_dim
    if head_dim and head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
    KEYS.get(architecture, lambda _writer, _config: None)(writer, config)
    _write_vocabulary(writer, config.vocab_size)
    if not architecture.startswith("nemotron_h"):
        _write_rope(writer, config)
    if architecture == "apertus":
        activations = [layer.mlp.act_fn for layer in model.model.layers]
        for part in ("alpha_p", "alpha_n", "beta", "eps"):
            add = getattr(writer, f"add_xielu_{part}")
            add([getattr(activation, part).item() for activation in activations])
    heads = {}
    if architecture in PERMUTED:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = NAMES | OTHER_NAMES.get(architecture, {})
    tensors = dict(model.named_parameters())
    scalars = {f"{name}.weight": buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")}
    tensors |= scalars
    tensors |= {
        f"{name if name.endswith('expert_bias') else name.removesuffix('_bias')}.bias": buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("e_score_correction_bias", "expert_bias"))
    }
    tensors = _separated(tensors)
    if architecture in LATENT:
        tensors = _with_heads_apart(tensors, config)
    if architecture in ("qwen35", "qwen35moe", "qwen3next"):
        assert dtype == "F32"
        tensors = _delta_nets(tensors, config, tiled=architecture != "qwen3next")
        # Files with a head of their own have it in `extra`.
        own = any(".nextn." in name for name in extra or {})
        draft = [name for name in tensors if name.startswith("model.layers.1.self_attn")] * (drafts and not own)
        for name in draft:
            writer.add_tensor(f"blk.{config.num_hidden_layers}.nextn.{name}", np.ones((2, 2), np.float32))
    for name, parameter in tensors.items():
        if "act_fn" in name:
            continue
        if name.endswith((".A_log", ".D")):
            values = parameter.detach().numpy()
            part, values = ("d", values) if name.endswith(".D") else ("a", -np.exp(values))
            values = values.reshape(-1, 1) if ".linear_attn." not in name else values
            writer.add_tensor(f"blk.{name.split('.')[2]}.ssm_{part}", values)
            continue
        stem, kind = name.rsplit(".", 1)
        prefix, _, rest = stem.removeprefix("model.layers.").partition(".")
        target = f"blk.{prefix}.{names[rest]}" if stem not in names else names[stem]
        if architecture == "granitehybrid" and not config.num_local_experts:
            target = target.removesuffix("_shexp")
        is_conv = name.endswith((".conv.weight", ".conv1d.weight"))
        stored_parameter = parameter.squeeze(1) if is_conv else parameter
        values = stored_parameter.detach().numpy()
        rows = np.arange(len(values))
        if stem.rsplit(".", 1)[-1] in heads:
            rows = rows.reshape(heads[stem.rsplit(".", 1)[-1]], 2, -1).swapaxes(1, 2).reshape(-1)
        # Routers and convolutions are never rounded.
        is_matrix = kind == "weight" and values.ndim >= 2 and "gate_inp" not in target and not is_conv
        storage = Type[dtype] if is_matrix else Type.F32
        stored = quantize(values.reshape(-1, values.shape[-1]), storage)
        restored = gguf.dequantize(stored, storage).reshape(values.shape)
        stored = stored.reshape(*values.shape[:-1], -1)
        with torch.no_grad():
            stored_parameter.copy_(torch.from_numpy(restored))
        if architecture in SHIFTED and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            stored = stored + np.float32(1)
        if architecture == "falcon-h1":
            assert dtype == "F32"
            stored = stored * _falcon_multiplier(name, config)
        if name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
            groups = config.mamba_n_groups if "mamba" in name else config.n_groups
            stored, rows = stored.reshape(groups, -1), np.arange(groups)
        end = "" if architecture == "falcon-h1" and target.endswith("ffn_norm") else f".{kind}"
        writer.add_tensor(f"{target}{end}", np.ascontiguousarray(stored[rows]), raw_dtype=storage)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _separated(tensors: dict) -> dict:
    """The tensors as the converter has them, with names as of linear layers; all share the memory of what is given."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        values, gpt_oss = tensor.data, f"{stem}.gate_up_proj_bias" in tensors
        llama4 = f"{stem.removesuffix('experts')}router.weight" in tensors and stem.endswith("feed_forward.experts")
        match kind:
            case "gate_up_proj" if llama4:
                for part, own in zip(("gate", "up"), values.transpose(1, 2).chunk(2, dim=1), strict=True):
                    found[f"{stem}.{part}_proj.weight"] = own
            case "weight" if stem.endswith("shared_mlp.input_linear"):
                for part, own in zip(("gate", "up"), values.chunk(2), strict=True):
                    found[f"{stem.removesuffix('input_linear')}{part}_proj.weight"] = own
            case "gate_up_proj" if gpt_oss:
                for at, part in enumerate(("gate", "up")):
                    found[f"{stem}.{part}_proj.weight"] = values.transpose(1, 2)[:, at::2]
            case "gate_up_proj_bias":
                for at, part in enumerate(("gate", "up")):
                    found[f"{stem}.{part}_proj.bias"] = values[:, at::2]
            case "gate_up_proj" if stem.endswith(("mlp.experts", "moe.experts", "feed_forward.experts")):
                for part, own in zip(("gate", "up"), values.chunk(2, dim=1), strict=True):
                    found[f"{stem}.{part}_proj.weight"] = own
            case "down_proj" if gpt_oss or llama4:
                found[f"{name}.weight"] = values.transpose(1, 2)
            case "down_proj_bias":
                found[f"{stem}.down_proj.bias"] = values
            case "gate_up_proj" | "up_proj" | "down_proj" | "sinks":
                found[f"{name}.weight"] = values
            case "dt_bias":
                found[f"{stem}.dt.bias"] = tensor
            case "per_expert_scale":
                found[name.replace("router.per_expert_scale", "experts.down_proj.scale")] = values
            case _:
                found[name] = tensor
    return found


def _with_heads_apart(tensors: dict, config) -> dict:
    """The tensors with kv_b_proj taken apart; all share the memory of what is given."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("kv_b_proj.weight"):
            heads = tensor.data.view(config.num_attention_heads, -1, config.kv_lora_rank)
            found[name.replace("kv_b", "k_b")] = heads[:, : config.qk_nope_head_dim].transpose(1, 2)
            found[name.replace("kv_b", "v_b")] = heads[:, config.qk_nope_head_dim :]
        else:
            found[name] = tensor
    return found


def _delta_nets(tensors: dict, config, *, tiled: bool) -> dict:
    """The tensors with those of delta nets as the converter has them.

    What Qwen3-Next stores by heads of keys is taken apart. If `tiled`, of heads of values the first of each head of
    keys come first, then the second ones, and so on.
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    rows, columns = config.linear_key_head_dim, config.linear_value_head_dim

    def reordered(tensor, width: int, dim: int = 0):
        if not tiled:
            return tensor
        parts = tensor.unflatten(dim, (keys, values // keys, width))
        return parts.transpose(dim, dim + 1).flatten(dim, dim + 2)

    found = {}
    for name, tensor in tensors.items():
        stem, _, part = name.partition(".linear_attn.")
        stem = f"{stem}.linear_attn."
        match part:
            case "in_proj_qkvz.weight":
                heads = tensor.data.unflatten(0, (keys, -1))
                widths = [rows, rows, values // keys * columns, values // keys * columns]
                *qkv, z = (part.flatten(0, 1) for part in heads.split(widths, dim=1))
                found[f"{stem}in_proj_qkv.weight"], found[f"{stem}in_proj_z.weight"] = torch.cat(qkv), z
            case "in_proj_qkv.weight" | "conv1d.weight":
                both, own = tensor.data.split([2 * keys * rows, values * columns])
                found[name] = torch.cat([both, reordered(own, columns)])
            case "in_proj_z.weight":
                found[name] = reordered(tensor.data, columns)
            case "in_proj_b.weight" | "in_proj_a.weight" | "A_log" | "dt.bias":
                found[name] = reordered(tensor.data, 1)
            case "out_proj.weight":
                found[name] = reordered(tensor.data, columns, 1)
            case _:
                found[name] = tensor
    return found


# Of types that gguf only reads: where a block has its half-precision scales, and some for weights of like magnitude.
SCALES = {
    "Q4_K": (0, [2e-4, 1e-4]),
    "Q5_K": (0, [2e-4, 1e-4]),
    "Q6_K": (208, [4e-5]),
    "Q2_K": (80, [2e-3, 2e-3]),
    "Q3_K": (108, [4e-4]),
    "IQ4_NL": (0, [5e-4]),
    "IQ4_XS": (0, [3e-5]),
    "IQ2_XXS": (0, [1e-3]),
    "IQ2_XS": (0, [1e-3]),
    "IQ2_S": (0, [1e-3]),
    "IQ3_XXS": (0, [5e-4]),
    "IQ3_S": (0, [3e-4]),
    "IQ1_S": (0, [5e-3]),
}


def quantize(values: np.ndarray, storage: Type) -> np.ndarray:
    """Blocks of the values; of a type which gguf only reads, random blocks of like magnitude."""
    if storage.name not in SCALES and storage != Type.NVFP4:
        return gguf.quantize(values, storage)
    elements, size = gguf.GGML_QUANT_SIZES[storage]
    generator = np.random.default_rng(values.shape[1])
    blocks = generator.integers(0, 256, (values.size // elements, size), np.uint8)
    if storage == Type.NVFP4:
        blocks[:, :4] = blocks[:, :4] % 8 + 8
    else:
        at, scales = SCALES[storage.name]
        scale = np.array(scales, np.float16).view(np.uint8)
        blocks[:, at : at + len(scale)] = scale
    return blocks.reshape(len(values), -1)


def _write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"t{i}" for i in range(3, size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)


def _write_rope(writer: gguf.GGUFWriter, config) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and rope["rope_type"] != "proportional":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32))


def _windows(writer: gguf.GGUFWriter, config) -> None:
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "layer_types", None):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _gemma2(writer: gguf.GGUFWriter, config) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gpt_oss(writer: gguf.GGUFWriter, config) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _glm4_moe(writer: gguf.GGUFWriter, config) -> None:
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_nextn_predict_layers(config.num_nextn_predict_layers)


def _deepseek2(writer: gguf.GGUFWriter, config) -> None:
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    softmax = config.model_type in ("deepseek_v2", "mistral4")
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rope)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(rope)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX if softmax else gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.model_type != "deepseek_v2" and config.norm_topk_prob)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    if config.rope_parameters.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope_parameters["mscale_all_dim"])


def _mistral4(writer: gguf.GGUFWriter, config) -> None:
    _deepseek2(writer, config)
    writer.add_attn_temperature_scale(config.rope_parameters["llama_4_scaling_beta"])


def _granite_moe(writer: gguf.GGUFWriter, config) -> None:
    _granite(writer, config)
    if getattr(config, "shared_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def _granite_hybrid(writer: gguf.GGUFWriter, config) -> None:
    _granite(writer, config)
    if config.num_local_experts:
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_group_count(config.mamba_n_groups)
    writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")


def _falcon_multiplier(name: str, config):
    """What the converter multiplies a tensor by."""
    inner, states = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
    parts = np.repeat(config.ssm_multipliers, [inner, inner, states, states, config.mamba_n_heads])
    attention, (gate, down) = config.attention_in_multiplier, config.mlp_multipliers
    multipliers = {
        "down_proj": down,
        "gate_proj": gate,
        "k_proj": config.key_multiplier * attention,
        "q_proj": attention,
        "v_proj": attention,
        "o_proj": config.attention_out_multiplier,
        "out_proj": config.ssm_out_multiplier,
        "in_proj": config.ssm_in_multiplier * parts[:, None],
        "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }
    return np.float32(multipliers.get(name.split(".")[-2], 1.0))


def _falcon_h1(writer: gguf.GGUFWriter, config) -> None:
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_group_count(config.mamba_n_groups)
    writer.add_ssm_inner_size(config.mamba_d_ssm)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)


def _nemotron_h(writer: gguf.GGUFWriter, config) -> None:
    # Files have one or the other.
    add_eps = writer.add_layer_norm_eps if config.mlp_bias else writer.add_layer_norm_rms_eps
    add_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_ssm_inner_size(config.mamba_num_heads * config.mamba_head_dim)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)
    writer.add_rope_scaling_finetuned(False)


def _nemotron_h_moe(writer: gguf.GGUFWriter, config) -> None:
    _nemotron_h(writer, config)
    writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_group_count(config.n_group)
    writer.add_nextn_predict_layers(DRAFTS[writer.arch])
    for name in ("nextn.eh_proj", "attn_q", "ffn_up_exps"):
        writer.add_tensor(f"blk.{config.num_hidden_layers}.{name}.weight", np.ones((2, 2), np.float32))
    if config.moe_latent_size is not None:
        writer.add_moe_latent_size(config.moe_latent_size)


def _llama4(writer: gguf.GGUFWriter, config) -> None:
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)
    writer.add_attn_temperature_length(config.floor_scale)


def _mistral3(writer: gguf.GGUFWriter, config) -> None:
    writer.add_rope_scaling_yarn_log_mul(config.rope_parameters["mscale_all_dim"])
    writer.add_attn_temperature_scale(config.rope_parameters["llama_4_scaling_beta"])


def _granite(writer: gguf.GGUFWriter, config) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _cohere(writer: gguf.GGUFWriter, config) -> None:
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    _windows(writer, config)


def _stablelm(writer: gguf.GGUFWriter, config) -> None:
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_parallel_residual(config.use_parallel_residual)


def _starcoder2(writer: gguf.GGUFWriter, config) -> None:
    writer.add_layer_norm_eps(config.norm_epsilon)
    _windows(writer, config)


def _gemma4(writer: gguf.GGUFWriter, config) -> None:
    layers, shared = config.num_hidden_layers, config.num_kv_shared_layers
    full = config.per_layer_config[layers - 1]
    _windows(writer, config)
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    sliding = config.per_layer_config[0]
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    rotated = full.head_dim // 8
    factors = [1.0] * rotated + [1e30] * (full.head_dim // 2 - rotated)
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def _lfm2(writer: gguf.GGUFWriter, config) -> None:
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_shortconv_l_cache(config.conv_L_cache)


def _lfm2_moe(writer: gguf.GGUFWriter, config) -> None:
    _lfm2(writer, config)
    writer.add_leading_dense_block_count(config.num_dense_layers)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)


def _delta_net(writer: gguf.GGUFWriter, config) -> None:
    drafts = DRAFTS.get(writer.arch, 0)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    recurrent = [kind == "linear_attention" for kind in config.layer_types] + [False] * drafts
    writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)
    writer.add_full_attention_interval(4)
    if drafts:
        writer.add_nextn_predict_layers(drafts)
    if writer.arch != "qwen3next":
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


# What the converter writes for an architecture beside the keys of all.
KEYS = {
    "llama": _windows,
    "gemma2": _gemma2,
    "gemma3": _windows,
    "gemma4": _gemma4,
    "gpt-oss": _gpt_oss,
    "qwen35": _delta_net,
    "qwen35moe": _delta_net,
    "qwen3next": _delta_net,
    "glm4moe": _glm4_moe,
    "deepseek2": _deepseek2,
    "mistral4": _mistral4,
    "granitemoe": _granite_moe,
    "granitehybrid": _granite_hybrid,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h_moe,
    "falcon-h1": _falcon_h1,
    "llama4": _llama4,
    "mistral3": _mistral3,
    "phi3": _windows,
    "granite": _granite,
    "olmo2": _windows,
    "exaone4": _windows,
    "command-r": _cohere,
    "cohere2": _cohere,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2_moe,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
